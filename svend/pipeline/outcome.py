"""How a run ended."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svend.errors import Interrupted, TrialPruned, UserError
from svend.pipeline.config import ModelScale
from svend.tracking.registry import RegisteredVersion
from svend.tracking.run import TrackedRun


@dataclass(frozen=True)
class PipelineResult:
    """How a run ended, behind which step. `final_loss` is the held-out loss last measured, or NaN.

    `error` is the user's mistake, the failed gate or the stopped trial that ended it, if one did.
    `interrupted_at_once`: by a second signal, or the end of the grace time; a save that was under
    way is left to itself.
    """

    scale: ModelScale
    success: bool
    final_loss: float
    training_time_seconds: float
    reason: str | None = None
    error: UserError | None = None
    interrupted: bool = False
    interrupted_at_once: bool = False
    steps: int = 0
    run_id: str | None = None
    checkpoint_dir: Path | None = None
    registered: RegisteredVersion | None = None


@dataclass(frozen=True)
class Ending:
    """How a run ends: its status in MLflow, why, and the user's mistake or failed gate, if any.

    unexpected: what ends it is a bug, or for whoever called the run to deal with.
    """

    status: str
    reason: str | None = None
    mistake: UserError | None = None
    unexpected: bool = False

    @classmethod
    def by(cls, error: BaseException, checkpoint_dir: str = "") -> Ending:
        """Return how an error ends a run; a training run's `checkpoint_dir` may be full."""
        if isinstance(error, TrialPruned):
            return cls("FINISHED", str(error), error)
        if isinstance(error, UserError):
            return cls("FAILED", str(error), error)
        if isinstance(error, Interrupted | KeyboardInterrupt):
            unexpected = isinstance(error, KeyboardInterrupt)
            return cls("KILLED", str(error) or "interrupted", unexpected=unexpected)
        if checkpoint_dir and isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return cls("FAILED", f"{error.filename or checkpoint_dir}: the disk is full; make "
                                 "room, and go on with resume=true")
        return cls("FAILED", f"{type(error).__name__}: {error}", unexpected=True)


@contextlib.contextmanager
def ended_as_left(tracked: TrackedRun) -> Iterator[None]:
    """End a run when the context is left: FINISHED, or as the error that leaves it says."""
    ending = Ending("FINISHED")
    try:
        yield
    except BaseException as error:
        ending = Ending.by(error)
        raise
    finally:
        tracked.end(ending.status, ending.reason)
