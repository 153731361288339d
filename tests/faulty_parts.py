"""Parts of a GPU report that go wrong, by functions that a process started anew finds."""

from __future__ import annotations

import os
import signal
import time

import torch

from svend.bench.gpu_report import Findings, NotRunError, Part, Size


def check_and_say(device: torch.device, size: Size, findings: Findings) -> None:
    findings.note("figure", 1.0)


def check_and_raise(device: torch.device, size: Size, findings: Findings) -> None:
    findings.note("figure", 2.0)
    raise RuntimeError("CUDA error:\nan illegal access")


def check_and_die(device: torch.device, size: Size, findings: Findings) -> None:
    findings.note("figure", 3.0)
    os.kill(os.getpid(), signal.SIGKILL)


def check_for_ever(device: torch.device, size: Size, findings: Findings) -> None:
    findings.note("figure", 4.0)
    time.sleep(600)


def check_nothing(device: torch.device, size: Size, findings: Findings) -> None:
    raise NotRunError("has no float8")


def faulty_parts(size: Size) -> list[Part]:
    return [
        Part("dies", check_and_die, 0), Part("says", check_and_say, 0),
        Part("has nothing", check_nothing, 0), Part("too long", check_and_say, 1e6),
    ]


def endless_parts(size: Size) -> list[Part]:
    return [Part("never ends", check_for_ever, 0), Part("after", check_and_say, 1)]
