"""Runs that are killed and resumed, held against one that never was.

Every run is a process of its own with a tracking store of its own, killed by SIGKILL with all of
its children: at a random moment, or as soon as it is seen to save, evaluate or register.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from svend.errors import UserError
from svend.pipeline.checkpoints.metadata import read_folder
from svend.pipeline.registration import REGISTERING
from svend.pipeline.run_folder import RunFolder
from svend.tracking.registry import CHECKPOINT_TAG
from svend.tracking.spool import ENTRIES, SPOOL
from svend.tracking.state import StoredRun, read_runs

# Two kinds of everything that could come back otherwise: sources, accumulation, processes.
SETTINGS = {
    "model.name": "svend-chaos",
    "model.hidden_size": "64",
    "model.num_hidden_layers": "2",
    "model.num_attention_heads": "4",
    "model.num_key_value_heads": "2",
    "model.intermediate_size": "128",
    "model.vocab_size": "4096",
    "model.max_position_embeddings": "256",
    "data.max_seq_length": "128",
    "data.num_samples": "200",
    "data.processes": "2",
    "training.learning_rate": "3e-3",
    "training.batch_size": "4",
    "training.gradient_accumulation_steps": "2",
    "training.max_steps": "80",
    "training.save_steps": "10",
    "training.quick_gate_steps": "5",
    "training.logging_steps": "2",
    "training.heldout_sequences": "16",
    "training.compile": "on",
    "eval_benchmarks": "[accuracy]",
    "evaluation.every_steps": "40",
    "evaluation.problems": "4",
    "evaluation.max_new_tokens": "16",
}
# Of metrics that measure time only the steps are compared; of those that measure the machine or
# what one process waited for nothing is.
MEASURED_PREFIXES = ("measured/", "plan/", "system/", "eval/seconds", "train/tokens_per_second",
                     "train/flops_per_second", "train/peak_fraction")
MACHINE_PREFIXES = ("system/", "save/")
EXPERIMENT = "svend"
POLL_SECONDS = 0.002
RUN_SECONDS = 1800.0


class Moment(Enum):
    """When a run is killed."""

    ANY = "any time"
    SAVING = "saving"
    EVALUATING = "evaluating"
    REGISTERING = "registering"


MOMENTS = (Moment.ANY, Moment.SAVING, Moment.EVALUATING, Moment.REGISTERING)


@dataclass
class Killed:
    """How one run went: where it was killed, and whether its end is that of the other run."""

    moments: list[Moment]
    seconds: list[float] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EndState:
    """All of a run that must not depend on whether it was killed, by name."""

    parts: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    def differences(self, other: EndState) -> list[str]:
        """Name the parts that differ."""
        names = sorted({*self.parts, *other.parts})
        return [name for name in names if self.parts.get(name) != other.parts.get(name)]


class Chaos:
    """Trains a small run, then the same again and again, killed."""

    def __init__(
        self, folder: Path, overrides: Sequence[tuple[str, str]], seed: int
    ) -> None:
        self._folder = folder
        self._overrides = {**SETTINGS, **dict(overrides)}
        self._random = random.Random(seed)
        self._seconds = 0.0  # that the run takes which is not killed

    def train_reference(self) -> EndState:
        """Train the run that is never killed; return its end."""
        place = self._folder / "reference"
        # Once for what is cached: the data, and what was compiled.
        self._train(self._folder / "first", ())
        shutil.rmtree(self._folder / "first")
        started = time.monotonic()
        self._train(place, ())
        self._seconds = time.monotonic() - started
        return end_state(place)

    def train_killed(self, number: int, reference: EndState) -> Killed:
        """Train the run once more, killed on the way; remove its folder if it ended the same.

        The first is killed at any time, the next ones while they save, evaluate and register, and
        so on; every fourth is killed twice.
        """
        moments = [MOMENTS[number % len(MOMENTS)]]
        if number % len(MOMENTS) == len(MOMENTS) - 1:
            moments.append(Moment.ANY)
        place, told = self._folder / f"killed-{number + 1:02}", Killed(moments)
        for moment in moments:
            seconds = self._kill_at(place, moment)
            while seconds is None and not told.seconds:
                shutil.rmtree(place)  # it was faster, and ended before
                seconds = self._kill_at(place, moment)
            if seconds is not None:
                told.seconds.append(seconds)
                told.resumed_from.append(_newest_step(place))
        ended = len(told.seconds) < len(moments)  # before its second kill
        del told.moments[len(told.seconds):]
        if not ended:
            self._train(place, ("--resume",) if _was_begun(place) else ())
        told.differences = end_state(place).differences(reference)
        if not told.differences:
            shutil.rmtree(place)
        return told

    def _kill_at(self, place: Path, moment: Moment) -> float | None:
        """Start or resume a run and kill it; return after how many seconds, None if it ended."""
        due_seconds = self._random.uniform(0.1, 0.9) * self._seconds
        step = self._random.randrange(1, self._saves + 1) * self._save_steps
        # What is seen at its beginning is hit anywhere in its course.
        pause_seconds = self._random.uniform(0.0, 0.4 if moment is Moment.REGISTERING else 0.03)
        with self._process(place, ("--resume",) if _was_begun(place) else ()) as process:
            started = time.monotonic()
            while process.poll() is None:
                if moment is Moment.ANY and time.monotonic() - started > due_seconds:
                    break
                if self._is_at(place, moment, step):
                    time.sleep(pause_seconds)
                    break
                time.sleep(POLL_SECONDS)
            ended = process.poll() is not None
            _kill(process)
            return None if ended else time.monotonic() - started

    def _is_at(self, place: Path, moment: Moment, step: int) -> bool:
        """Whether a run is at work on what it is to be killed in, in a step or after it."""
        folder = _run_folder(place)
        if moment is Moment.SAVING:
            return (_newest_step(place) >= step - self._save_steps
                    and any(folder.glob(".writing-step_*")))
        if moment is Moment.EVALUATING:
            return _last_logged_step(place) >= step
        return moment is Moment.REGISTERING and any(folder.glob(f"{REGISTERING}*"))

    @property
    def _save_steps(self) -> int:
        return int(self._overrides["training.save_steps"])

    @property
    def _saves(self) -> int:
        return int(self._overrides["training.max_steps"]) // self._save_steps

    def _train(self, place: Path, options: Sequence[str]) -> None:
        with self._process(place, options) as process:
            try:
                code = process.wait(RUN_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                _kill(process)
                log = (place / "output.txt").read_text(encoding="utf-8").strip()
                how = f"did not end in {RUN_SECONDS:g} s" if code is None else f"ended with {code}"
                raise UserError(f"{place}: the run {how}: {log.splitlines()[-1] if log else ''}")

    @contextlib.contextmanager
    def _process(self, place: Path, options: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
        place.mkdir(parents=True, exist_ok=True)
        settings: Mapping[str, str] = {
            **self._overrides, "checkpoint_dir": str(place / "checkpoints"),
            "data.cache_dir": str(self._folder / "cache"),
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri(place)}
        environment.pop("MLFLOW_RUN_ID", None)
        with (place / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "svend", "train", *options, *words],
                env=environment, cwd=place, stdout=output, stderr=output, start_new_session=True,
            )
            try:
                yield process
            finally:
                _kill(process)


def tracking_uri(place: Path) -> str:
    """Return the address of the tracking store that a run has to itself."""
    return f"sqlite:///{place / 'mlflow.db'}"


def end_state(place: Path) -> EndState:
    """Return how the one run in a place ended."""
    folder = _run_folder(place)
    checkpoints, complaints = read_folder(folder)
    stored = read_runs(tracking_uri(place), EXPERIMENT)
    if not stored:
        raise UserError(f"{place}: its tracking store has no run")
    run = stored[0]
    parts: dict[str, Any] = {
        f"{c.checkpoint_id}/{name}": entry["sha256"]
        for c in checkpoints for name, entry in c.files.items()
    }
    parts |= {f"{c.checkpoint_id}/metrics": c.metrics for c in checkpoints}
    parts |= {f"metric {key}": points for key, points in _comparable(run).items()}
    parts |= {
        "damaged checkpoints": complaints,
        "left behind": sorted(path.name for path in folder.glob(".*") if path.is_dir()),
        "verdicts": _verdicts(RunFolder.open(folder)),
        "runs": len(stored),
        "status": run.status,
        "artifacts": run.artifacts,
        "tags": sorted(run.tags),
        "params": sorted(run.params),
        "versions": [
            [name, version["aliases"], version["tags"][CHECKPOINT_TAG], sorted(version["tags"])]
            for name, version in run.versions.items()
        ],
    }
    return EndState(parts)


def _comparable(run: StoredRun) -> dict[str, list[Any]]:
    """Return each metric's points: by step and value, or by step where the value is a time."""
    return {
        key: [step for step, _ in points] if key.startswith(MEASURED_PREFIXES) else
        [list(point) for point in points]
        for key, points in run.metrics.items() if not key.startswith(MACHINE_PREFIXES)
    }


def _verdicts(folder: RunFolder) -> list[list[Any]]:
    """Return the last decision of each gate on each checkpoint."""
    last = {
        (row["checkpoint_sha256"] or "", row["level"], row["gate"]): [row["passed"], row["value"]]
        for row in folder.read_verdicts()
    }
    return [[*key, *decided] for key, decided in sorted(last.items()) if key[0]]


def _run_folder(place: Path) -> Path:
    return place / "checkpoints" / EXPERIMENT


def _was_begun(place: Path) -> bool:
    folder = _run_folder(place)
    return folder.is_dir() and RunFolder.open(folder).was_begun


def _newest_step(place: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name.removeprefix("step_"))
                for path in _run_folder(place).glob("step_*")), default=0)


def _last_logged_step(place: Path) -> int:
    """Return the last step whose loss is on record, 0 if none is."""
    try:
        written = (_run_folder(place) / SPOOL / ENTRIES).read_bytes()
    except FileNotFoundError:
        return 0
    steps = re.findall(rb'"step": (\d+),[^\n]*"train/loss"', written[-4000:])
    return int(steps[-1]) if steps else 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
