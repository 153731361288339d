"""One tracked run: joined, begun or continued, and ended with a status and a reason."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from svend import __version__
from svend.errors import TrackingError
from svend.tracking.keep_status import keep_status
from svend.tracking.wandb import WandbRun

RUN_ID = "MLFLOW_RUN_ID"  # set by `mlflow run` for the run that it made
DEFAULT_EXPERIMENT, DEFAULT_EXPERIMENT_ID = "Default", "0"
REASON_TAG = "svend.reason"
MAX_TAG_LENGTH = 5000
# MLflow's limit on metrics in one request.
BATCH_METRICS = 1000
FLUSH_SECONDS = 5.0
SYSTEM_METRICS_SECONDS = 5
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")
PACKAGES = ("torch", "mlflow", "omegaconf", "tokenizers", "datasets", "reasoning-gym", "numpy")


class TrackedRun:
    """An MLflow run that is being written to. Metrics are sent in batches."""

    def __init__(self, run_id: str, *, started_by_mlflow_run: bool) -> None:
        self.run_id = run_id
        self._started_by_mlflow_run = started_by_mlflow_run
        self._client = MlflowClient()
        self._pending: list[Metric] = []
        self._sent_seconds = time.monotonic()
        self._mirror: WandbRun | None = None

    @classmethod
    def begin(
        cls, experiment_name: str, run_name: str, parent_run_id: str | None = None
    ) -> TrackedRun:
        """Join the run that `mlflow run` made, or begin one in the experiment, below a parent."""
        joined = RUN_ID in os.environ
        _configure()
        try:
            if not joined:
                mlflow.set_experiment(experiment_name)
            name = None if joined else run_name
            active = mlflow.start_run(
                run_name=name, parent_run_id=parent_run_id, log_system_metrics=True
            )
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"tracking store {mlflow.get_tracking_uri()}: {str(error).splitlines()[0][:300]}; "
                "check MLFLOW_TRACKING_URI and that the server is up"
            ) from error
        run = cls(active.info.run_id, started_by_mlflow_run=joined)
        if joined and GENERATED_NAME.fullmatch(active.info.run_name or ""):
            run.set_tags({"mlflow.runName": run_name})
        return run

    @classmethod
    def resume(cls, run_id: str) -> TrackedRun:
        """Go on with an earlier run.

        The empty run that `mlflow run` made for the resumption is filed under it.
        """
        _configure()
        client = MlflowClient()
        try:
            info = client.get_run(run_id).info
        except MlflowException as error:
            raise TrackingError(
                f"tracking store {mlflow.get_tracking_uri()}: does not have the run {run_id} "
                f"({str(error).splitlines()[0][:200]}); set MLFLOW_TRACKING_URI to the store that "
                "it was begun in"
            ) from error
        attempt = os.environ.pop(RUN_ID, None)
        if attempt is not None:
            client.set_tag(attempt, "mlflow.parentRunId", run_id)
            client.set_tag(attempt, "mlflow.runName", f"resumption of {info.run_name}")
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
        mlflow.set_experiment(experiment_id=info.experiment_id)
        mlflow.start_run(run_id=run_id, log_system_metrics=True)
        if REASON_TAG in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, REASON_TAG)
        return cls(run_id, started_by_mlflow_run=False)

    @property
    def experiment_id(self) -> str:
        return str(self._client.get_run(self.run_id).info.experiment_id)

    @property
    def tracking_uri(self) -> str:
        return str(mlflow.get_tracking_uri())

    def last_step(self, metric: str, since_milliseconds: int = 0) -> int:
        """Return the last step at which a metric was logged since a time, 0 if at none."""
        history = self._client.get_metric_history(self.run_id, metric)
        logged = (point.step for point in history if point.timestamp >= since_milliseconds)
        return max(logged, default=0)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; those of `mlflow run` itself are under other names."""
        entries = [Param(key, "null" if value is None else str(value))
                   for key, value in params.items()]
        for start in range(0, len(entries), 100):
            self._client.log_batch(self.run_id, params=entries[start : start + 100])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue metrics of a step; they are sent at least every few seconds of logging."""
        now_milliseconds = int(time.time() * 1000)
        self._pending += [Metric(k, v, now_milliseconds, step) for k, v in metrics.items()]
        if self._mirror is not None:
            self._mirror.log_metrics(metrics, step)
        elapsed = time.monotonic() - self._sent_seconds
        if len(self._pending) >= BATCH_METRICS or elapsed > FLUSH_SECONDS:
            self.flush()

    def mirror_to_wandb(self, project: str, config: Mapping[str, Any], folder: Path) -> str:
        """Send metrics to W&B too, under the same run id; return where to look."""
        name = str(self._client.get_run(self.run_id).info.run_name)
        self._mirror = WandbRun.begin(project, name, self.run_id, config, folder)
        return self._mirror.place

    def flush(self) -> None:
        """Send what is queued."""
        while self._pending:
            self._client.log_batch(self.run_id, metrics=self._pending[:BATCH_METRICS])
            del self._pending[:BATCH_METRICS]
        self._sent_seconds = time.monotonic()

    def log_text(self, text: str, artifact: str) -> None:
        self._client.log_text(self.run_id, text, artifact)

    def log_table(self, table: pd.DataFrame, artifact: str) -> None:
        """Log a table as an artifact that MLflow's evaluation view shows and compares."""
        self._client.log_table(self.run_id, table, artifact)

    def log_artifacts(self, folder: Path, artifact_folder: str) -> None:
        """Copy a folder's files to the run."""
        self._client.log_artifacts(self.run_id, str(folder), artifact_folder)

    def log_dataset(
        self, name: str, digest: str, context: str, place: str, tags: Mapping[str, str]
    ) -> None:
        """Log a data set as an input of the run; `digest` is cut to MLflow's 36 characters."""
        dataset = Dataset(name, digest[:36], "svend", json.dumps({"place": place}))
        labels = {"mlflow.data.context": context, **tags}
        inputs = [DatasetInput(dataset, [InputTag(key, value) for key, value in labels.items()])]
        try:
            self._client.log_inputs(self.run_id, inputs)
        except MlflowException as error:
            # MLflow looks whether it knows the data set and then adds it; another run of the
            # same data may come between. Now it is known.
            if "unique" not in str(error).lower():
                raise
            self._client.log_inputs(self.run_id, inputs)

    def end(self, status: str, reason: str | None) -> str | None:
        """End the run as FINISHED, FAILED or KILLED, with the reason as a tag.

        Returns a line for the user if W&B did not take everything.
        """
        try:
            self.flush()
            if reason is not None:
                self.set_tags({REASON_TAG: reason[:MAX_TAG_LENGTH]})
        finally:
            mlflow.end_run(status)
            if status == "KILLED" and self._started_by_mlflow_run:
                keep_status(self.run_id, status)
            unsent = None
            if self._mirror is not None:
                unsent = self._mirror.end(int(status != "FINISHED"))
        return unsent

    def leave(self) -> None:
        """Stop writing to the run, which another process goes on with, and leave it as it is."""
        mlflow.end_run(str(self._client.get_run(self.run_id).info.status))


