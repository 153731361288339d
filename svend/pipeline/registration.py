"""A run's best checkpoint in the registry, with the levels that it passed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svend import __version__
from svend.pipeline.benchmarking import measured_how
from svend.pipeline.checkpoints.files import verify
from svend.pipeline.checkpoints.metadata import METADATA, MODEL, Checkpoint
from svend.pipeline.job import Job
from svend.pipeline.loading import CONFIG_FILE
from svend.pipeline.moves import Move, MoveKind, Moves, Registration, verdict_tags
from svend.pipeline.record import passed_levels
from svend.pipeline.tags import PARENT_SCALE_TAG, SWEEP_TAG
from svend.pipeline.validation import GateLevel, PipelineValidator
from svend.pipeline.version_files import WEIGHTS, write_weights
from svend.tracking.registry import (
    CHECKPOINT_TAG,
    RegisteredVersion,
    find_version,
    register_checkpoint,
)
from svend.tracking.runs import tags_of

# Begins a folder in the run's, there while its weights are written for the registry.
REGISTERING = ".registering-"


def register_version(
    job: Job, checkpoint: Checkpoint, validator: PipelineValidator,
    rows: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]] = (),
) -> RegisteredVersion:
    """Register a checkpoint of a run, and move it up the levels that `rows` pass.

    `rows` are the gate decisions on this very checkpoint, `measured` what else was measured on it.
    PRODUCTION is left to `svend promote`: no run takes a model there by itself.
    """
    for left_behind in job.folder.path.glob(f"{REGISTERING}*"):  # by a process that was killed here
        shutil.rmtree(left_behind)
    job.corpus.tokenizer.save(job.folder.path)
    verify(checkpoint)
    moves = Moves.open(
        job.model_name,
        f"{job.model_name}, trained by Svend at scale {job.config.training.model_scale.value}. The "
        "aliases quick, standard, full and production are the gate levels that a version has "
        f"passed; `svend history {job.model_name}` says by what verdict.",
    )
    registered = _find_registered(moves, job, checkpoint) or _register(moves, job, checkpoint, rows)
    if measured:
        moves.keep_rows(measured)
    told = [{**row, "settings": measured_how(row["metric"], job.config)} for row in rows]
    levels = [level for level in passed_levels(validator.gates, rows)
              if level is not GateLevel.PRODUCTION]
    history = moves.history()
    for level in levels:
        if history.passed(registered.version, level) is None:
            verdict = moves.keep_verdict(level, validator.gates[level], validator.confidence,
                                         _last_rows(told, level))
            moves.add(Move(kind=MoveKind.PROMOTED, version=registered.version, level=level,
                           verdict=verdict, run_id=job.tracked.run_id,
                           reason="decided by the run that trained it"))
    moves.carry_out()  # what a process that was killed here had put on record
    return replace(registered, aliases=[level.value for level in levels])


def _find_registered(moves: Moves, job: Job, checkpoint: Checkpoint) -> RegisteredVersion | None:
    """Return the version that the run registered of a checkpoint before it was killed, if it did.
    """
    for move in moves.history().moves:
        registration = move.registration
        if (registration is not None and move.run_id == job.tracked.run_id
                and registration.checkpoint_sha256 == checkpoint.weights_sha256):
            return RegisteredVersion(moves.model, move.version, registration.files)
    return None


def _register(
    moves: Moves, job: Job, checkpoint: Checkpoint, rows: Sequence[dict[str, Any]]
) -> RegisteredVersion:
    """Make a new version of a checkpoint, or take one that a killed process made; record it."""
    corpus, note = job.corpus, _lineage_note(job, checkpoint)
    registered = find_version(
        job.model_name, job.tracked.run_id, checkpoint.weights_sha256
    ) or _register_files(job, checkpoint, {
        "svend.run_id": job.tracked.run_id,
        "svend.version": __version__,
        CHECKPOINT_TAG: checkpoint.weights_sha256,
        "svend.data_fingerprint": corpus.fingerprint,
        "svend.tokenizer_sha256": corpus.tokenizer.sha256,
        "svend.step": str(checkpoint.step),
        "svend.stage": "none",
        **verdict_tags(rows),
    }, note)
    moves.add(Move(
        kind=MoveKind.REGISTERED, version=registered.version, run_id=job.tracked.run_id,
        registration=Registration(
            checkpoint_sha256=checkpoint.weights_sha256, data_fingerprint=corpus.fingerprint,
            tokenizer_sha256=corpus.tokenizer.sha256, step=checkpoint.step, files=registered.files,
            note=note,
        ),
    ))
    return registered


def _register_files(
    job: Job, checkpoint: Checkpoint, tags: Mapping[str, str], note: str
) -> RegisteredVersion:
    """Make a new version of the model of a checkpoint's weights and what belongs to them."""
    folder = job.folder.path
    # On the disk of the run, so that the version can have the file as a hard link.
    with tempfile.TemporaryDirectory(dir=folder, prefix=REGISTERING) as place:
        weights = Path(place) / WEIGHTS
        write_weights(checkpoint.path / MODEL, weights)
        return register_checkpoint(
            job.model_name,
            [weights, checkpoint.path / METADATA, folder / CONFIG_FILE,
             *(folder / name for name in job.corpus.tokenizer.files())],
            job.tracked.run_id,
            checkpoint.step,
            {"scale": job.config.training.model_scale.value, "step": str(checkpoint.step),
             "sha256": checkpoint.weights_sha256},
            tags,
            note,
        )


def _lineage_note(job: Job, checkpoint: Checkpoint) -> str:
    """Return what made a version, for its page in MLflow."""
    corpus, run_id = job.corpus, job.tracked.run_id
    tags = tags_of(run_id)
    dirty = " with uncommitted changes" if tags.get("svend.git_dirty") == "true" else ""
    loss = checkpoint.metrics["loss"]
    facts = {
        "weights": f"step {checkpoint.step}, held-out loss {loss:.4f}, checkpoint "
                   f"`{checkpoint.weights_sha256[:16]}`",
        "run": f"`{run_id}`, with config.yaml, verdicts.html and the evaluations below it",
        "commit": f"`{tags.get('svend.git_commit', 'none')}`{dirty}, Svend {__version__}",
        "data": f"{job.config.training.data.recipe}, fingerprint `{corpus.fingerprint[:16]}`, "
                f"tokenizer `{corpus.tokenizer.sha256[:16]}`",
        "run of the scale below": f"`{tags.get(PARENT_SCALE_TAG, 'none')}`",
        "sweep": f"`{tags.get(SWEEP_TAG, 'none')}`",
        "begun with": tags.get("svend.init_from", "weights drawn from the seed"),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _last_rows(rows: Sequence[dict[str, Any]], level: GateLevel) -> list[dict[str, Any]]:
    """Return the last decision of each of a level's gates."""
    return list({row["gate"]: row for row in rows if row["level"] == level.value}.values())
