"""What a run leaves on record: its inputs, its verdicts, and the version it registers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from svend.data.corpus import Corpus
from svend.data.stream import PackedSequences
from svend.pipeline.benchmarking import Evaluation, measured_how
from svend.pipeline.config import PipelineConfig
from svend.pipeline.data_report import data_report_html, source_table
from svend.pipeline.evaluation_report import samples_frame, samples_html
from svend.pipeline.hyperparameters import HYPERPARAMETERS, Carried, Hyperparameters
from svend.pipeline.loading import CONFIG_FILE
from svend.pipeline.report import verdicts_html
from svend.pipeline.schema import flatten, to_tree, to_yaml
from svend.pipeline.tags import NOTE_TAG, SWEEP_TAG
from svend.pipeline.validation import (
    Evidence,
    GateLevel,
    Gates,
    Measurement,
)
from svend.planning.plan import RunPlan
from svend.tracking.environment import environment_tags, installed_packages
from svend.tracking.run import TrackedRun

EVALUATION_ARTIFACTS = "evaluation"


def record_inputs(
    tracked: TrackedRun,
    config: PipelineConfig,
    gates: Gates,
    corpus: Corpus,
    sequences: PackedSequences,
    plan: RunPlan,
    device: str,
) -> None:
    """Log what the run is made of, before its first step."""
    data = config.training.data
    # The gates as they are decided, custom ones and replaced thresholds included.
    tree = to_tree(config) | {"gates": {
        level.value: {
            gate.name: f"{gate.metric_name} {gate.comparison} {gate.threshold:g}"
            for gate in of_level
        }
        for level, of_level in gates.items()
    }}
    # Under a prefix: `mlflow run` has logged its own parameters as they were typed.
    tracked.log_params({f"config.{key}": value for key, value in flatten(tree).items()})
    # In the order in which a run's page shows them.
    tracked.set_tags({
        "svend.scale": config.training.model_scale.value,
        "svend.preset": config.preset,
        "svend.recipe": data.recipe,
        "svend.device": device,
        "svend.data_fingerprint": corpus.fingerprint,
        "svend.tokenizer_sha256": corpus.tokenizer.sha256,
        NOTE_TAG: describe_run(config, plan, corpus),
        **environment_tags(),
    })
    tracked.log_text(to_yaml(config), CONFIG_FILE)
    for name, text in corpus.tokenizer.files().items():
        tracked.log_text(text, name)
    tracked.log_text(installed_packages(), "packages.txt")
    tracked.log_text(data_report_html(corpus, sequences), "data_report.html")
    tracked.log_text(source_table(corpus).to_csv(index=False), "data_report.csv")
    _record_datasets(tracked, corpus, data.path)
    tracked.log_metrics(
        {
            "plan/parameters": plan.parameters,
            "plan/tokens": plan.tokens,
            "plan/flops": plan.flops,
            "plan/peak_memory_gb": plan.memory.total / 1e9,
            "plan/seconds": plan.seconds,
            "plan/matmul_peak_flops_per_second": plan.peak_flops,
            **{f"data/leaked_documents/{count.source}": count.leaked_documents
               for count in corpus.counts},
        },
        0,
    )
    tracked.flush()


def _record_datasets(tracked: TrackedRun, corpus: Corpus, path: str | None) -> None:
    """Log each source's parts, with their sizes, where MLflow shows a run's data."""
    for count in corpus.counts:
        place = str(count.identity.get("repository") or path or "made on the spot")
        for context, documents, tokens in (
            ("train", count.train_documents, count.train_tokens),
            ("heldout", count.heldout_documents, count.heldout_tokens),
        ):
            tags = {"documents": str(documents), "tokens": str(tokens), "kind": count.kind,
                    "fingerprint": corpus.fingerprint}
            # MLflow keeps one context for each name and digest: the parts need their own.
            digest = hashlib.sha256(f"{corpus.fingerprint}:{context}".encode()).hexdigest()
            tracked.log_dataset(count.source, digest, context, place, tags)


def record_hyperparameters(
    tracked: TrackedRun, found: Hyperparameters | None, carried: Sequence[Carried]
) -> None:
    """Log which sweep the run's hyperparameters are from, if any, and what became of them."""
    if found is None:
        return
    tracked.log_params({
        f"hparams.{row.key}": f"{row.found} -> {row.here} ({row.why})" for row in carried
    })
    tracked.set_tags({
        "svend.hparams.study": found.study, SWEEP_TAG: found.sweep_run_id,
        "svend.hparams.data_fingerprint": found.data_fingerprint,
    })
    tracked.log_text(found.to_yaml(), HYPERPARAMETERS)


