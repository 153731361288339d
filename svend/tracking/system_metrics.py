"""The machine's load beside a run, told like everything else that the run logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

PREFIX = "system/"


class SystemMetrics(SystemMetricsMonitor):  # type: ignore[misc]
    """MLflow's own monitor, but for two things: it hands its samples to `log`, and it goes on while
    the tracking store does not answer, where MLflow's ends.
    """

    def __init__(
        self, run_id: str, first_step: int, log: Callable[[Mapping[str, float], int], None]
    ) -> None:
        super().__init__(run_id)
        self._logging_step = first_step
        self._log = log

    def monitor(self) -> None:
        while not self._shutdown_event.is_set():
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    return
            self.publish_metrics(self.aggregate_metrics())

    def publish_metrics(self, metrics: Mapping[str, Any]) -> None:
        node = f"{self.node_id}/" if self.node_id else ""
        self._log({f"{PREFIX}{node}{name}": value for name, value in metrics.items()},
                  self._logging_step)
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()
