"""What a run leaves on record: its inputs, its verdicts, and the version it registers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from svend import __version__
from svend.data.corpus import Corpus
from svend.data.stream import PackedSequences
from svend.pipeline.benchmarking import Evaluation, measured_how
from svend.pipeline.checkpoint_files import METADATA, MODEL, Checkpoint, verify
from svend.pipeline.config import PipelineConfig
from svend.pipeline.data_report import data_report_html, source_table
from svend.pipeline.evaluation_report import samples_frame, samples_html
from svend.pipeline.hyperparameters import HYPERPARAMETERS, Carried, Hyperparameters
from svend.pipeline.moves import Move, MoveKind, Moves, Registration, verdict_tags
from svend.pipeline.report import verdicts_html
from svend.pipeline.run_folder import CONFIG_FILE, RunFolder
from svend.pipeline.schema import flatten, to_tree, to_yaml
from svend.pipeline.validation import (
    Evidence,
    GateLevel,
    Gates,
    Measurement,
    PipelineValidator,
)
from svend.pipeline.version_files import WEIGHTS, write_weights
from svend.planning.plan import RunPlan
from svend.tracking.environment import environment_tags, installed_packages
from svend.tracking.registry import (
    CHECKPOINT_TAG,
    RegisteredVersion,
    find_version,
    register_checkpoint,
)
from svend.tracking.run import TrackedRun
from svend.tracking.runs import tags_of

EVALUATION_ARTIFACTS = "evaluation"
# Begins a folder in the run's, there while its weights are written for the registry.
REGISTERING = ".registering-"


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
    tracked.set_tags({
        **environment_tags(),
        "svend.scale": config.training.model_scale.value,
        "svend.preset": config.preset,
        "svend.recipe": data.recipe,
        "svend.device": device,
        "svend.data_fingerprint": corpus.fingerprint,
        "svend.tokenizer_sha256": corpus.tokenizer.sha256,
        "mlflow.note.content": _describe(config, plan, corpus),
    })
    tracked.log_text(to_yaml(config), "config.yaml")
    for name, text in corpus.tokenizer.files().items():
        tracked.log_text(text, name)
    tracked.log_text(installed_packages(), "packages.txt")
    tracked.log_text(data_report_html(corpus, sequences), "data_report.html")
    tracked.log_text(source_table(corpus).to_csv(index=False), "data_report.csv")
    for count in corpus.counts:
        for context, documents, tokens in (
            ("train", count.train_documents, count.train_tokens),
            ("heldout", count.heldout_documents, count.heldout_tokens),
        ):
            tags = {"documents": str(documents), "tokens": str(tokens), "kind": count.kind,
                    "fingerprint": corpus.fingerprint}
            place = str(count.identity.get("repository") or data.path or "made on the spot")
            # MLflow keeps one context for each name and digest: the parts need their own.
            digest = hashlib.sha256(f"{corpus.fingerprint}:{context}".encode()).hexdigest()
            tracked.log_dataset(count.source, digest, context, place, tags)
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
        "svend.hparams.study": found.study, "svend.hparams.run_id": found.sweep_run_id,
        "svend.hparams.data_fingerprint": found.data_fingerprint,
    })
    tracked.log_text(found.to_yaml(), HYPERPARAMETERS)


def _describe(config: PipelineConfig, plan: RunPlan, corpus: Corpus) -> str:
    """A description for the run's page."""
    data = config.training.data
    assert config.model is not None  # set by PipelineConfig.resolve
    return (
        f"**{config.model.name}** ({plan.parameters:,} parameters), preset {config.preset}, "
        f"on {data.recipe}: {', '.join(data.sources)} ({data.purpose}).\n\n"
        f"{plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens; "
        f"data fingerprint `{corpus.fingerprint[:16]}`."
    )


def record_verdicts(tracked: TrackedRun, folder: RunFolder) -> None:
    """Log every verdict so far, as a page for people and as a table for programs."""
    rows = folder.read_verdicts()
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


def passed_levels(gates: Gates, rows: list[dict[str, Any]]) -> list[GateLevel]:
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


