"""A comparison from top to bottom: choose runs, read them, draw, write, log, say where it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from svend import __version__
from svend.command import tell
from svend.errors import ConfigError, PermissionRefused
from svend.pipeline.compare.figures import DRAWN, Comparison, draw_figures
from svend.pipeline.compare.predictions import fit_runs
from svend.pipeline.compare.report import comparability_line, comparison_html, count_runs
from svend.pipeline.compare.runs import (
    curves_frame,
    gates_frame,
    label_runs,
    order_runs,
    runs_frame,
)
from svend.pipeline.compare.selection import COMPARISON, Wanted, choose_runs
from svend.pipeline.console import make_console
from svend.pipeline.outcome import ended_as_left
from svend.pipeline.tags import NOTE_TAG
from svend.tracking.environment import environment_tags
from svend.tracking.history import LoggedRun
from svend.tracking.pages import (
    compare_page,
    is_local,
    prepare_scales_view,
    scales_page,
    ui_command,
)
from svend.tracking.run import TrackedRun
from svend.tracking.runs import MAX_TAG_LENGTH, configure_mlflow, joined_experiment_name, store_uri
from svend.tracking.store_errors import told_by_the_store

PAGE, TABLE, CURVES = "comparison.html", "comparison", "curves.parquet"
RUN_NAME = "comparison"
FILES = (PAGE, f"{TABLE}.parquet", f"{TABLE}.csv", CURVES, *(f"{f.name}.png" for f in DRAWN))


def compare(wanted: Wanted, out: Path, gpu_hour_price: float | None) -> dict[str, Any]:
    """Write the report of the runs into a folder, log it, and return where it is and the table.

    Raises UserError where a run is unknown or has no loss, or the folder cannot be written;
    nothing is written then. A user who may only read has the files, and the store has no run.
    """
    configure_mlflow()
    _check_folder(out)
    with told_by_the_store("compare"):
        chosen = choose_runs(wanted)
        runs = order_runs(chosen.runs)
        tell(f"compare: reading {len(runs)} runs, for a report in {out.absolute()}")
        comparison = read_comparison(runs, chosen.left_out, gpu_hour_price)
        experiment = joined_experiment_name() or runs[0].experiment
    pages = _pages(runs)
    # Beside nothing of the user's, until all of it is there.
    with TemporaryDirectory() as place:
        folder = Path(place)
        tell("compare: drawing")
        _write(comparison, folder, pages)
        _put(folder, out)
        run_id, refusal = None, None
        try:
            with told_by_the_store(f"{out / PAGE}, written but not logged"):
                run_id = _log(folder, experiment, runs, comparison)
                for experiment_id in {run.experiment_id for run in runs}:
                    prepare_scales_view(experiment_id)
        except PermissionRefused as refused:
            # Who may only read may compare, and has the files.
            refusal = refused
    logged = f"run {run_id}" if refusal is None else f"no: {refusal}"
    _say(make_console(), comparison, out, logged, pages)
    return {
        "report": (out / PAGE).absolute(), "folder": out.absolute(), "run_id": run_id,
        "left_out": comparison.left_out, "runs": comparison.runs.to_dict("records"),
    }


def read_comparison(
    runs: Sequence[LoggedRun], left_out: list[str], gpu_hour_price: float | None
) -> Comparison:
    """Read what the runs logged, and fit the law to it."""
    labels = label_runs(runs)
    curves, gates = curves_frame(runs, labels), gates_frame(runs, labels)
    frame = runs_frame(runs, labels, curves, gates, gpu_hour_price)
    return Comparison(frame, curves, gates, fit_runs(frame, curves), left_out, gpu_hour_price)


def _check_folder(out: Path) -> None:
    """Raise ConfigError if nothing can be written into the folder, or it cannot be made."""
    try:
        existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
        with TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"out = {out}: cannot be written ({error.strerror or error}); give another "
                       "folder")


def _write(comparison: Comparison, folder: Path, pages: Sequence[tuple[str, str]]) -> None:
    comparison.runs.to_parquet(folder / f"{TABLE}.parquet", index=False)
    comparison.runs.to_csv(folder / f"{TABLE}.csv", index=False)
    comparison.curves.to_parquet(folder / CURVES, index=False)
    figures = draw_figures(comparison, folder)
    made = f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by Svend {__version__}."
    page = comparison_html(comparison, figures, folder, made, pages)
    (folder / PAGE).write_text(page, encoding="utf-8")


def _put(folder: Path, out: Path) -> None:
    """Have the files in the user's folder, in place of those of an earlier comparison."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out, prefix=".") as name:
            # First all of them there, where a disk may fill up: then only renamings are left.
            beside = Path(shutil.copytree(folder, Path(name) / "files"))
            for file in FILES:
                if (beside / file).exists():
                    (beside / file).replace(out / file)
                else:
                    (out / file).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def _log(
    folder: Path, experiment: str, runs: Sequence[LoggedRun], comparison: Comparison
) -> str:
    """Log the files on a run of the comparison's own; return its id."""
    tracked = TrackedRun.begin(experiment, RUN_NAME)
    with ended_as_left(tracked):
        tracked.set_tags({
            **environment_tags(),
            COMPARISON: ",".join(run.run_id for run in runs)[:MAX_TAG_LENGTH],
            NOTE_TAG: comparability_line(comparison.runs)[:MAX_TAG_LENGTH],
        })
        tracked.log_artifacts(folder, RUN_NAME)
        tracked.flush()
    return tracked.run_id


def _pages(runs: Sequence[LoggedRun]) -> list[tuple[str, str]]:
    """Return where MLflow shows the runs."""
    uri = store_uri()
    experiments = list(dict.fromkeys(run.experiment_id for run in runs))
    pages = [("start MLflow", ui_command(uri))] if is_local(uri) else []
    pages.append(("side by side", compare_page(uri, experiments, [run.run_id for run in runs])))
    for label, as_charts in (("as columns", False), ("as charts", True)):
        pages += [(label, scales_page(uri, experiment, as_charts=as_charts))
                  for experiment in experiments]
    return pages


def _say(
    console: Console, comparison: Comparison, out: Path, logged: str,
    pages: Sequence[tuple[str, str]],
) -> None:
    """Print what the report says first, where it is, and what to type next."""
    lines = [
        ("compared", f"{count_runs(comparison.runs)}: {', '.join(comparison.runs['run'])}"),
        *(("left out", line) for line in comparison.left_out),
        ("", comparability_line(comparison.runs)),
        ("report", str((out / PAGE).absolute())),
        ("table", f"{TABLE}.csv, {TABLE}.parquet and {CURVES} beside it"),
        ("logged", logged),
        *pages,
    ]
    for label, text in lines:
        console.print(f"{label:<13} {text}", soft_wrap=True, markup=False)
