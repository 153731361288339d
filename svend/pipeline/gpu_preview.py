"""The plan of a run on GPUs that are not here, as tables and as figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from svend.errors import ConfigError
from svend.pipeline.config import PipelineConfig, TrainingConfig, format_count
from svend.pipeline.console import make_console, say
from svend.pipeline.progress import CountProgress
from svend.pipeline.report import format_seconds
from svend.planning.gpu_plan import GpuPlan, plan_on_gpus
from svend.planning.gpus import find_gpu
from svend.planning.search import Combination

LONGEST_LIST = 8


def preview_on_gpus(
    configs: Sequence[PipelineConfig],
    gpu_name: str,
    *,
    gpus: int | None,
    mfu: float,
    tokens: int | None,
    dollars_per_gpu_hour: float | None,
) -> list[dict[str, Any]]:
    """Print the plan of one configuration whole, or of several as lines of one table.

    Nothing of this machine is looked at, and no data are read. Returns the figures of each.
    """
    gpu = find_gpu(gpu_name)
    for config in configs:
        if config.model_factory is not None:
            raise ConfigError(
                f"model_factory = {config.model_factory}: plan --gpu counts Svend's own "
                "transformer part by part; leave out --gpu, or the factory"
            )
    console, plans = make_console(), []
    with CountProgress(console, "planned") as progress:
        for config in configs:
            resolved = config.resolve()
            assert resolved.model is not None  # set by resolve
            plans.append(plan_on_gpus(
                resolved.model, resolved.training, gpu, gpus=gpus, mfu=mfu, tokens=tokens
            ))
            if len(configs) > 1:
                progress.advance("scales", len(plans), len(configs))
    if len(plans) > 1:
        console.print(_scales_table(plans, dollars_per_gpu_hour))
        for line in _notes(plans):
            say(console, line)
    else:
        _show_one(console, plans[0], dollars_per_gpu_hour)
    return [_figures(plan, dollars_per_gpu_hour) for plan in plans]


def _show_one(console: Console, plan: GpuPlan, dollars: float | None) -> None:
    gpu, training = plan.gpu, plan.training
    table = Table(title=f"Plan: {plan.model.name} on {_count_gpus(plan)}", show_header=False,
                  title_justify="left")
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    parameters = plan.model.num_parameters()
    table.add_row("parameters", f"{parameters:,} ({format_count(parameters)})")
    table.add_row("FLOPs", f"{plan.flops_per_token:.2e} per token")
    table.add_row("tokens", f"{plan.tokens:,} ({plan.tokens_from})")
    table.add_row("settings", _describe(training))
    table.add_row("GPUs", _describe_placement(plan))
    fits = "fits" if plan.fits else "does not fit"
    table.add_row("peak memory", f"{plan.memory.total / 1e9:.1f} GB of "
                                 f"{gpu.memory_bytes / 1e9:.0f} GB each: {fits}")
    for name, size in plan.memory.parts().items():
        table.add_row("", f"{size / 1e9:8.2f} GB {name}")
    table.add_row(
        "step", f"{plan.step_seconds:.3g} s for {plan.tokens_per_step:,} tokens, at {plan.mfu:.0%} "
        f"of {plan.peak_flops / 1e12:g} TFLOP/s (assumed, not measured)",
    )
    table.add_row("time", f"{format_seconds(plan.seconds_of(training, plan.gpus))}, "
                          f"{plan.gpu_hours:,.0f} GPU hours" + _cost_text(plan, dollars))
    console.print(table)
    combinations = _worth_showing(plan.combinations)
    if combinations:
        console.print(_combinations_table(plan, combinations))
    for line in _notes([plan]):
        say(console, line)


def _describe(training: TrainingConfig) -> str:
    return (
        f"weights {training.weight_precision.value}, moments {training.moment_precision.value}, "
        f"checkpointing {_checkpointing(training)}, micro-batch {training.batch_size} x "
        f"{training.data.max_seq_length}, {training.gradient_accumulation_steps} a step"
    )


def _describe_placement(plan: GpuPlan) -> str:
    if plan.gpus == 1:
        return "1"
    held = "each holds the whole model" if plan.shards == 1 else (
        f"{plan.shards} share one copy of weights, gradients and moments"
    )
    return f"{plan.gpus}: {held}"


def _checkpointing(training: TrainingConfig) -> str:
    on = training.gradient_checkpointing
    return training.gradient_checkpointing_policy.value if on else "none"


def _count_gpus(plan: GpuPlan) -> str:
    return plan.gpu.name if plan.gpus == 1 else f"{plan.gpus} x {plan.gpu.name}"


def _days(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:,.1f}" if days < 1000 else f"{days:,.0f}"


def _cost_text(plan: GpuPlan, dollars: float | None) -> str:
    return "" if dollars is None else f", ${dollars * plan.gpu_hours:,.0f}"


def _worth_showing(combinations: Sequence[Combination]) -> list[Combination]:
    """Leave out what loses precision and saves nothing beside one that is listed before."""
    shown: list[Combination] = []
    for one in combinations:
        beaten = any(
            other.devices <= one.devices and other.precision_lost <= one.precision_lost
            and other.computed_flops_per_token <= one.computed_flops_per_token
            and other.training.batch_size >= one.training.batch_size
            for other in shown
        )
        if not beaten:
            shown.append(one)
    return shown[:LONGEST_LIST]


def _combinations_table(plan: GpuPlan, combinations: Sequence[Combination]) -> Table:
    table = Table(title="What fits, cheapest first", title_justify="left")
    for heading in ("GPUs", "share a copy", "weights, moments", "recompute", "micro-batch",
                    "GB each", "GPU hours", "days"):
        left = heading in ("weights, moments", "recompute")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for one in combinations:
        training = one.training
        seconds = plan.seconds_of(training, one.devices)
        table.add_row(
            str(one.devices), str(one.shards),
            f"{training.weight_precision.value}, {training.moment_precision.value}",
            _checkpointing(training), str(training.batch_size),
            f"{one.memory.total / 1e9:.1f}", f"{seconds * one.devices / 3600:,.0f}", _days(seconds),
        )
    return table


def _scales_table(plans: Sequence[GpuPlan], dollars: float | None) -> Table:
    table = Table(title=f"Plans on {plans[0].gpu.name}", title_justify="left")
    headings = ["scale", "weights,\nmoments", "recompute", "micro-\nbatch", "GB /\nguide", "GPUs",
                "tokens", "step\ns", "GPU\nhours", "days"]
    for heading in [*headings, *(["$"] if dollars is not None else [])]:
        left = heading in ("scale", "weights,\nmoments", "recompute")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for plan in plans:
        training, seconds = plan.training, plan.seconds_of(plan.training, plan.gpus)
        cost = [] if dollars is None else [f"{dollars * plan.gpu_hours:,.0f}"]
        table.add_row(
            training.model_scale.value,
            f"{training.weight_precision.value}, {training.moment_precision.value}",
            _checkpointing(training), f"{training.batch_size}x{training.data.max_seq_length}",
            f"{plan.memory.total / 1e9:.1f} / {plan.model.train_memory_gb}",
            str(plan.gpus) if plan.fits else "none", format_count(plan.tokens),
            f"{plan.step_seconds:.3g}", f"{plan.gpu_hours:,.0f}", _days(seconds), *cost,
        )
    return table


def _notes(plans: Sequence[GpuPlan]) -> Iterator[str]:
    """Yield what the figures rest on, and where a scale's own figure is not met."""
    first = plans[0]
    yield (f"time: an assumed {first.mfu:.0%} of the peak in {first.gpu.source}; what GPUs send to "
           "one another is not counted")
    tokens_from = dict.fromkeys(plan.tokens_from for plan in plans)
    yield f"tokens: {'; '.join(tokens_from)}"
    for plan in plans:
        if not plan.fits:
            yield f"{plan.model.name}: does not fit as it is set; {_cheapest_of(plan)}"
        if plan.over_guide_bytes > 0:
            yield (
                f"{plan.model.name}: on one GPU {plan.over_guide_bytes / 1e9:.1f} GB above the "
                f"{plan.model.train_memory_gb} GB that its scale is meant for; "
                + (f"within them: {plan.within_guide}" if plan.within_guide else
                   "no settings bring it within them")
            )


