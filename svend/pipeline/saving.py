"""The checkpoints of a run at work: begun while training goes on, and waited for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from svend.pipeline.checkpoints import Checkpoint
from svend.pipeline.job import Job, Saving
from svend.pipeline.replica import begin_partial_save, sharded_bytes
from svend.pipeline.validation import ValidationResult


def begin_save(
    job: Job, metrics: Mapping[str, float], verdicts: Iterable[ValidationResult] = ()
) -> None:
    """Begin to save the state as it is; `finish_save` ends it.

    verdicts: what was decided on these weights, to be recorded once the checkpoint has its hash.
    """
    # First the metrics: a run resumed from this checkpoint does not train these steps again.
    with job.spending("tracking"):
        job.tracked.keep()
    state, manager, started_seconds = job.state, job.manager, time.perf_counter()
    save = manager.save_in_background if job.plan.saves_in_background else manager.save
    with job.spending("saving"):
        if job.sharded:
            size_bytes = sharded_bytes(job)
            job.call(begin_partial_save, manager.prepare_folder(state.step, size_bytes))
        begun = save(
            None if job.sharded else state.model, None if job.sharded else state.optimizer,
            state.scheduler, state.step, state.stream.epoch, metrics, state.extra_state(),
            state.scaler, partial=job.partial,
        )
    stall_seconds = time.perf_counter() - started_seconds
    job.saving = Saving(begun, state.step, tuple(verdicts), stall_seconds)


def finish_save(job: Job) -> tuple[Checkpoint, tuple[ValidationResult, ...]] | None:
    """Wait for the checkpoint on its way; return it, with the verdicts on it, None if none is."""
    saving, job.saving = job.saving, None
    if saving is None:
        return None
    begun, started_seconds = saving.checkpoint_id, time.perf_counter()
    with job.spending("saving"), job.crew.together():
        checkpoint_id = begun if isinstance(begun, str) else begun.result()
        checkpoint = next(
            c for c in job.manager.list_checkpoints() if c.checkpoint_id == checkpoint_id
        )
    job.saved_step = saving.step
    # What the loop waited for: the copy, and the writing as far as it was not done by now.
    stall_seconds = saving.stall_seconds + time.perf_counter() - started_seconds
    job.tracked.log_metrics({
        "save/stall_seconds": stall_seconds, "save/write_seconds": job.manager.write_seconds,
        "save/bytes": checkpoint.bytes,
    }, saving.step)
    return checkpoint, saving.verdicts


def consolidate(job: Job, checkpoint: Checkpoint) -> Checkpoint:
    """Have the weights in one file, as a version of the registry is; its hash is then theirs.

    What was decided on the parts was decided on these weights.
    """
    whole = job.manager.consolidate(checkpoint)
    if whole.weights_sha256 != checkpoint.weights_sha256:
        rows = job.folder.read_verdicts(checkpoint.weights_sha256)
        job.folder.append_verdict(
            [{**row, "checkpoint_sha256": whole.weights_sha256} for row in rows]
        )
    return whole
