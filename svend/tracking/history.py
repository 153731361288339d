"""What runs have logged, found by id, tag or experiment, to be held beside one another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient

from svend.errors import TrackingError
from svend.tracking.runs import PARENT_TAG, fetch_artifact

RUN_ID_PREFIX = re.compile(r"[0-9a-f]{1,32}")
PAGE = 1000


@dataclass(frozen=True)
class LoggedRun:
    """A run as the store shows it; `metrics` are the last values."""

    run_id: str
    name: str
    experiment_id: str
    experiment: str
    status: str
    started_seconds: float
    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]


def find_run(text: str) -> LoggedRun:
    """Return the run with an id, or with the only id that begins so.

    Raises TrackingError if there is none, or more than one.
    """
    found = []
    if RUN_ID_PREFIX.fullmatch(text):
        found = list(_search(_experiments(), f"attributes.run_id LIKE '{text}%'"))
    if not found:
        raise TrackingError(
            f"run {text}: not in the tracking store {mlflow.get_tracking_uri()}; give an id, or "
            "the beginning of one, as the run's page shows it, or set MLFLOW_TRACKING_URI"
        )
    if len(found) > 1:
        ids = ", ".join(run.run_id for run in found[:3])
        raise TrackingError(f"run {text}: {len(found)} runs begin so ({ids}); give more of the id")
    return found[0]


def runs_below(parent_run_id: str) -> list[LoggedRun]:
    """Return the runs that are filed below another, the oldest first."""
    found = list(_search(_experiments(), f"tags.`{PARENT_TAG}` = '{parent_run_id}'"))
    return found[::-1]


def newest_run_with_tag(key: str) -> LoggedRun | None:
    """Return the newest run, of any experiment, that has a tag at all; None if none has."""
    return next(_search(_experiments(), f"tags.`{key}` != ''"), None)


def runs_of_experiment(name: str) -> list[LoggedRun]:
    """Return an experiment's runs, the newest first. Raises TrackingError if it does not exist."""
    experiments = _experiments()
    ids = {other: experiment_id for experiment_id, other in experiments.items()}
    if name not in ids:
        raise TrackingError(
            f"experiment {name}: not in the tracking store {mlflow.get_tracking_uri()}; there are "
            f"{', '.join(sorted(ids)[:10])}"
        )
    return list(_search({ids[name]: name}, ""))


def read_artifact(run_id: str, name: str) -> str | None:
    """Return the text of an artifact at the top of a run's; None if the run has none so named."""
    if not any(entry.path == name for entry in MlflowClient().list_artifacts(run_id)):
        return None
    with TemporaryDirectory() as folder:
        return fetch_artifact(f"runs:/{run_id}/{name}", Path(folder)).read_text(encoding="utf-8")


def _experiments() -> dict[str, str]:
    """Return the names of the experiments by their ids."""
    return {str(e.experiment_id): str(e.name) for e in MlflowClient().search_experiments()}


def _search(experiments: dict[str, str], condition: str) -> Iterator[LoggedRun]:
    """Yield the runs that satisfy a condition, the newest first."""
    client, token = MlflowClient(), None
    while True:
        page = client.search_runs(
            list(experiments), condition, max_results=PAGE, page_token=token,
            order_by=["attributes.start_time DESC"],
        )
        for run in page:
            yield LoggedRun(
                str(run.info.run_id), str(run.info.run_name), str(run.info.experiment_id),
                experiments[str(run.info.experiment_id)], str(run.info.status),
                run.info.start_time / 1000, dict(run.data.metrics), dict(run.data.params),
                dict(run.data.tags),
            )
        token = page.token
        if not token:
            return
