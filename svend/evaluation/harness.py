"""From a model and a benchmark to measurements: the one way in which answers are produced."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from svend.data.chat import CONTROL_TOKENS
from svend.data.tokenizer import DocumentTokenizer
from svend.errors import DataError
from svend.evaluation.benchmark import Answer, Benchmark, Problem, Sample, Score
from svend.evaluation.dialogue import Dialogue
from svend.evaluation.measurement import Measurement
from svend.models.generation import Decoder, Request, Sampling
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import EvaluationConfig, Precision
from svend.tools.toolbox import IsolatedToolbox

# More than any benchmark has answers: each has a seed of its own.
SEEDS = 1_000_003
TOO_LONG = "the prompt does not fit into the model's context"
# Told after each answer: how many there are, and how many were asked for.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark measured, and every sample that it rests on.

    problems_sha256: of the problems that were answered, in their order. asked: how many answers
    were wanted; fewer samples mean that the time ran out.
    """

    benchmark: Benchmark
    measurements: dict[str, Measurement]
    samples: list[Sample]
    problems_sha256: str
    asked: int
    seconds: float

    @property
    def cut_short(self) -> bool:
        return len(self.samples) < self.asked


class Harness:
    """A model with its tokenizer and tools, ready to answer. Use it as a context.

    The same settings give the same answers whatever the batch size: each answer's random numbers
    come from its own seed, and the decoder's products have the same shape for every batch.
    """

    def __init__(
        self,
        model: ReasoningTransformer,
        tokenizer: DocumentTokenizer,
        evaluation: EvaluationConfig,
        precision: Precision,
    ) -> None:
        check_tokenizer(model, tokenizer)
        self._model = model
        self._tokenizer = tokenizer
        self._evaluation = evaluation
        self._precision = precision
        self._tools = IsolatedToolbox()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tools.close()

    def run(
        self,
        benchmark: Benchmark,
        problems: Sequence[Problem],
        is_time_up: Callable[[], bool] = lambda: False,
        progress: Progress = lambda *_: None,
    ) -> BenchmarkResult:
        """Have the problems answered, and score the answers.

        is_time_up: asked after each answer. Answers that are not there by then are left out, and
        with them all that come after the first of them: leaving out only those would leave out
        what takes long. A problem whose prompt the context does not hold counts as wrong.
        """
        started_seconds = time.monotonic()
        repeats = self._evaluation.samples_per_problem
        asked = [problem for problem in problems for _ in range(repeats)]
        answers = self._answer(benchmark, asked, is_time_up, progress)
        said = [(p, a) for p, a in zip(asked, answers, strict=False) if a is not None]
        scores = iter(benchmark.score_all([p for p, _ in said], [a for _, a in said]))
        samples = [
            Sample(problem, Answer((), 0, complete=False), Score(False, "", TOO_LONG))
            if answer is None else Sample(problem, answer, next(scores))
            for problem, answer in zip(asked, answers, strict=False)
        ]
        return BenchmarkResult(
            benchmark,
            dict(benchmark.summarize(samples)) if samples else {},
            samples,
            problems_digest(problems[: len(samples) // repeats]),
            len(asked),
            time.monotonic() - started_seconds,
        )

    def _answer(
        self, benchmark: Benchmark, asked: list[Problem], is_time_up: Callable[[], bool],
        progress: Progress,
    ) -> list[Answer | None]:
        """Return the answers to the first problems, as many as are there without a gap.

        None is for a problem that the model's context does not hold.
        """
        evaluation, context = self._evaluation, self._model.config.max_position_embeddings
        limit = evaluation.max_new_tokens or benchmark.max_new_tokens
        prompts = {
            number: prompt for number, problem in enumerate(asked)
            if len(prompt := self._tokenizer.encode_prompt(problem.messages)) < context
        }
        answers: dict[int, Answer | None] = {
            number: None for number in range(len(asked)) if number not in prompts
        }
        if prompts:
            longest = max(map(len, prompts.values()))
            decoder = Decoder(
                self._model,
                lanes=min(evaluation.batch_size, len(prompts)),
                max_length=min(context, longest + limit),
                precision=self._precision,
                sampling=Sampling(evaluation.temperature, evaluation.top_k, evaluation.top_p),
                int8=evaluation.int8,
                invariant=True,
            )
            carry_out = self._tools.call if benchmark.uses_tools else None
            numbers = list(prompts)
            turns = [Dialogue(asked[number].messages, self._tokenizer, limit, carry_out)
                     for number in numbers]
            completions = decoder.generate(
                Request(prompts[number], turn, seed=evaluation.seed * SEEDS + number)
                for number, turn in zip(numbers, turns, strict=True)
            )
            for completion in completions:
                answers[numbers[completion.index]] = turns[completion.index].answer()
                progress(len(answers), len(asked))
                if is_time_up():
                    break
        first_gap = next((n for n in range(len(asked)) if n not in answers), len(asked))
        return [answers[number] for number in range(first_gap)]


def problems_digest(problems: Sequence[Problem]) -> str:
    """Return a hash of the problems: their messages and what is expected, in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        parts = (problem.problem_id, problem.expected,
                 *(f"{m.role.value}:{m.content}" for m in problem.messages))
        digest.update("\0".join(parts).encode() + b"\1")
    return digest.hexdigest()


def check_tokenizer(model: ReasoningTransformer, tokenizer: DocumentTokenizer) -> None:
    """Raise DataError unless the model can read and say what the tokenizer writes."""
    lacking = [token for token in CONTROL_TOKENS if token in tokenizer.added]
    if lacking:
        raise DataError(
            f"tokenizer {tokenizer.origin}: has no {' '.join(lacking)}; the model was not trained "
            "with it; give the tokenizer that it was trained with"
        )
    if tokenizer.size > model.config.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.origin}: {tokenizer.size} entries, the model has "
            f"{model.config.vocab_size}; give the tokenizer that it was trained with"
        )
