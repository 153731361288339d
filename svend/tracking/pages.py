"""MLflow's own pages: their addresses, and a view of runs that is prepared for scales."""

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
# Not ladders, sweeps and comparisons, which train nothing.
PLANNED_RUNS = "metrics.`plan/parameters` > 0"
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


def scales_page(tracking_uri: str, experiment_id: str, *, as_charts: bool) -> str:
    """Return the address of an experiment's runs with the view that is prepared for scales."""
    mode = "&compareRunsMode=CHART" if as_charts else ""
    return (f"{_address(tracking_uri)}/#/experiments/{experiment_id}/runs?{FOR_TRAINING}"
            f"&viewStateShareKey={SCALES_VIEW}{mode}")


def prepare_scales_view(experiment_id: str) -> None:
    """Have an experiment offer a view for comparing scales: columns, the largest model first, and
    losses against tokens and FLOPs.
    """
    state = {
        "searchFilter": PLANNED_RUNS,
        "selectedColumns": SCALES_COLUMNS,
        "orderByKey": "metrics.`plan/parameters`",
        "orderByAsc": False,
        "compareRunCharts": [
            _loss_chart(metric, against)
            for metric in ("eval/heldout_loss", "train/loss")
            for against in ("train/tokens", "train/flops")
        ],
        "compareRunSections": [{"uuid": SCALES_VIEW, "name": "Scales", "display": True,
                                "isReordered": False, "deleted": False, "isGenerated": False}],
        # Else MLflow sorts sections by name, and these charts come behind a hundred others.
        "isAccordionReordered": True,
    }
    MlflowClient().set_experiment_tag(
        experiment_id, f"{SHARED_VIEW_TAG}{SCALES_VIEW}", json.dumps(state)
    )


def _loss_chart(metric: str, against: str) -> dict[str, object]:
    """Return a chart of MLflow's own, of a metric against another in place of the step."""
    return {
        "type": "LINE", "uuid": f"{metric} against {against}", "metricSectionId": SCALES_VIEW,
        "displayName": f"{metric} against {against}", "metricKey": metric,
        "selectedMetricKeys": [metric], "runsCountToCompare": 10, "deleted": False,
        "isGenerated": False, "lineSmoothness": 0, "scaleType": "linear", "range": {},
        "xAxisKey": "metric", "selectedXAxisMetricKey": against, "xAxisScaleType": "linear",
        "yAxisKey": "metric", "yAxisExpressions": [], "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True, "ignoreOutliers": False,
    }


def _address(tracking_uri: str) -> str:
    return LOCAL_ADDRESS if is_local(tracking_uri) else tracking_uri.rstrip("/")
