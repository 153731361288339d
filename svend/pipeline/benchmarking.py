"""The benchmarks of a run or a version: read, answered within a budget of time, and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from svend.data.corpus import EvaluationSet
from svend.data.documents import Document, Message, Role
from svend.data.tokenizer import DocumentTokenizer
from svend.errors import ConfigError
from svend.evaluation.benchmark import Benchmark, Problem, ProblemSource
from svend.evaluation.benchmarks import (
    ANSWERED,
    LATENCY,
    MADE_ON_THE_SPOT,
    PERPLEXITY,
    TOOL_METRICS,
    benchmarks_of,
)
from svend.evaluation.harness import BenchmarkResult, Harness, problems_digest
from svend.evaluation.heldout import HeldoutLoss
from svend.evaluation.latency import measure_latency
from svend.evaluation.measurement import Measurement
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import SAMPLE_SUFFIX, PipelineConfig

# What NAME_sample asks at most.
SAMPLE_PROBLEMS = 200
TOOL_ACCURACY = "tool_accuracy"
# Told while answers are written: the benchmark, how many are there, how many were asked for.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What the benchmarks measured, by metric name, with the samples that this rests on."""

    results: list[BenchmarkResult]
    measurements: dict[str, Measurement]
    seconds: float


@dataclass(frozen=True)
class Question:
    """A benchmark, its problems, and the name under which it was asked for."""

    name: str
    benchmark: Benchmark
    problems: Sequence[Problem]


def read_questions(config: PipelineConfig) -> list[Question]:
    """Return the problems of the config's benchmarks.

    Raises DataError, naming file and line, for what cannot be read.
    """
    return [
        Question(name, benchmark, benchmark.read(_source(config, name, benchmark, limited=True)))
        for name in dict.fromkeys(config.eval_benchmarks)
        for benchmark in benchmarks_of(name.removesuffix(SAMPLE_SUFFIX), config.evaluation)
    ]


def evaluation_sets(config: PipelineConfig) -> list[EvaluationSet]:
    """Return the texts of all problems that training must not have seen.

    Of every benchmark that is asked for or has a path, with all of its problems. Those that are
    made on the spot are kept apart by the hashes of their questions.
    """
    names = dict.fromkeys((
        *(name.removesuffix(SAMPLE_SUFFIX) for name in config.eval_benchmarks),
        *config.evaluation.paths,
    ))
    return [
        _evaluation_set(benchmark, benchmark.read(_source(config, name, benchmark, limited=False)))
        for name in names
        for benchmark in benchmarks_of(name, config.evaluation)
        if benchmark not in MADE_ON_THE_SPOT
    ]


def _evaluation_set(benchmark: Benchmark, problems: Sequence[Problem]) -> EvaluationSet:
    documents = [
        Document((Message(Role.USER, problem.question), Message(Role.ASSISTANT, problem.expected)))
        for problem in problems
    ]
    return EvaluationSet(benchmark.name, problems_digest(problems), documents)


def _source(
    config: PipelineConfig, name: str, benchmark: Benchmark, *, limited: bool
) -> ProblemSource:
    evaluation, bare_name = config.evaluation, name.removesuffix(SAMPLE_SUFFIX)
    limit = evaluation.problems if limited else None
    if limited and name != bare_name:
        limit = min(limit or SAMPLE_PROBLEMS, SAMPLE_PROBLEMS)
    path = None if benchmark in MADE_ON_THE_SPOT else evaluation.paths.get(bare_name)
    return ProblemSource(
        path=None if path is None else Path(path),
        limit=limit,
        seed=evaluation.seed,
        heldout_fraction=config.training.data.heldout_fraction,
    )


def without_answers(config: PipelineConfig) -> list[str]:
    """Return those of the config's benchmarks that need a loss only, and no answers."""
    return [name for name in config.eval_benchmarks if name.removesuffix(SAMPLE_SUFFIX)
            == PERPLEXITY]


def check_answers(config: PipelineConfig, model: nn.Module) -> None:
    """Raise ConfigError where a benchmark wants answers of a model that does not write any."""
    if isinstance(model, ReasoningTransformer):
        return
    asked = [name for name in config.eval_benchmarks if name not in without_answers(config)]
    if asked:
        raise ConfigError(
            f"benchmarks {', '.join(asked)}: are measured on answers, which only Svend's own "
            f"transformer writes, and the model is a {type(model).__name__}; ask for {PERPLEXITY}"
        )


