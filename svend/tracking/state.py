"""All that a tracking store holds of a run, to hold one run against another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient


@dataclass(frozen=True)
class StoredRun:
    """One run: metrics are lists of (step, value), in the order of their steps.

    versions: the tags and aliases of each version that the run registered, by model and number.
    """

    run_id: str
    status: str
    metrics: dict[str, list[tuple[int, float]]]
    params: dict[str, str]
    tags: dict[str, str]
    artifacts: list[str]
    versions: dict[str, dict[str, Any]]


def read_runs(tracking_uri: str, experiment: str) -> list[StoredRun]:
    """Return every run of an experiment, the oldest first."""
    client = MlflowClient(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"])
    return [_read_run(client, str(run.info.run_id)) for run in runs]


def _read_run(client: MlflowClient, run_id: str) -> StoredRun:
    run = client.get_run(run_id)
    metrics = {
        key: sorted((int(point.step), float(point.value))
                    for point in client.get_metric_history(run_id, key))
        for key in sorted(run.data.metrics)
    }
    versions = {}
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        # A search leaves the aliases out.
        whole = client.get_model_version(version.name, str(version.version))
        versions[f"{whole.name}/{whole.version}"] = {
            "tags": dict(whole.tags), "aliases": sorted(whole.aliases),
        }
    return StoredRun(
        run_id, str(run.info.status), metrics, dict(run.data.params), dict(run.data.tags),
        _artifacts(client, run_id), versions,
    )


def _artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    found = []
    for entry in client.list_artifacts(run_id, folder):
        found += _artifacts(client, run_id, entry.path) if entry.is_dir else [str(entry.path)]
    return sorted(found)
