"""What is measured on a run's weights as they are: the held-out loss, and the benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from rich.console import Console

from svend.device import return_freed_memory
from svend.evaluation.heldout import HeldoutLoss
from svend.evaluation.measurement import Measurement
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.benchmarking import evaluate_model, without_answers
from svend.pipeline.evaluation_report import AnswerProgress, measurement_table
from svend.pipeline.job import Job
from svend.pipeline.record import record_evaluation
from svend.pipeline.replica import gather_model, measure_heldout


def evaluate_heldout(job: Job) -> HeldoutLoss:
    """Measure the held-out loss, and log it unless it was logged at this step before."""
    with job.spending("evaluating"):
        measured = job.call(measure_heldout)
        return_freed_memory()
    job.final_loss = measured.loss
    if math.isnan(job.first_loss):
        job.first_loss = measured.loss
    if job.state.step <= job.evaluated_step:
        return measured
    job.evaluated_step = job.state.step
    bytes_per_token = job.heldout.bytes_per_token(job.config.training.heldout_sequences)
    job.tracked.log_metrics(
        {
            "eval/heldout_loss": measured.loss,
            "eval/perplexity": measured.perplexity,
            "eval/bits_per_byte": measured.bits_per_byte(bytes_per_token),
        },
        job.state.step,
    )
    return measured


def evaluate_benchmarks(
    job: Job, console: Console, is_stopped: Callable[[], bool]
) -> Mapping[str, Measurement] | None:
    """Measure the benchmarks and the held-out loss; None where no benchmark is to be measured.

    Nor is there anything to decide FULL on where it wants answers of a model that writes none.
    """
    model, config = job.state.model, job.config
    answers = isinstance(model, ReasoningTransformer)
    if not answers:
        left = without_answers(config)
        if left != config.eval_benchmarks:
            console.print(f"benchmarks: a {type(model).__name__} writes no answers; measured: "
                          f"{', '.join(left) or 'none'}")
        config = replace(config, eval_benchmarks=left)
    if not config.eval_benchmarks:
        return None
    heldout = evaluate_heldout(job)
    with job.spending("evaluating"), AnswerProgress(console) as progress:
        whole = job.call(gather_model)
        assert whole is not None  # in the first process
        evaluation = evaluate_model(
            config, whole, job.corpus.tokenizer, job.questions if answers else [],
            lambda: heldout, progress.advance, is_stopped,
        )
        return_freed_memory()
    record_evaluation(job.tracked, evaluation, job.state.step)
    job.measured = evaluation.measurements
    console.print(measurement_table(evaluation.results, evaluation.measurements))
    measured = {**heldout.measurements(), **evaluation.measurements}
    wanted = {gate.metric_name for gate in config.gates.full if gate.required}
    return measured if answers or wanted <= measured.keys() else None
