"""Ladders with a planted fault, and healthy ones: what is caught, by what, at which cost.

A fault is planted into a rung's state just before its first step: the pipeline does not know of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from svend.data.stream import Batch, BatchStream, PackedSequences
from svend.errors import UserError
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import ModelScale, PipelineConfig
from svend.pipeline.job import Job
from svend.pipeline.ladder.climb import LadderClimb
from svend.pipeline.ladder.options import Ladder
from svend.pipeline.ladder.rung import RungRun
from svend.pipeline.ladder.standing import Attempt, Standing, State, ladder_folder

RESULTS = "faults.jsonl"
Plant = Callable[[Job], None]
RATE_FACTOR = 4.0
SHUFFLED_SHARE = 0.25
FROZEN_BLOCK = 0
LEAKED_ROWS = 2  # of each micro-batch
SLOW_WARM_UP = 1.0  # of the run


@dataclass(frozen=True)
class Outcome:
    """How a ladder ended. share: of the steps of the rung it ended at that were spent by then.

    planted_at: the rung with the fault, "" for none. caught_by: why it was stopped, or "".
    """

    fault: str
    seed: int
    planted_at: str
    rungs: dict[str, dict[str, Any]]
    ended_at: str
    caught_by: str
    share: float


class _Stream(Iterator[Batch]):
    """A stream whose batches are changed on their way."""

    def __init__(self, stream: BatchStream, change: Callable[[Batch], Batch]) -> None:
        self._stream = stream
        self._change = change

    def __next__(self) -> Batch:
        return self._change(next(self._stream))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def raise_rate(job: Job) -> None:
    """Train at four times the learning rate."""
    scheduler = job.state.scheduler
    scheduler.base_lrs = [RATE_FACTOR * rate for rate in scheduler.base_lrs]
    for group in job.state.optimizer.param_groups:
        group["lr"] *= RATE_FACTOR
        group["initial_lr"] *= RATE_FACTOR


def shuffle_labels(job: Job) -> None:
    """Give a quarter of the positions the label of another."""
    generator = torch.Generator().manual_seed(0)

    def change(batch: Batch) -> Batch:
        labels = batch.labels_BT.flatten().clone()
        told = (labels >= 0).nonzero().squeeze(1)
        chosen = told[torch.rand(len(told), generator=generator) < SHUFFLED_SHARE]
        order = torch.randperm(len(chosen), generator=generator)
        labels[chosen] = labels[chosen[order]]
        return replace(batch, labels_BT=labels.view_as(batch.labels_BT))

    job.state.stream = _Stream(job.state.stream, change)  # type: ignore[assignment]


def freeze_layer(job: Job) -> None:
    """Leave a block as it was drawn."""
    assert isinstance(job.state.model, ReasoningTransformer)
    for parameter in job.state.model.blocks[FROZEN_BLOCK].parameters():
        parameter.requires_grad_(False)


def leak_heldout(job: Job) -> None:
    """Put sequences that the loss is measured on among those that are trained on."""
    heldout: PackedSequences = job.heldout
    count = job.config.training.heldout_sequences
    taken = 0

    def change(batch: Batch) -> Batch:
        nonlocal taken
        leaked = heldout.batch(taken % (count - LEAKED_ROWS), LEAKED_ROWS)
        taken += LEAKED_ROWS
        rows = slice(0, LEAKED_ROWS)
        changed = {name: getattr(batch, name).clone()
                   for name in ("tokens_BT", "labels_BT", "documents_BT")}
        for name, tensor in changed.items():
            tensor[rows] = getattr(leaked, name)
        return replace(batch, **changed)

    job.state.stream = _Stream(job.state.stream, change)  # type: ignore[assignment]


def break_warm_up(job: Job) -> None:
    """Let the warm-up last for the whole run."""
    scheduler, last = job.state.scheduler, SLOW_WARM_UP * job.plan.total_steps
    own = scheduler.lr_lambdas[0]

    def factor(step: int) -> float:
        return min(own(step), (step + 1) / last) if step > 0 else 1 / last

    scheduler.lr_lambdas = [factor] * len(scheduler.lr_lambdas)
    for group, base in zip(job.state.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = base * factor(0)


FAULTS: Mapping[str, Plant] = {
    "rate": raise_rate, "labels": shuffle_labels, "frozen": freeze_layer, "leak": leak_heldout,
    "warm-up": break_warm_up,
}


@dataclass(kw_only=True)
class _FaultyRung(RungRun):
    """A rung whose state has a fault from before its first step on."""

    plant: Plant

    def prepared(self, job: Job) -> None:
        super().prepared(job)
        self.plant(job)


class FaultyClimb(LadderClimb):
    """A climb whose rung of one scale has a fault."""

    def __init__(self, ladder: Ladder, name: str, folder: Path, scale: ModelScale,
                 plant: Plant) -> None:
        super().__init__(ladder, name, folder)
        self._scale = scale
        self._plant = plant

    def _rung_run(
        self, attempt: Attempt, history: Sequence[Attempt], config: PipelineConfig
    ) -> RungRun:
        rung = super()._rung_run(attempt, history, config)
        if attempt.scale is not self._scale:
            return rung
        return _FaultyRung(**vars(rung), plant=self._plant)


def climb_with(ladder: Ladder, fault: str, seed: int) -> Outcome:
    """Climb a ladder with a fault in its last rung, or with none, and return how it ended."""
    last = ladder.scales[-1]
    name, planted_at = f"{fault}-{seed}", "" if fault == "none" else last.value
    folder = ladder_folder(ladder.rungs[last].checkpoint_dir, name)
    climb = (LadderClimb(ladder, name, folder) if fault == "none"
             else FaultyClimb(ladder, name, folder, last, FAULTS[fault]))
    try:
        climb.go()
    except UserError as error:
        return Outcome(fault, seed, planted_at, {}, "", f"error: {error}", 0.0)
    return _outcome(Standing.open(folder), fault, seed, planted_at)


def _outcome(standing: Standing, fault: str, seed: int, planted_at: str) -> Outcome:
    ended = standing.attempts[-1]
    rungs = {
        f"{attempt.scale.value}-{attempt.number}": {
            "loss": attempt.loss, "predicted": attempt.predicted and attempt.predicted.loss,
            "error": attempt.error, "trend": attempt.trend.value, "state": attempt.state.value,
            "looks": [look.error for look in attempt.looks], "seconds": attempt.seconds,
            "horizons": [asdict(horizon) for horizon in attempt.horizons],
            "parameters": attempt.parameters, "total_steps": attempt.total_steps,
            "reason": attempt.reason,
        }
        for attempt in standing.attempts
    }
    caught = ended.state is not State.PASSED
    share = ended.steps / ended.total_steps if ended.total_steps else 0.0
    reason = ended.reason if caught else ""
    return Outcome(fault, seed, planted_at, rungs, ended.scale.value, reason, share)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Append an outcome to the folder's results."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RESULTS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(outcome)) + "\n")


def read_outcomes(folder: Path) -> Sequence[Outcome]:
    """Return the outcomes so far; the last one of a case counts."""
    path = folder / RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    return list({(outcome.fault, outcome.seed): outcome for outcome in outcomes}.values())
