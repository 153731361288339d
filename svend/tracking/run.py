"""One tracked run: joined, begun or continued, and ended with a status and a reason."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, RunInfo
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from svend.errors import TrackingError
from svend.tracking.delivery import BATCH_LIMITS, Entry, EntryKind, deliver, is_missing
from svend.tracking.keep_status import keep_status
from svend.tracking.pages import prepare_scales_view
from svend.tracking.runs import MAX_TAG_LENGTH, PARENT_TAG, RUN_ID, configure_mlflow
from svend.tracking.spool import FLUSH_SECONDS, REASON_TAG, RunAddress, Spool, SpoolSender
from svend.tracking.store_errors import is_access, store_error
from svend.tracking.system_metrics import PREFIX, SystemMetrics
from svend.tracking.wandb import WandbRun

GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")


class TrackedRun:
    """An MLflow run that is being written to: at once, or by way of a spool on the local disk."""

    def __init__(
        self, address: RunAddress, outlet: _Direct | Spool, first_system_step: int,
        *, started_by_mlflow_run: bool,
    ) -> None:
        self._address = address
        self._started_by_mlflow_run = started_by_mlflow_run
        self._outlet = outlet
        self._sender: SpoolSender | None = None
        self._mirror: WandbRun | None = None
        # Points that are on record, and that steps trained once more give again.
        self._repeated: Counter[tuple[str, int]] = Counter()
        self._system_metrics = SystemMetrics(
            address.run_id, first_system_step,
            lambda values, step: self._outlet.tell(Entry.metrics(values, step)),
        )
        self._system_metrics.start()

    @classmethod
    def begin(
        cls, experiment_name: str, run_name: str, parent_run_id: str | None = None
    ) -> TrackedRun:
        """Join the run that `mlflow run` made, or begin one in the experiment, below a parent.

        The experiment gets the view that is prepared for scales.
        """
        joined = os.environ.pop(RUN_ID, None)
        configure_mlflow()
        client = MlflowClient()
        try:
            if joined is not None:
                if GENERATED_NAME.fullmatch(client.get_run(joined).info.run_name or ""):
                    client.update_run(joined, name=run_name)
                if parent_run_id is not None:
                    client.set_tag(joined, PARENT_TAG, parent_run_id)
                info = client.get_run(joined).info
            else:
                experiment = mlflow.set_experiment(experiment_name)
                tags = {} if parent_run_id is None else {PARENT_TAG: parent_run_id}
                info = client.create_run(
                    experiment.experiment_id, run_name=run_name, tags=resolve_tags(tags)
                ).info
            prepare_scales_view(info.experiment_id)
        except (MlflowException, OSError) as error:
            raise store_error(
                f"tracking store {mlflow.get_tracking_uri()}: begins no run", error,
                "check MLFLOW_TRACKING_URI and that the server is up",
            ) from error
        return cls(_address_of(info), _Direct(info.run_id), 0,
                   started_by_mlflow_run=joined is not None)

    @classmethod
    def resume(cls, run_id: str) -> TrackedRun:
        """Go on with an earlier run, telling its store at once.

        The empty run that `mlflow run` made for the resumption is filed under it.
        """
        configure_mlflow()
        client = MlflowClient()
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            raise _not_shown(run_id, error) from error
        _file_attempt(client, _take_attempt(), run_id, str(run.info.run_name))
        load = next((key for key in run.data.metrics if key.startswith(PREFIX)), None)
        steps = [-1 if load is None else max(
            point.step for point in client.get_metric_history(run_id, load))]
        tracked = cls(_address_of(run.info), _Direct(run_id), 1 + steps[0],
                      started_by_mlflow_run=False)
        tracked._reopen()
        return tracked

    @classmethod
    def resume_spooled(cls, folder: Path, notify: Callable[[str], None]) -> TrackedRun:
        """Go on with the run whose spool lies in a folder; its store need not answer.

        notify: shows the user a line. Raises TrackingError if the store answers that it does not
        have the run, or does not take what this user says of it.
        """
        configure_mlflow()
        spool = Spool.open(folder)
        _few_retries()
        client, address, attempt = MlflowClient(), spool.address, _take_attempt()
        try:
            client.get_run(address.run_id)
            _file_attempt(client, attempt, address.run_id, address.name)
        except (MlflowException, OSError) as error:
            # One that is away may come back; one that answers so will do so at the end too.
            if is_access(error) or (isinstance(error, MlflowException) and is_missing(error)):
                raise _not_shown(address.run_id, error) from error
        spool.address = replace(address, tracking_uri=str(mlflow.get_tracking_uri()))
        last = spool.last_step(PREFIX)
        tracked = cls(spool.address, spool, 0 if last is None else last + 1,
                      started_by_mlflow_run=False)
        tracked._send(spool, notify)
        tracked._reopen()
        return tracked

    def spool_to(self, folder: Path, notify: Callable[[str], None]) -> None:
        """From here on write to a spool in a new folder, which a thread tells to the store.

        notify: shows the user a line: that the store does not answer, or does again.
        """
        direct, spool = self._outlet, Spool.create(folder, self._address)
        assert isinstance(direct, _Direct)
        self._outlet = spool  # first: system metrics come from a thread of their own
        direct.flush()
        _few_retries()
        self._send(spool, notify)

    @property
    def run_id(self) -> str:
        return self._address.run_id

    @property
    def experiment_id(self) -> str:
        return self._address.experiment_id

    @property
    def tracking_uri(self) -> str:
        return self._address.tracking_uri

    def go_on_from(self, step: int) -> None:
        """Leave out the points from this step on that are on record, as they are logged again.

        Steps between a checkpoint and a kill are trained again, to the same values.
        """
        if isinstance(self._outlet, Spool):
            self._repeated = self._outlet.points_from(step)

    def go_back(self, step: int) -> None:
        """Note that the run goes back to a step and on to other values than before."""
        self._repeated.clear()
        if isinstance(self._outlet, Spool):
            self._outlet.go_back(step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; those of `mlflow run` itself are under other names."""
        texts = {key: "null" if value is None else str(value) for key, value in params.items()}
        keys = list(texts)
        for start in range(0, len(keys), BATCH_LIMITS[EntryKind.PARAMS]):
            some = keys[start : start + BATCH_LIMITS[EntryKind.PARAMS]]
            self._outlet.tell(Entry.params({key: texts[key] for key in some}))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._outlet.tell(Entry.tags(tags))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one value per metric; the time of the point is now."""
        new = {}
        for key, value in metrics.items():
            if self._repeated[key, step] > 0:
                self._repeated[key, step] -= 1
            else:
                new[key] = value
        if not new:
            return
        self._outlet.tell(Entry.metrics(new, step))
        if self._mirror is not None:
            self._mirror.log_metrics(new, step)

    def mirror_to_wandb(self, project: str, config: Mapping[str, Any], folder: Path) -> str:
        """Send metrics to W&B too, under the same run id; return where to look."""
        self._mirror = WandbRun.begin(project, self._address.name, self.run_id, config, folder)
        return self._mirror.place

    def keep(self) -> None:
        """Have what is logged survive a crash of the machine, without waiting for the store."""
        if isinstance(self._outlet, Spool):
            self._outlet.sync()
        else:
            self._outlet.flush()

    def flush(self, timeout_seconds: float = math.inf) -> None:
        """Wait until the store has all that was logged.

        Raises TrackingError if it has not by then.
        """
        if isinstance(self._outlet, _Direct):
            self._outlet.flush()
        elif self._sender is not None and not self._sender.flush(timeout_seconds):
            raise TrackingError(
                f"tracking store {self.tracking_uri}: does not take what the run logged "
                f"({self._sender.reason or 'no answer'}); it waits in {self._outlet.folder}; "
                "bring the store back, and go on with resume=true"
            )

    def log_text(self, text: str, artifact: str) -> None:
        self._outlet.tell_file(text.encode(), artifact)

    def log_table(self, table: pd.DataFrame, artifact: str) -> None:
        """Log a table as an artifact that MLflow's evaluation view shows and compares."""
        text = table.to_json(orient="split", index=False, date_format="iso")
        self._outlet.tell_file(text.encode(), artifact, is_table=True)

    def log_artifacts(self, folder: Path, artifact_folder: str) -> None:
        """Copy a folder's files to the run."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                place = PurePosixPath(artifact_folder, *path.relative_to(folder).parts)
                self._outlet.tell_file(path, str(place))

    def log_dataset(
        self, name: str, digest: str, context: str, place: str, tags: Mapping[str, str]
    ) -> None:
        """Log a data set as an input of the run; `digest` is cut to MLflow's 36 characters."""
        dataset = Dataset(name, digest[:36], "svend", json.dumps({"place": place}))
        labels = {"mlflow.data.context": context, **tags}
        inputs = [DatasetInput(dataset, [InputTag(key, value) for key, value in labels.items()])]
        client = MlflowClient()
        try:
            client.log_inputs(self.run_id, inputs)
        except MlflowException as error:
            # MLflow looks whether it knows the data set and then adds it; another run of the
            # same data may come between. Now it is known.
            if "unique" not in str(error).lower():
                raise
            client.log_inputs(self.run_id, inputs)

    def end(
        self, status: str, reason: str | None, timeout_seconds: float = math.inf,
        give_up: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """End the run as FINISHED, FAILED or KILLED, with the reason as a tag.

        Waits for the store, but no longer than `timeout_seconds`, or until `give_up`. Returns lines
        for the user where the store or W&B did not take everything.
        """
        self._system_metrics.finish()
        if reason is not None:
            self.set_tags({REASON_TAG: reason[:MAX_TAG_LENGTH]})
        self._outlet.tell(Entry.status(status))
        lines = []
        if isinstance(self._outlet, _Direct):
            self._outlet.flush()
        elif self._sender is not None and self._sender.close(timeout_seconds, give_up):
            self._outlet.close()
        elif self._sender is not None:
            lines.append(
                f"tracking: {self.tracking_uri} does not have all that the run logged "
                f"({self._sender.reason or 'it takes long'}); `svend sync "
                f"{self._outlet.folder.parent}` sends the rest"
            )
        if status == "KILLED" and self._started_by_mlflow_run and not lines:
            keep_status(self.run_id, status)
        unsent = None if self._mirror is None else self._mirror.end(int(status != "FINISHED"))
        return lines if unsent is None else [*lines, unsent]

    def leave(self) -> None:
        """Stop writing to the run, which another process goes on with, and leave it as it is."""
        self._system_metrics.finish()

    def _send(self, spool: Spool, notify: Callable[[str], None]) -> None:
        self._sender = SpoolSender(spool, notify)
        self._sender.start()

    def _reopen(self) -> None:
        self._outlet.tell(Entry.tag_dropped(REASON_TAG))
        self._outlet.tell(Entry.status("RUNNING"))


class _Direct:
    """Tells a run's store at once, but for metrics, which are gathered for a few seconds."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._client = MlflowClient()
        self._lock = threading.Lock()  # system metrics come from a thread of their own
        self._metrics: list[Entry] = []
        self._sent_seconds = time.monotonic()

    def tell(self, entry: Entry) -> None:
        with self._lock:
            self._metrics.append(entry)
            waited_seconds = time.monotonic() - self._sent_seconds
            if entry.kind is not EntryKind.METRICS or waited_seconds > FLUSH_SECONDS:
                self._deliver()

    def tell_file(self, content: bytes | Path, artifact: str, *, is_table: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / PurePosixPath(artifact).name
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                place.write_bytes(content)
            self.tell(Entry.file(place, artifact, is_table=is_table))

    def flush(self) -> None:
        with self._lock:
            self._deliver()

    def _deliver(self) -> None:
        deliver(self._client, self._run_id, self._metrics, Path())
        self._metrics.clear()
        self._sent_seconds = time.monotonic()


def _address_of(info: RunInfo) -> RunAddress:
    uri = str(mlflow.get_tracking_uri())
    return RunAddress(str(info.run_id), str(info.experiment_id), str(info.run_name), uri)


def _take_attempt() -> str | None:
    """Return the empty run that `mlflow run` made for a resumption, if it made one."""
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    return os.environ.pop(RUN_ID, None)


def _file_attempt(client: MlflowClient, attempt: str | None, run_id: str, name: str) -> None:
    """File the empty run of a resumption under the run that goes on."""
    if attempt is not None:
        client.set_tag(attempt, PARENT_TAG, run_id)
        client.set_tag(attempt, "mlflow.runName", f"resumption of {name}")


def _not_shown(run_id: str, error: Exception) -> TrackingError:
    return store_error(
        f"tracking store {mlflow.get_tracking_uri()}: does not show the run {run_id}", error,
        "set MLFLOW_TRACKING_URI to the store that it was begun in",
    )


def _few_retries() -> None:
    """Have MLflow give up a request in seconds: the spool's thread tries again, for ever."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
