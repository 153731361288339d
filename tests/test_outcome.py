"""What ends a run decides its status, its reason, and whether the caller hears of it."""

from __future__ import annotations

import errno

import pytest

from svend.errors import GateFailure, Interrupted, TrialPruned
from svend.pipeline.outcome import Ending

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("error", "status", "reason", "unexpected"), [
    (GateFailure("loss = 7"), "FAILED", "loss = 7", False),
    (TrialPruned("behind"), "FINISHED", "behind", False),
    (Interrupted("by SIGTERM"), "KILLED", "by SIGTERM", False),
    (KeyboardInterrupt(), "KILLED", "interrupted", True),
    (ValueError("no"), "FAILED", "ValueError: no", True),
    (PermissionError(13, "denied"), "FAILED", "PermissionError: [Errno 13] denied", True),
    (FULL, "FAILED", "runs: the disk is full; make room, and go on with resume=true", False),
])
def test_an_error_ends_a_run_as_what_it_is(
    error: BaseException, status: str, reason: str, unexpected: bool
) -> None:
    ending = Ending.by(error, "runs")
    assert (ending.status, ending.reason, ending.unexpected) == (status, reason, unexpected)
    assert (ending.mistake is error) == isinstance(error, GateFailure | TrialPruned)


def test_a_full_disk_has_no_resume_where_no_training_run_is() -> None:
    assert Ending.by(FULL) == Ending(
        "FAILED", "OSError: [Errno 28] No space left on device", unexpected=True
    )
