"""The horizons of a run: what it would have reached, had its learning rate decayed earlier.

Where a horizon's decay begins, the run saves a checkpoint, decays from there to the horizon, is
measured, and goes back to the checkpoint: as if it had not been away. So one run gives a point of
the scaling law for each horizon (as OLMo-core's ladder does), for the price of the decays alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from svend.pipeline.config import Branch
from svend.pipeline.job import Job
from svend.pipeline.replica import end_stage, load_state, measure_heldout, stage_steps
from svend.training.state import Horizon


def find_branch(job: Job) -> Branch | None:
    """Return the branch that leaves the run at this step, or should have; None if none does."""
    measured = {horizon.step for horizon in job.state.horizons}
    for branch in job.config.training.branches(job.plan.total_steps):
        if branch.start <= job.state.step < branch.end and branch.end not in measured:
            return branch
    return None


def follow_branch(job: Job, branch: Branch, is_stopped: Callable[[], bool]) -> Horizon | None:
    """Decay to the branch's end, measure, and go back to the checkpoint just saved.

    Returns the horizon, which is in the run's state and in its record; None, and neither, where
    `is_stopped` became true on the way.
    """
    started_seconds = time.perf_counter()
    horizon = None
    for _ in stage_steps(job, branch.end, decays_to=branch.end):
        if is_stopped():
            job.call(end_stage)
            break
    else:
        horizon = horizon_at(job, branch.end, job.call(measure_heldout).loss)
    job.call(load_state, job.manager.find_latest().path)
    if horizon is not None:
        job.state.horizons.append(horizon)
        record_horizon(job, horizon)
        job.tracked.log_metrics(
            {"horizon/seconds": time.perf_counter() - started_seconds}, horizon.step
        )
    return horizon


def horizon_at(job: Job, step: int, loss: float) -> Horizon:
    """Return the point of the scaling law that a loss behind so many steps is."""
    return Horizon(step, step * job.plan.tokens_per_step, loss)


def record_horizon(job: Job, horizon: Horizon) -> None:
    """Log a point of the scaling law."""
    job.tracked.log_metrics(
        {
            "horizon/heldout_loss": horizon.loss,
            "horizon/tokens": horizon.tokens,
            "horizon/flops": float(horizon.tokens) * job.plan.flops_per_token,
        },
        horizon.step,
    )
