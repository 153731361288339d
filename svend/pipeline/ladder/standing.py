"""Where a ladder stands: every attempt at every rung, in a file that is whole at any instant."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from svend.errors import UserError
from svend.pipeline.config import ModelScale
from svend.pipeline.folder_lock import FolderLock
from svend.pipeline.ladder.trend import Trend
from svend.pipeline.schema import to_tree
from svend.pipeline.whole_files import write_whole
from svend.planning.scaling_law import Point
from svend.training.state import Horizon

LADDER_FILE = "ladder.json"
LADDERS = "ladders"
SAME_SHARE = 0.02


class State(Enum):
    """How far an attempt at a rung has come."""

    RUNNING = "running"  # or killed, and to be gone on with
    PASSED = "passed"
    FAILED = "failed"


@dataclass(frozen=True)
class FrozenPrediction:
    """The loss that was predicted before the rung's first step, and from what."""

    loss: float
    low: float
    high: float
    law: str
    rungs: list[str]
    points: int
    hold_above: float
    stop_above: float
    investigate_below: float


@dataclass(frozen=True)
class Override:
    """Who let the ladder go on above a rung that had failed, when, and why."""

    by: str
    at: str
    reason: str


@dataclass(frozen=True)
class Look:
    """What the horizon at a step lets expect of the end, against the prediction."""

    step: int
    expected: float
    error: float


@dataclass
class Attempt:
    """A rung's run. horizons: what was measured, the run's end included.

    predicted: None where there was too little to predict from, as `unpredicted` says. looks: at
    each horizon but the end. error: of the end's loss against the prediction; the mean over seeds.
    """

    scale: ModelScale
    number: int
    seed: int
    model: str
    parameters: float
    state: State = State.RUNNING
    run_id: str | None = None
    folder: str | None = None
    steps: int = 0
    total_steps: int = 0
    data_fingerprint: str = ""
    tokenizer_sha256: str = ""
    horizons: list[Horizon] = field(default_factory=list)
    predicted: FrozenPrediction | None = None
    unpredicted: str = ""
    looks: list[Look] = field(default_factory=list)
    slope_bound: float | None = None
    error: float | None = None
    trend: Trend = Trend.UNPREDICTED
    reason: str = ""
    version: str | None = None
    stressed: bool = False
    seconds: float = 0.0
    override: Override | None = None

    @property
    def may_go_on(self) -> bool:
        """Whether the rung above may begin."""
        return self.state is State.PASSED or self.override is not None

    @property
    def loss(self) -> float | None:
        """The loss at the end, if the run came to it."""
        return self.loss_at(1.0)

    def loss_at(self, share: float) -> float | None:
        """Return the loss at the horizon that is such a share of the run; None if not measured.

        Rungs of other lengths round a horizon to other steps.
        """
        near = [h.loss for h in self.horizons
                if abs(h.step / self.total_steps - share) < SAME_SHARE]
        return near[0] if near else None

    def points(self) -> list[Point]:
        """Return what the scaling law is fitted on."""
        return [Point(self.parameters, h.tokens, h.loss, self.scale.value) for h in self.horizons]


@dataclass
class Standing:
    """A ladder's file. Whoever changes it holds the folder's lock, and saves."""

    name: str
    path: Path
    run_id: str = ""
    experiment: str = ""
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Standing:
        """Read what a folder tells. Raises UserError if it is no ladder's, or damaged."""
        try:
            told = json.loads((path / LADDER_FILE).read_text(encoding="utf-8"))
            attempts = [_attempt(entry) for entry in told["attempts"]]
            return cls(str(told["name"]), path, str(told["run_id"]), str(told["experiment"]),
                       attempts)
        except FileNotFoundError:
            raise UserError(f"{path}: there is no ladder; see `svend ladder --help`") from None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path / LADDER_FILE}: damaged ({error}); restore it, or move the folder away"
            ) from None

    def save(self) -> None:
        """Write the file, whole, to the disk."""
        write_whole(self.path / LADDER_FILE, json.dumps(self._tree(), indent=1))

    def record(self) -> dict[str, Any]:
        """Return what the file holds, with the loss that each attempt ended at, in nats."""
        told = self._tree()
        for attempt, of_attempt in zip(self.attempts, told["attempts"], strict=True):
            of_attempt["loss_nats"] = attempt.loss
        return told

    def _tree(self) -> dict[str, Any]:
        return {"name": self.name, "run_id": self.run_id, "experiment": self.experiment,
                "attempts": [to_tree(attempt) for attempt in self.attempts]}

    def lock(self) -> FolderLock:
        return FolderLock(self.path, "ladder")

    def newest(self, scale: ModelScale) -> Attempt | None:
        """Return the last attempt at a rung, None if there was none."""
        return next((a for a in reversed(self.attempts) if a.scale is scale), None)

    def climbed(self) -> list[Attempt]:
        """Return the attempts that the rungs above may rest on, from the lowest."""
        newest = [self.newest(scale) for scale in ModelScale]
        return [attempt for attempt in newest if attempt is not None and attempt.may_go_on]


def ladder_folder(checkpoint_dir: str, name: str) -> Path:
    """Return where a ladder of that name is kept. Raises UserError for what is no name."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UserError(f"name = {name}: must be one that a folder can have")
    return Path(checkpoint_dir).expanduser() / LADDERS / name


def _attempt(told: dict[str, Any]) -> Attempt:
    predicted, override = told["predicted"], told["override"]
    return Attempt(**{
        **told,
        "scale": ModelScale(told["scale"]),
        "state": State(told["state"]),
        "trend": Trend(told["trend"]),
        "horizons": [Horizon(**horizon) for horizon in told["horizons"]],
        "looks": [Look(**look) for look in told["looks"]],
        "predicted": None if predicted is None else FrozenPrediction(**predicted),
        "override": None if override is None else Override(**override),
    })
