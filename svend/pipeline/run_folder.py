"""The folder of a run: its checkpoints, its verdicts, and which MLflow run they belong to."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from svend.errors import UserError, reason_of
from svend.pipeline.config import PipelineConfig, Precision
from svend.pipeline.folder_lock import LOCK_FILE, FolderLock
from svend.pipeline.hyperparameters import HYPERPARAMETERS
from svend.pipeline.loading import CONFIG_FILE, MAY_CHANGE
from svend.pipeline.own_model import FACTORY_FILE
from svend.pipeline.schema import build, flatten, read_yaml, to_tree, to_yaml
from svend.pipeline.whole_files import append_lines, read_lines, write_whole
from svend.tracking.spool import ADDRESS, SPOOL

RUN_FILE = "run.json"
VERDICTS_FILE = "verdicts.jsonl"


@dataclass(frozen=True)
class RunIdentity:
    """What run.json says: the MLflow run, the scale, and whether it came to its end."""

    run_id: str
    tracking_uri: str
    experiment: str
    scale: str
    data_fingerprint: str
    device: str
    precision: Precision
    compiled: bool
    tokenizer_sha256: str = ""  # not in runs that are older than this field
    finished: bool = False
    model_factory_sha256: str = ""  # of the file that made the model, where the config names one
    forced: list[str] = field(default_factory=list)  # what a forced resumption found otherwise


class RunFolder:
    """`<checkpoint_dir>/<experiment>`, or with -2, -3, ... where an earlier run has that name."""

    def __init__(self, path: Path, identity: RunIdentity) -> None:
        self.path = path
        self.identity = identity
        self._lock = FolderLock(path, "run")

    @classmethod
    def create(
        cls, config: PipelineConfig, identity: RunIdentity, files: Mapping[str, str] | None = None
    ) -> RunFolder:
        """Take the next free folder name for a new run, and keep its resolved config there.

        files: more texts to keep there, by name.
        """
        checkpoint_dir, experiment = config.checkpoint_dir, config.training.experiment_name
        number = 1
        while True:
            path = _path(checkpoint_dir, experiment, number)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(path):
                    path.mkdir()
                    break
            except OSError as error:
                if path.is_dir():
                    continue  # another process took the name just now
                raise UserError(
                    f"checkpoint_dir {path.parent.absolute()}: cannot be written "
                    f"({error.strerror}); choose another"
                ) from None
            number += 1
        folder = cls(path, identity)
        folder.hold()
        for name, text in {CONFIG_FILE: to_yaml(config), **(files or {})}.items():
            (path / name).write_text(text, encoding="utf-8")
        folder._write_identity()
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return the run that a folder is of. Raises UserError if it is of none, or damaged."""
        try:
            told = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
            return cls(path, RunIdentity(**{**told, "precision": Precision(told["precision"])}))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path / RUN_FILE}: damaged ({reason_of(error)}); restore it, or move the folder "
                "away"
            ) from None

    @classmethod
    def find_unfinished(cls, checkpoint_dir: str, experiment: str, scale: str) -> RunFolder:
        """Return the newest run of this experiment and scale that can go on.

        One that was killed before its first checkpoint goes on from its first step. Raises
        UserError if there is none.
        """
        finished = None
        for folder in reversed(list(_existing(checkpoint_dir, experiment))):
            if folder.identity.scale != scale:
                continue
            if not folder.identity.finished and folder.was_begun:
                return folder
            finished = finished or (folder if folder.identity.finished else None)
        where = _path(checkpoint_dir, experiment, 1).absolute()
        if finished is not None:
            raise UserError(
                f"nothing to resume: the newest run of experiment '{experiment}' at scale {scale} "
                f"is finished ({finished.path}); leave out resume to begin another"
            )
        raise UserError(
            f"nothing to resume: no run of experiment '{experiment}' at scale {scale} "
            f"under {where}; check the experiment's name and checkpoint_dir"
        )

    @classmethod
    def find_newest(cls, checkpoint_dir: str, experiment: str) -> RunFolder | None:
        """Return the experiment's newest run that is finished or can go on, None if none is."""
        for folder in reversed(list(_existing(checkpoint_dir, experiment))):
            if folder.identity.finished or _has_checkpoint(folder.path):
                return folder
        return None

    def hold(self) -> None:
        """Keep other processes out of the folder until this one ends, however it ends.

        Raises UserError, with who it is, if another process holds it.
        """
        self._lock.hold()

    def release(self) -> None:
        """Let other processes, or another runner of this one, have the folder."""
        self._lock.release()

    def check_config(self, config: PipelineConfig) -> None:
        """Raise UserError, with the first difference, if the run would go on as another run."""
        for difference in self.config_differences(config):
            raise self._refusal(
                difference, f"resume with the settings in {CONFIG_FILE} there, or begin another run"
            )

    def check_machine(
        self, data_fingerprint: str, tokenizer_sha256: str, device: str, factory_sha256: str = ""
    ) -> None:
        """Raise UserError if data, tokens, kind of device or model factory are not the run's."""
        for difference in self.machine_differences(
            data_fingerprint, tokenizer_sha256, device, factory_sha256
        ):
            raise self._refusal(difference, "restore it, or begin another run")

    def config_differences(self, config: PipelineConfig) -> list[str]:
        """Name every setting by which the run would go on as another run."""
        changed = self.changed_settings(config)
        return [f"{key} was {was}, now {now}" for key, (was, now) in changed.items()]

    def changed_settings(self, config: PipelineConfig) -> dict[str, tuple[Any, Any]]:
        """Return the run's value and the new one of each setting that makes it another run."""
        # As built, so that a key that is younger than the run has its default.
        saved = build(PipelineConfig, read_yaml(self.path / CONFIG_FILE))
        was, now = flatten(to_tree(saved)), flatten(to_tree(config))
        return {
            key: (was.get(key), now.get(key)) for key in sorted({*was, *now})
            if key not in MAY_CHANGE and was.get(key) != now.get(key)
        }

    def machine_differences(
        self, data_fingerprint: str, tokenizer_sha256: str, device: str, factory_sha256: str = ""
    ) -> list[str]:
        """Name what the run would find otherwise than it left it."""
        identity = self.identity
        return [
            f"{what} was {was[:16]}, now {now[:16]}" for what, was, now in (
                ("the device", identity.device, device),
                ("the data's fingerprint", identity.data_fingerprint, data_fingerprint),
                ("the tokenizer", identity.tokenizer_sha256, tokenizer_sha256),
                ("the model factory's file", identity.model_factory_sha256, factory_sha256),
            ) if was and was != now
        ]

    def force(
        self, differences: Sequence[str], config: PipelineConfig, step: int, **found: Any
    ) -> None:
        """Put on record that the run goes on from a step in spite of these differences.

        found: the fields of its identity as they are now.
        """
        told = [f"step {step}: {text}" for text in differences]
        forced = list(dict.fromkeys([*self.identity.forced, *told]))
        self.identity = replace(self.identity, **found, forced=forced)
        before = f"config.before-step-{step}.yaml"
        # Forced at this step again, the config that it was trained to it with is there already.
        if not (self.path / before).exists():
            write_whole(self.path / before, (self.path / CONFIG_FILE).read_text(encoding="utf-8"))
        # The record first: with the config alone, one killed here would go on as if unforced.
        self._write_identity()
        write_whole(self.path / CONFIG_FILE, to_yaml(config))

    def _refusal(self, difference: str, what_to_do: str) -> UserError:
        return UserError(
            f"cannot resume {self.path}: {difference}; {what_to_do}; resume=force goes on all the "
            "same, and puts that on record"
        )

    @property
    def was_begun(self) -> bool:
        """Whether the MLflow run knows of the folder, so that it can go on here."""
        return (self.spool_path / ADDRESS).is_file()

    @property
    def spool_path(self) -> Path:
        """Where what the run tells its tracking store is written first."""
        return self.path / SPOOL

    def mark_finished(self) -> None:
        self.identity = replace(self.identity, finished=True)
        self._write_identity()

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that ended before its first checkpoint."""
        if not _has_checkpoint(self.path):
            for name in (RUN_FILE, CONFIG_FILE, VERDICTS_FILE, LOCK_FILE, HYPERPARAMETERS,
                         FACTORY_FILE):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.spool_path, ignore_errors=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def append_verdict(self, rows: Iterable[dict[str, Any]]) -> None:
        append_lines(self.path / VERDICTS_FILE, rows)

    def read_verdicts(self, checkpoint_sha256: str | None = None) -> list[dict[str, Any]]:
        """Return a row per gate decided so far, of one checkpoint where its hash is given.

        A line torn by a kill is left out.
        """
        rows = [row for row in read_lines(self.path / VERDICTS_FILE) if isinstance(row, dict)]
        if checkpoint_sha256 is None:
            return rows
        return [row for row in rows if row.get("checkpoint_sha256") == checkpoint_sha256]

    def _write_identity(self) -> None:
        write_whole(self.path / RUN_FILE, json.dumps(to_tree(self.identity), indent=1))


def _has_checkpoint(path: Path) -> bool:
    """Whether there is one, or one that was being replaced when the process was killed."""
    return any(path.glob("step_*")) or any(path.glob(".replaced-step_*"))


def folder_name(experiment: str) -> str:
    """Return what a folder that is named after an experiment is called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", experiment).strip(".-") or "run"


def _path(checkpoint_dir: str, experiment: str, number: int) -> Path:
    name = folder_name(experiment)
    return Path(checkpoint_dir).expanduser() / (name if number == 1 else f"{name}-{number}")


def _existing(checkpoint_dir: str, experiment: str) -> Iterable[RunFolder]:
    """The experiment's run folders, oldest first; folders of others with such names left out."""
    first = _path(checkpoint_dir, experiment, 1)
    numbered = {1: first}
    for path in first.parent.glob(f"{first.name}-*"):
        number = path.name.removeprefix(f"{first.name}-")
        if number.isdecimal():
            numbered[int(number)] = path
    for _, path in sorted(numbered.items()):
        if (path / RUN_FILE).is_file():
            folder = RunFolder.open(path)
            if folder.identity.experiment == experiment:
                yield folder
