"""One run as W&B shows it, beside MLflow's: an optional sink of the same metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svend.errors import TrackingError

if TYPE_CHECKING:
    import wandb

STEP = "step"
# W&B's default is to wait for its server for ever, with the run done and nothing on the screen.
FINISH_SECONDS = 300.0
# A kill loses what W&B has not yet written to its file; its default is 15 seconds of rows.
WRITE_SECONDS = 1.0
LOCAL_MODES = ("offline", "dryrun", "disabled")


class WandbRun:
    """A W&B run that is being written to.

    Every call of log_metrics is a row of its own with the optimizer step as a column, the x axis
    of all charts. W&B's own step only counts rows: under it, a row whose step is below the last
    one's, as after a resumption, would be dropped.
    """

    def __init__(self, run: wandb.Run) -> None:
        self._run = run

    @classmethod
    def begin(
        cls, project: str, name: str, run_id: str, config: Mapping[str, Any], folder: Path
    ) -> WandbRun:
        """Begin the run, or go on with the one that has this id.

        project: the W&B project.
        name: what W&B shows the run as.
        run_id: the id of the MLflow run, which is W&B's too.
        config: the resolved configuration, nested.
        folder: where W&B keeps its files, in a folder `wandb`.

        Raises TrackingError if the package, a login or the server is missing.
        """
        try:
            # Both: a folder called wandb, such as W&B itself makes, passes for the package alone.
            import wandb
            from pydantic import ValidationError
            from wandb.errors import Error
        except ImportError:
            raise TrackingError(
                "training.use_wandb: the package wandb is not installed; "
                '`pip install "svend[wandb]"`, or set training.use_wandb=false'
            ) from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
            # Asked here, so that W&B does not ask on the terminal, and an hour later go on without.
            if mode not in LOCAL_MODES and not wandb.login(prompt=False):
                raise _unusable("no API key; run `wandb login` or set WANDB_API_KEY")
            run = wandb.init(
                project=project, name=name, id=run_id, resume="allow", config=dict(config),
                dir=folder, settings=_settings(),
            )
        except (Error, OSError) as error:
            raise _unusable(f"the login or the server fails ({_line(error)})") from error
        except ValidationError as error:
            raise _unusable(f"a WANDB_ setting is wrong ({_line(error)})") from error
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        return cls(run)

    @property
    def place(self) -> str:
        """Where the run is to be seen: its address, or in offline mode its folder."""
        if self._run.disabled:
            return "nowhere, WANDB_MODE is disabled"
        url = None if self._run.offline else self._run.url
        return url or str(Path(self._run.dir).parent)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of an optimizer step; one step may come in several calls, in any order.

        Raises TrackingError if W&B's own process has died.
        """
        try:
            self._run.log({**metrics, STEP: step})
        except ConnectionError as error:
            raise TrackingError(
                f"W&B: its process wandb-core has died ({error}), see {self.place}; "
                "resume the run, or set training.use_wandb=false"
            ) from error

    def end(self, exit_code: int) -> str | None:
        """End the run, as failed unless the code is 0, and wait for the upload.

        Returns a line that says what to do if not everything was uploaded, for want of time or
        because W&B's own process has died.
        """
        from wandb.sdk.mailbox import HandleAbandonedError

        try:
            self._run.finish(exit_code=exit_code)
        except (TimeoutError, ConnectionError, HandleAbandonedError):
            folder = Path(self._run.dir).parent
            return f"W&B: not everything was uploaded; run `wandb sync {folder}`"
        return None


def _settings() -> wandb.Settings:
    """Return settings that keep W&B off the screen and out of other runs of the process."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", reinit="create_new", finish_timeout_raises=True,
        x_transaction_log_flush_interval=WRITE_SECONDS,
    )
    if "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings.finish_timeout = FINISH_SECONDS
    return settings


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _unusable(what: str) -> TrackingError:
    return TrackingError(
        f"W&B: {what}; or set WANDB_MODE=offline, or training.use_wandb=false"
    )
