"""MLflow's own pages: their addresses, and the columns that an experiment's runs are shown with."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from urllib.parse import quote

from mlflow import MlflowClient

LOCAL_ADDRESS = "http://127.0.0.1:5000"
# MLflow opens with its pages for GenAI applications otherwise.
FOR_TRAINING = "workflowType=machine_learning"
# What MLflow's button "share" writes: a tag of the experiment, with the page's state as JSON.
SHARED_VIEW_TAG = "mlflow.sharedViewState."
SCALES_VIEW = "svend-scales"
SCALES_COLUMNS = (
    "tags.`svend.scale`",
    "params.`config.model.name`",
    "metrics.`plan/parameters`",
    "metrics.`train/tokens`",
    "metrics.`train/flops`",
    "metrics.`eval/heldout_loss`",
    "params.`ladder.predicted_loss`",
    "tags.`svend.ladder.verdict`",
    "metrics.`eval/accuracy`",
    "metrics.`train/tokens_per_second`",
    "metrics.`plan/peak_memory_gb`",
    "metrics.`measured/peak_memory_gb`",
    "metrics.`plan/seconds`",
    "metrics.`measured/seconds`",
)


def is_local(tracking_uri: str) -> bool:
    """Return whether a store has no server of its own whose pages could be opened."""
    return not tracking_uri.startswith(("http://", "https://"))


def ui_command(tracking_uri: str) -> str:
    """Return the command that shows the pages of a local store."""
    # By the interpreter's path: it works whether or not the environment is active.
    return (f"{shlex.quote(sys.executable)} -m mlflow ui --backend-store-uri "
            f"{shlex.quote(tracking_uri)}")


def run_page(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run's page."""
    return f"{_address(tracking_uri)}/#/experiments/{experiment_id}/runs/{run_id}?{FOR_TRAINING}"


def compare_page(
    tracking_uri: str, experiment_ids: Sequence[str], run_ids: Sequence[str]
) -> str:
    """Return the address of the page that compares runs."""
    runs, experiments = (quote(json.dumps(list(ids), separators=(",", ":")))
                         for ids in (run_ids, experiment_ids))
    return (f"{_address(tracking_uri)}/#/compare-runs?runs={runs}&experiments={experiments}"
            f"&{FOR_TRAINING}")


def scales_page(tracking_uri: str, experiment_id: str) -> str:
    """Return the address of an experiment's runs with the columns for comparing scales."""
    return (f"{_address(tracking_uri)}/#/experiments/{experiment_id}/runs?{FOR_TRAINING}"
            f"&viewStateShareKey={SCALES_VIEW}")


def prepare_columns(experiment_id: str) -> None:
    """Have an experiment offer the columns for comparing scales, the largest model first."""
    state = {
        "selectedColumns": SCALES_COLUMNS,
        "orderByKey": "metrics.`plan/parameters`",
        "orderByAsc": False,
    }
    MlflowClient().set_experiment_tag(
        experiment_id, f"{SHARED_VIEW_TAG}{SCALES_VIEW}", json.dumps(state)
    )


def _address(tracking_uri: str) -> str:
    return LOCAL_ADDRESS if is_local(tracking_uri) else tracking_uri.rstrip("/")