def evaluate_model(
    config: PipelineConfig,
    model: nn.Module,
    tokenizer: DocumentTokenizer,
    questions: Sequence[Question],
    heldout: Callable[[], HeldoutLoss],
    progress: Progress,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Measure the config's benchmarks on a model, within `evaluation.budget_seconds`.

    The time is shared: each benchmark has an equal part of what the ones before it left.
    heldout: measures the loss on held-out text, where perplexity is asked for. is_stopped: asked
    now and then whether to go on; what is there by then is measured. Raises ConfigError where the
    model cannot answer what is asked.
    """
    check_answers(config, model)
    evaluation, precision = config.evaluation, config.training.precision
    started_seconds = time.monotonic()
    ends_seconds = started_seconds + evaluation.budget_seconds
    names = [name.removesuffix(SAMPLE_SUFFIX) for name in config.eval_benchmarks]
    left = len(questions) + names.count(LATENCY)
    results: list[BenchmarkResult] = []
    measurements: dict[str, Measurement] = {}

    def next_deadline() -> float:
        nonlocal left
        now_seconds = time.monotonic()
        share = max(0.0, ends_seconds - now_seconds) / left
        left -= 1
        return now_seconds + share

    if PERPLEXITY in names:
        measurements |= heldout().measurements()
    if not isinstance(model, ReasoningTransformer):
        return Evaluation(results, measurements, time.monotonic() - started_seconds)
    with Harness(model, tokenizer, evaluation, precision) as harness:
        for question in questions:
            result = harness.run(
                question.benchmark, question.problems,
                _time_up(next_deadline(), is_stopped),
                partial(progress, question.benchmark.name),
            )
            results.append(result)
            measurements |= {
                metric: replace(measured, data_fingerprint=result.problems_sha256)
                for metric, measured in result.measurements.items()
            }
    if LATENCY in names:
        is_time_up = _time_up(next_deadline(), is_stopped)
        measurements |= measure_latency(
            model, evaluation, precision, is_time_up, partial(progress, LATENCY)
        )
    tool_metric = TOOL_METRICS[evaluation.tool_score]
    if tool_metric in measurements:
        measurements[TOOL_ACCURACY] = measurements[tool_metric]
    return Evaluation(results, measurements, time.monotonic() - started_seconds)


def benchmark_of(metric: str, config: PipelineConfig) -> str | None:
    """Return the name of the benchmark that measures a metric; None if none does."""
    if metric in (LATENCY, PERPLEXITY, TOOL_ACCURACY):
        return metric
    for name in ANSWERED:
        if any(metric in b.metrics for b in benchmarks_of(name, config.evaluation)):
            return name
    return None


def problem_digests(config: PipelineConfig) -> dict[str, str]:
    """Return the hash of the problems that each metric of the config's benchmarks is measured on.

    Raises DataError, naming file and line, for what cannot be read.
    """
    digests = {
        metric: problems_digest(question.problems)
        for question in read_questions(config) for metric in question.benchmark.metrics
    }
    tool_metric = TOOL_METRICS[config.evaluation.tool_score]
    return digests | ({TOOL_ACCURACY: digests[tool_metric]} if tool_metric in digests else {})


def measured_how(metric: str, config: PipelineConfig) -> str:
    """Return the settings that a metric's value depends on, beside weights and data."""
    told = config.evaluation
    if metric in ("loss", "perplexity"):
        return f"{config.training.heldout_sequences} sequences"
    name = benchmark_of(metric, config)
    if name is None:
        return ""
    weights = "int8" if told.int8 else "full weights"
    if name == LATENCY:
        return (f"{told.latency_batch} at once, {told.latency_prompt_tokens} tokens, then "
                f"{told.latency_new_tokens}; {weights}")
    limit = "the benchmark's" if told.max_new_tokens is None else str(told.max_new_tokens)
    drawn = "greedy" if told.temperature == 0 else (
        f"temperature {told.temperature:g}, top_k {told.top_k}, top_p {told.top_p:g}, "
        f"{told.samples_per_problem} each, seed {told.seed}"
    )
    score = f", by {told.tool_score.value}" if metric == TOOL_ACCURACY else ""
    return f"{drawn}, at most {limit} tokens{score}; {weights}"


def _time_up(deadline_seconds: float, is_stopped: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: time.monotonic() > deadline_seconds or is_stopped()
