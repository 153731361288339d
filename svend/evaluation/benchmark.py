"""What a benchmark is: problems, how an answer is scored, and what the scores come to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svend.data.documents import Message, Role
from svend.evaluation.measurement import Measurement, proportion


@dataclass(frozen=True)
class Problem:
    """One problem: what the model is shown, what is expected, and what its scorer must know.

    `messages` are what comes before the model speaks: a system message, the tools, the question.
    `group` is the task, level or category by which scores are reported too. `expected` is the
    answer as people read it; `reference` is for the scorer alone.
    """

    problem_id: str
    group: str
    messages: tuple[Message, ...]
    expected: str
    reference: Any = None

    @property
    def question(self) -> str:
        """The text that the user says."""
        return "\n".join(m.content for m in self.messages if m.role is Role.USER)


@dataclass(frozen=True)
class Answer:
    """What the model said to a problem, with the results that its calls got.

    `complete` says that the model ended it, rather than a limit of tokens.
    """

    messages: tuple[Message, ...]
    tokens: int
    complete: bool = True

    @property
    def text(self) -> str:
        """The last thing that the model said, other than a call; empty if it said nothing."""
        said = [m.content for m in self.messages if m.role is Role.ASSISTANT]
        return said[-1] if said else ""

    @property
    def calls(self) -> list[str]:
        """Each call as the model wrote it: meant as a JSON object of name and arguments."""
        return [m.content for m in self.messages if m.role is Role.TOOL_CALL]

    @property
    def results(self) -> list[str]:
        """What each call returned, in their order."""
        return [m.content for m in self.messages if m.role is Role.TOOL]


@dataclass(frozen=True)
class Score:
    """Whether an answer is right, what was read out of it, and why it is wrong."""

    correct: bool
    extracted: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Sample:
    """A problem, one answer to it, and its score."""

    problem: Problem
    answer: Answer
    score: Score


@dataclass(frozen=True)
class ProblemSource:
    """Where a benchmark's problems come from, and how many are wanted.

    path: a local file or folder in the hub's schema; None means the hub, or the problems that are
    made on the spot. limit: a random choice of so many by the seed, None for all.
    heldout_fraction: of the embedded data's questions, that no training sees.
    """

    path: Path | None = None
    limit: int | None = None
    seed: int = 0
    heldout_fraction: float = 0.05


Summarize = Callable[[Sequence[Sample]], Mapping[str, Measurement]]


def share_correct(metric: str) -> Summarize:
    """Return a summary of samples as the share of right answers, overall and for each group."""

    def summarize(samples: Sequence[Sample]) -> dict[str, Measurement]:
        by_group: dict[str, list[bool]] = defaultdict(list)
        for sample in samples:
            by_group[sample.problem.group].append(sample.score.correct)
        correct = [sample.score.correct for sample in samples]
        measured = {metric: proportion(sum(correct), len(correct))}
        if len(by_group) > 1:
            for group, of_group in sorted(by_group.items()):
                measured[f"{metric}/{group}"] = proportion(sum(of_group), len(of_group))
        return measured

    return summarize


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark that is answered by generation.

    read: returns the problems; raises DataError, naming file and line, for what cannot be one.
    score: decides one answer. summarize: what is measured, by metric name. uses_tools: whether
    calls are carried out, so that the model goes on with their results. max_new_tokens: what one
    answer may take, calls and their results included. metrics: the names that it measures.
    score_many: decides many answers, where each by itself would cost more.

    Where problems come from, and under which licence, stands in docs/evaluation.md.
    """

    name: str
    read: Callable[[ProblemSource], list[Problem]]
    score: Callable[[Problem, Answer], Score]
    summarize: Summarize
    max_new_tokens: int
    metrics: tuple[str, ...]
    uses_tools: bool = False
    score_many: Callable[[Sequence[Problem], Sequence[Answer]], list[Score]] | None = None

    def score_all(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Score]:
        """Return the score of each answer."""
        if self.score_many is not None:
            return self.score_many(problems, answers)
        return [self.score(p, a) for p, a in zip(problems, answers, strict=True)]
