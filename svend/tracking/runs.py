"""Runs of the tracking store: found, read, and ended for others."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from svend.errors import TrackingError
from svend.tracking.delivery import is_missing
from svend.tracking.keep_status import keep_status
from svend.tracking.spool import REASON_TAG
from svend.tracking.store_errors import is_forbidden, store_error

RUN_ID = "MLFLOW_RUN_ID"  # set by `mlflow run` for the run that it made
PARENT_TAG = "mlflow.parentRunId"
DEFAULT_EXPERIMENT, DEFAULT_EXPERIMENT_ID = "Default", "0"
MAX_TAG_LENGTH = 5000
SYSTEM_METRICS_SECONDS = 5


def configure_mlflow() -> None:
    """Sample system metrics often enough for short runs; keep MLflow's chatter off the screen."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", str(SYSTEM_METRICS_SECONDS))
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def fetch_artifact(uri: str, folder: Path) -> Path:
    """Copy an artifact (runs:/ID/NAME) into a folder. Raises TrackingError if there is none."""
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise store_error(
            f"{uri}: not in the tracking store {mlflow.get_tracking_uri()}", error,
            "check the run's id and MLFLOW_TRACKING_URI",
        ) from error


def store_uri() -> str:
    """Return the address of the current tracking store."""
    return str(mlflow.get_tracking_uri())


def newest_run(tags: Mapping[str, str]) -> str | None:
    """Return the newest run, of any experiment, that has all these tags; None if none has."""
    if any("'" in value for value in tags.values()):
        return None  # what a filter cannot ask for, Svend gives no run for a tag
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
        if not _is_missing_run(error):
            raise
        return False


def metric_history(run_id: str, metric: str) -> dict[int, float]:
    """Return a metric's values by step, the last one where a step has several.

    Raises TrackingError if the store has no such run.
    """
    client = MlflowClient()
    try:
        points = client.get_metric_history(run_id, metric)
    except MlflowException as error:
        raise store_error(
            f"tracking store {mlflow.get_tracking_uri()}: does not give {metric} of {run_id}",
            error, "check the run's id and MLFLOW_TRACKING_URI",
        ) from error
    return {point.step: point.value for point in sorted(points, key=lambda p: p.timestamp)}


def tags_of(run_id: str) -> dict[str, str]:
    """Return a run's tags; none if the store has no such run."""
    try:
        return dict(MlflowClient().get_run(run_id).data.tags)
    except MlflowException as error:
        if not _is_missing_run(error):
            raise
        return {}


def _is_missing_run(error: MlflowException) -> bool:
    """Whether the store has no such run.

    A server that asks for passwords does not say that to those who may not know: for a run that
    is not there it answers as for one that is not shown.
    """
    return is_missing(error) or is_forbidden(error)


def experiment_of(run_id: str) -> str:
    """Return the name of a run's experiment. Raises TrackingError if the store has no such run."""
    client = MlflowClient()
    try:
        experiment_id = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise store_error(
            f"tracking store {mlflow.get_tracking_uri()}: does not show the run {run_id}", error,
            "set MLFLOW_TRACKING_URI to the store that has it",
        ) from error
    return str(client.get_experiment(experiment_id).name)


def end_abandoned(run_id: str, reason: str, status: str = "KILLED") -> None:
    """End a run whose process is gone, unless it has ended."""
    client = MlflowClient()
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_tag(run_id, REASON_TAG, reason)
        client.set_terminated(run_id, status)


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
        f"tags.`{PARENT_TAG}` = '{parent_run_id}' and attributes.status = 'RUNNING'",
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


def remove_run(client: MlflowClient, run_id: str) -> None:
    """Delete a run that is of no use; where only its experiment's owner may, mark it as such."""
    try:
        client.delete_run(run_id)
    except MlflowException as error:
        if not is_forbidden(error):
            raise
        client.set_tag(run_id, "mlflow.note.content", "Of no use; may be deleted.")


def check_tracking_store() -> str:
    """Write a run to the tracking store, read it back and delete it; return the store's address.

    Raises TrackingError if the store cannot be reached or does not give back what was written.
    """
    configure_mlflow()
    uri = str(mlflow.get_tracking_uri())
    try:
        client = MlflowClient()
        run = client.create_run(DEFAULT_EXPERIMENT_ID, run_name="infrastructure check")
        run_id = run.info.run_id
        client.log_metric(run_id, "check", 1.0)
        written = client.get_run(run_id).data.metrics
        client.set_terminated(run_id)
        remove_run(client, run_id)
    except (MlflowException, OSError) as error:
        raise store_error(
            f"tracking store {uri}: does not take a run", error, "check MLFLOW_TRACKING_URI"
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