def fetch_artifact(uri: str, folder: Path) -> Path:
    """Copy an artifact (runs:/ID/NAME) into a folder. Raises TrackingError if there is none."""
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"{uri}: not in the tracking store {mlflow.get_tracking_uri()} "
            f"({str(error).splitlines()[0][:200]}); check the run's id and MLFLOW_TRACKING_URI"
        ) from error


def newest_run(tags: Mapping[str, str]) -> str | None:
    """Return the newest run, of any experiment, that has all these tags; None if none has."""
    client = MlflowClient()
    found = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()],
        " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items()),
        max_results=1, order_by=["attributes.start_time DESC"],
    )
    return found[0].info.run_id if found else None


def runs_with_tags(tags: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each run, of any experiment, that has all these tags: its id and all of its tags."""
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    token = None
    while True:
        page = client.search_runs(
            experiments, condition, max_results=1000, page_token=token,
            order_by=["attributes.start_time ASC"],
        )
        for run in page:
            yield str(run.info.run_id), dict(run.data.tags)
        token = page.token
        if not token:
            return


def run_shows(run_id: str, metric: str, value: float) -> bool:
    """Return whether a run logged this value of a metric at any step."""
    client = MlflowClient()
    try:
        return any(point.value == value for point in client.get_metric_history(run_id, metric))
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return False


def tags_of(run_id: str) -> dict[str, str]:
    """Return a run's tags; none if the store has no such run."""
    try:
        return dict(MlflowClient().get_run(run_id).data.tags)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return {}


def experiment_of(run_id: str) -> str:
    """Return the name of a run's experiment. Raises TrackingError if the store has no such run."""
    client = MlflowClient()
    try:
        experiment_id = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise TrackingError(
            f"tracking store {mlflow.get_tracking_uri()}: does not have the run {run_id} "
            f"({str(error).splitlines()[0][:200]}); set MLFLOW_TRACKING_URI to the store that has"
        ) from error
    return str(client.get_experiment(experiment_id).name)


def end_abandoned(run_id: str, reason: str) -> None:
    """End as KILLED a run whose process is gone, unless it has ended."""
    client = MlflowClient()
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_tag(run_id, REASON_TAG, reason)
        client.set_terminated(run_id, "KILLED")


def end_orphans(
    parent_run_id: str, living: Collection[str], beginning: Collection[str], reason: str
) -> None:
    """End as KILLED the runs below a parent that still run.

    living: the ids of those to leave alone. beginning: names, where the id is not known yet.
    """
    client = MlflowClient()
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    below = client.search_runs(
        [experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent_run_id}' and attributes.status = 'RUNNING'",
    )
    for run in below:
        if run.info.run_id not in living and run.info.run_name not in beginning:
            end_abandoned(run.info.run_id, reason)


def joined_experiment_name() -> str | None:
    """Return the experiment that was chosen for `mlflow run`, None if none was."""
    if RUN_ID not in os.environ:
        return None
    client = MlflowClient()
    experiment_id = client.get_run(os.environ[RUN_ID]).info.experiment_id
    name = str(client.get_experiment(experiment_id).name)
    return None if name == DEFAULT_EXPERIMENT else name


def check_tracking_store() -> str:
    """Write a run to the tracking store, read it back and delete it; return the store's address.

    Raises TrackingError if the store cannot be reached or does not give back what was written.
    """
    _configure()
    uri = str(mlflow.get_tracking_uri())
    try:
        client = MlflowClient()
        run = client.create_run(DEFAULT_EXPERIMENT_ID, run_name="infrastructure check")
        run_id = run.info.run_id
        client.log_metric(run_id, "check", 1.0)
        written = client.get_run(run_id).data.metrics
        client.set_terminated(run_id)
        client.delete_run(run_id)
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"tracking store {uri}: {str(error).splitlines()[0][:300]}; check MLFLOW_TRACKING_URI"
        ) from error
    if written != {"check": 1.0}:
        raise TrackingError(f"tracking store {uri}: gave back {written} for a metric of 1")
    return uri


def end_joined_run(status: str, reason: str) -> None:
    """End the run that `mlflow run` made, if there is one, as FAILED or KILLED."""
    if RUN_ID in os.environ:
        run_id = os.environ[RUN_ID]
        client = MlflowClient()
        client.set_tag(run_id, REASON_TAG, reason[:MAX_TAG_LENGTH])
        client.set_terminated(run_id, status)
        if status == "KILLED":
            keep_status(run_id, status)


def environment_tags() -> dict[str, str]:
    """Return the versions and the git commit that a run was made with, as tags."""
    tags = {"svend.version": __version__}
    tags |= {f"svend.package.{name}": importlib.metadata.version(name) for name in PACKAGES}
    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    if commit is not None:
        tags["svend.git_commit"] = commit
        tags["svend.git_dirty"] = str(bool(_git(root, "status", "--porcelain"))).lower()
    return tags


def installed_packages() -> str:
    """Return every installed distribution with its version, as requirements."""
    found = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return "\n".join(f"{name}=={found[name]}" for name in sorted(found, key=str.lower)) + "\n"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _configure() -> None:
    """Sample system metrics often enough for short runs; keep MLflow's chatter off the screen."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", str(SYSTEM_METRICS_SECONDS))
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