def describe_run(config: PipelineConfig, plan: RunPlan, corpus: Corpus) -> str:
    """Return what a run is to do, as Markdown for its page."""
    data = config.training.data
    assert config.model is not None  # set by PipelineConfig.resolve
    return (
        f"**{config.model.name}** ({plan.parameters:,} parameters), preset {config.preset}, "
        f"on {data.recipe}: {', '.join(data.sources)} ({data.purpose}).\n\n"
        f"{plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens; "
        f"data fingerprint `{corpus.fingerprint[:16]}`."
    )


def describe_end(
    step: int, heldout_loss: float, rows: Sequence[dict[str, Any]], version: str | None
) -> str:
    """Return how a run ended, as Markdown for its page.

    rows: the verdicts on its best checkpoint. version: its name and number in the registry.
    """
    passed: dict[str, list[str]] = {}
    for row in rows:
        failed = passed.setdefault(row["level"], [])
        if row["required"] and not row["passed"]:
            failed.append(str(row["gate"]))
    levels = "; ".join(
        f"**{level}** not passed ({', '.join(failed)})" if failed else f"**{level}** passed"
        for level, failed in passed.items()
    )
    registered = "in no registry" if version is None else f"registered as {version}"
    return (
        f"The best checkpoint is of step {step:,}, with a held-out loss of {heldout_loss:.4f}: "
        f"{levels}; {registered}.\n\nUnder Artifacts: `verdicts.html`, every verdict; "
        f"`{EVALUATION_ARTIFACTS}/`, every sample of the benchmarks; `data_report.html`, what was "
        "trained on; `config.yaml`, to do it again."
    )


def record_verdicts(tracked: TrackedRun, rows: Sequence[dict[str, Any]]) -> None:
    """Log verdicts as a page for people and as a table for programs."""
    tracked.log_text(pd.DataFrame(rows).to_csv(index=False), "verdicts.csv")
    tracked.log_text(verdicts_html(rows), "verdicts.html")


def record_evaluation(tracked: TrackedRun, evaluation: Evaluation, step: int) -> None:
    """Log what benchmarks measured, with its bounds, and every sample as table and page."""
    metrics: dict[str, float] = {"eval/seconds": evaluation.seconds}
    for metric, measured in evaluation.measurements.items():
        metrics[f"eval/{metric}"] = measured.value
        if measured.interval is not None and all(map(math.isfinite, measured.interval)):
            metrics[f"eval/{metric}/low_95"], metrics[f"eval/{metric}/high_95"] = measured.interval
        if measured.sample_size is not None:
            metrics[f"eval/{metric}/n"] = measured.sample_size
    tracked.log_metrics(metrics, step)
    for result in evaluation.results:
        place = f"{EVALUATION_ARTIFACTS}/step_{step:08d}/{result.benchmark.name}"
        tracked.log_table(samples_frame(result), f"{place}.json")
        tracked.log_text(samples_html(result), f"{place}.html")


def passed_levels(gates: Gates, rows: Sequence[dict[str, Any]]) -> list[GateLevel]:
    """Return the levels whose required gates all have a passing row, up to the first without.

    The last row of a gate counts: a checkpoint may have been decided on again.
    """
    last = {(row["level"], row["gate"]): row for row in rows}
    passed = []
    for level, of_level in gates.items():
        required = [gate.name for gate in of_level if gate.required]
        if not all(last.get((level.value, name), {}).get("passed") for name in required):
            break
        passed.append(level)
    return passed


def undecided(gates: Gates, rows: list[dict[str, Any]], levels: tuple[GateLevel, ...]) -> bool:
    """Return whether a gate of these levels, required or not, has no row."""
    decided = {(row["level"], row["gate"]) for row in rows}
    return any(
        (level.value, gate.name) not in decided for level in levels for gate in gates[level]
    )


def measurement_rows(
    measurements: Mapping[str, Measurement], config: PipelineConfig, evidence: Evidence,
) -> list[dict[str, Any]]:
    """Return measurements as records of their own, in the form of a verdict's rows."""
    confidence = config.gates.confidence
    rows = []
    for metric, measured in measurements.items():
        low, high = measured.interval or (None, None)
        bounds = None if confidence is None else measured.interval_at(2 * confidence - 1)
        low_bound, high_bound = bounds or (None, None)
        rows.append({
            "metric": metric, "value": measured.value, "low_95": low, "high_95": high,
            "low_bound": low_bound, "high_bound": high_bound, "confidence": confidence,
            "sample_size": measured.sample_size, "settings": measured_how(metric, config),
            **dataclasses.asdict(evidence),
            "data_fingerprint": measured.data_fingerprint or evidence.data_fingerprint,
        })
    return rows