def _cheapest_of(plan: GpuPlan) -> str:
    if not plan.combinations:
        return "nothing that was tried does"
    one = plan.combinations[0]
    return f"the cheapest that does takes {one.devices} GPUs: {' '.join(one.changes)}"


def _figures(plan: GpuPlan, dollars: float | None) -> dict[str, Any]:
    seconds = plan.seconds_of(plan.training, plan.gpus)
    return {
        "model": plan.model.name,
        "scale": plan.training.model_scale.value,
        "parameters": plan.model.num_parameters(),
        "flops_per_token": plan.flops_per_token,
        "tokens": plan.tokens,
        "tokens_from": plan.tokens_from,
        "gpu": plan.gpu.name,
        "gpu_memory_bytes": plan.gpu.memory_bytes,
        "gpus": plan.gpus,
        "shards": plan.shards,
        "fits": plan.fits,
        **_settings(plan.training),
        "memory_bytes": plan.memory.parts() | {"total": plan.memory.total},
        "guide_memory_gb": plan.model.train_memory_gb,
        "one_gpu_total_bytes": plan.memory_of_one.total,
        "mfu_assumed": plan.mfu,
        "step_seconds": plan.step_seconds,
        "days": seconds / 86400,
        "gpu_hours": plan.gpu_hours,
        "dollars": None if dollars is None else dollars * plan.gpu_hours,
        "fitting": [
            {
                "gpus": one.devices, "shards": one.shards, **_settings(one.training),
                "total_bytes": one.memory.total,
                "gpu_hours": plan.seconds_of(one.training, one.devices) * one.devices / 3600,
                "changes": list(one.changes),
            }
            for one in plan.combinations
        ],
    }


def _settings(training: TrainingConfig) -> dict[str, Any]:
    return {
        "weight_precision": training.weight_precision.value,
        "moment_precision": training.moment_precision.value,
        "gradient_checkpointing": _checkpointing(training),
        "batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
    }