def register_version(
    tracked: TrackedRun,
    folder: RunFolder,
    config: PipelineConfig,
    model_name: str,
    corpus: Corpus,
    checkpoint: Checkpoint,
    validator: PipelineValidator,
    rows: list[dict[str, Any]],
    measured: Sequence[dict[str, Any]] = (),
) -> RegisteredVersion:
    """Register a checkpoint as `model_name`, and move it up the levels that `rows` pass.

    `rows` are the gate decisions on this very checkpoint, `measured` what else was measured on it.
    PRODUCTION is left to `svend promote`: no run takes a model there by itself.
    """
    for left_behind in folder.path.glob(f"{REGISTERING}*"):  # by a process that was killed here
        shutil.rmtree(left_behind)
    corpus.tokenizer.save(folder.path)
    verify(checkpoint)
    levels = [level for level in passed_levels(validator.gates, rows)
              if level is not GateLevel.PRODUCTION]
    moves = Moves.open(
        model_name,
        f"{model_name}, trained by Svend at scale {config.training.model_scale.value}. The aliases "
        "quick, standard, full and production are the gate levels that a version has passed; "
        f"`svend history {model_name}` says by what verdict.",
    )
    tags = {
        "svend.run_id": tracked.run_id,
        "svend.version": __version__,
        CHECKPOINT_TAG: checkpoint.weights_sha256,
        "svend.data_fingerprint": corpus.fingerprint,
        "svend.tokenizer_sha256": corpus.tokenizer.sha256,
        "svend.step": str(checkpoint.step),
        "svend.stage": "none",
        **verdict_tags(rows),
    }
    note = _lineage_note(tracked, config, corpus, checkpoint)
    registered = _registered_before(moves, tracked.run_id, checkpoint)
    if registered is None:
        registered = find_version(
            model_name, tracked.run_id, checkpoint.weights_sha256
        ) or _register_files(
            tracked, folder, config, model_name, corpus, checkpoint, tags, note
        )
        registration = Registration(
            checkpoint_sha256=checkpoint.weights_sha256, data_fingerprint=corpus.fingerprint,
            tokenizer_sha256=corpus.tokenizer.sha256, step=checkpoint.step, files=registered.files,
            note=note,
        )
        moves.add(Move(kind=MoveKind.REGISTERED, version=registered.version,
                       run_id=tracked.run_id, registration=registration))
    if measured:
        moves.keep_rows(measured)
    told = [{**row, "settings": measured_how(row["metric"], config)} for row in rows]
    history = moves.history()
    for level in levels:
        if history.passed(registered.version, level) is None:
            verdict = moves.keep_verdict(level, validator.gates[level], validator.confidence,
                                         _last_rows(told, level))
            moves.add(Move(kind=MoveKind.PROMOTED, version=registered.version, level=level,
                           verdict=verdict, run_id=tracked.run_id,
                           reason="decided by the run that trained it"))
    moves.carry_out()  # what a process that was killed here had put on record
    return replace(registered, aliases=[level.value for level in levels])


def _registered_before(
    moves: Moves, run_id: str, checkpoint: Checkpoint
) -> RegisteredVersion | None:
    """Return the version that a run registered of a checkpoint before it was killed, if it did."""
    for move in moves.history().moves:
        registration = move.registration
        if (registration is not None and move.run_id == run_id
                and registration.checkpoint_sha256 == checkpoint.weights_sha256):
            return RegisteredVersion(moves.model, move.version, registration.files)
    return None


def _register_files(
    tracked: TrackedRun,
    folder: RunFolder,
    config: PipelineConfig,
    model_name: str,
    corpus: Corpus,
    checkpoint: Checkpoint,
    tags: Mapping[str, str],
    note: str,
) -> RegisteredVersion:
    """Make a new version of the model of a checkpoint's weights and what belongs to them."""
    # On the disk of the run, so that the version can have the file as a hard link.
    with tempfile.TemporaryDirectory(dir=folder.path, prefix=REGISTERING) as place:
        weights = Path(place) / WEIGHTS
        write_weights(checkpoint.path / MODEL, weights)
        return register_checkpoint(
            model_name,
            [weights, checkpoint.path / METADATA, folder.path / CONFIG_FILE,
             *(folder.path / name for name in corpus.tokenizer.files())],
            tracked.run_id,
            checkpoint.step,
            {"scale": config.training.model_scale.value, "step": str(checkpoint.step),
             "sha256": checkpoint.weights_sha256},
            tags,
            note,
        )


def _lineage_note(
    tracked: TrackedRun, config: PipelineConfig, corpus: Corpus, checkpoint: Checkpoint
) -> str:
    """Return what made a version, for its page in MLflow."""
    tags = tags_of(tracked.run_id)
    dirty = " with uncommitted changes" if tags.get("svend.git_dirty") == "true" else ""
    loss = checkpoint.metrics["loss"]
    facts = {
        "weights": f"step {checkpoint.step}, held-out loss {loss:.4f}, checkpoint "
                   f"`{checkpoint.weights_sha256[:16]}`",
        "run": f"`{tracked.run_id}`, with config.yaml, verdicts.html and the evaluations below it",
        "commit": f"`{tags.get('svend.git_commit', 'none')}`{dirty}, Svend {__version__}",
        "data": f"{config.training.data.recipe}, fingerprint `{corpus.fingerprint[:16]}`, "
                f"tokenizer `{corpus.tokenizer.sha256[:16]}`",
        "run of the scale below": f"`{tags.get('svend.parent_scale_run_id', 'none')}`",
        "sweep": f"`{tags.get('svend.hparams.run_id', 'none')}`",
        "begun with": tags.get("svend.init_from", "weights drawn from the seed"),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


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


def _last_rows(rows: Sequence[dict[str, Any]], level: GateLevel) -> list[dict[str, Any]]:
    """Return the last decision of each of a level's gates."""
    return list({row["gate"]: row for row in rows if row["level"] == level.value}.values())
