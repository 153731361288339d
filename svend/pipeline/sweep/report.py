"""What a sweep leaves for people: tables, one page, plots to touch and plots to print."""

from __future__ import annotations

import contextlib
import html
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna import visualization as interactive
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table
from rich.text import Text

from svend.pipeline.hyperparameters import HYPERPARAMETERS, FoundAt, Hyperparameters
from svend.pipeline.report import format_value
from svend.pipeline.sweep.confirmation import LEARNING_RATE, Candidate, Measured, Rule
from svend.pipeline.sweep.options import Sweep
from svend.pipeline.sweep.storage import Place
from svend.pipeline.sweep.study import REASON, RUN, SweepStudy, origin_of
from svend.pipeline.tags import NOTE_TAG
from svend.tracking.environment import environment_tags
from svend.tracking.run import TrackedRun
from svend.tracking.runs import tags_of

SHOWN_TRIALS = 10
SUMMARY, PLOTS, TRIALS, RERUNS = "summary.html", "plots.html", "trials.csv", "reruns.csv"
# How a trial ended, as a person says it.
STATES = {
    TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed",
    TrialState.RUNNING: "running", TrialState.WAITING: "waiting",
}
STYLE = (
    "body{font:13px sans-serif;max-width:1100px;margin:1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:3px 8px;text-align:left}"
)


def record_sweep(
    tracked: TrackedRun, sweep: Sweep, place: Place, search: SweepStudy,
    winner: Candidate | None, rules: Sequence[Rule], reruns: Measured,
) -> None:
    """Log the sweep's tables, page and plots on its run."""
    promotable = bool(rules) and all(rule.holds for rule in rules)
    trials = trials_frame(search)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trials.to_csv(folder / TRIALS, index=False)
        reruns_frame(reruns).to_csv(folder / RERUNS, index=False)
        notes = _draw(search, folder)
        page = _summary(sweep, place, trials, winner, rules, reruns, notes)
        (folder / SUMMARY).write_text(page, encoding="utf-8")
        tracked.log_artifacts(folder, "sweep")
    if winner is not None:
        result = _hyperparameters(tracked, sweep, place, search, winner, rules)
        tracked.log_text(result.to_yaml(), HYPERPARAMETERS)
    counts = trials["state"].value_counts()
    best = next(iter(search.ended()), None)
    steps = sum(t.last_step or 0 for t in search.trials)
    tracked.log_metrics(
        {
            **{f"sweep/{state.replace(' ', '_')}_trials": float(counts.get(state, 0))
               for state in STATES.values()},
            "sweep/steps": float(steps),
            "sweep/steps_share": steps / (sweep.config.steps * max(1, len(trials))),
            **({} if best is None or best.value is None else {"sweep/best_loss": best.value}),
        },
        0,
    )
    tracked.set_tags({
        "svend.promotable": str(promotable).lower(),
        NOTE_TAG: _note(place, winner, rules, promotable),
    })
    tracked.flush()


def _hyperparameters(
    tracked: TrackedRun, sweep: Sweep, place: Place, search: SweepStudy, winner: Candidate,
    rules: Sequence[Rule],
) -> Hyperparameters:
    """Return the winner's values as they may, or may not, be carried upward."""
    config = sweep.trial_config(winner.values)
    run_id = next((str(t.user_attrs[RUN]) for t in search.ended()
                   if t.params == winner.values and RUN in t.user_attrs), None)
    fingerprint = tags_of(run_id).get("svend.data_fingerprint") if run_id else None
    return Hyperparameters(
        values=dict(winner.values),
        found_at=FoundAt.of(config, sweep.config.steps),
        promotable=all(rule.holds for rule in rules),
        why=[f"{rule.name}: {rule.why}" for rule in rules if not rule.holds],
        study=place.study,
        sweep_run_id=tracked.run_id,
        git_commit=environment_tags().get("svend.git_commit", "unknown"),
        recipe=config.training.data.recipe,
        data_fingerprint=fingerprint or "unknown",
    )


def trials_frame(search: SweepStudy) -> pd.DataFrame:
    """Return a row per trial: its number, how it ended, loss, steps, values, run and reason."""
    rows = [
        {
            "trial": origin_of(trial),
            "state": state_of(trial),
            "loss": trial.value if trial.state is TrialState.COMPLETE else _last_loss(trial),
            "steps": trial.last_step or 0,
            **trial.params,
            "run": trial.user_attrs.get(RUN, ""),
            "reason": trial.user_attrs.get(REASON, ""),
        }
        for trial in search.trials
    ]
    return pd.DataFrame(rows, columns=None if rows else ["trial", "state", "loss", "steps"])


def reruns_frame(reruns: Measured) -> pd.DataFrame:
    """Return a row per condition and candidate: mean and losses by seed, best first."""
    return pd.DataFrame(
        {
            "condition": condition, "candidate": name, "mean": of_condition.mean(name),
            **{f"seed {seed}": loss for seed, loss in sorted(of_condition.losses[name].items())},
        }
        for condition, of_condition in sorted(reruns.items())
        for name in sorted(of_condition.losses, key=of_condition.mean)
    )


def state_of(trial: FrozenTrial) -> str:
    """Return how a trial ended; one that diverged has a loss for the sampler only."""
    if any(value > 0 for value in trial.constraints.values()):
        return "diverged"
    return STATES[trial.state]


def trials_table(search: SweepStudy) -> Table:
    """Return the best trials as a table."""
    trials = search.trials
    table = Table(title=f"The best of {len(trials)} trials", title_justify="left")
    table.add_column("trial", justify="right", overflow="fold")
    table.add_column("loss", justify="right", overflow="fold")
    best = search.ended()[:SHOWN_TRIALS]
    keys = list(dict.fromkeys(key for trial in best for key in trial.params))
    for key in keys:
        table.add_column(key.removeprefix("training."), justify="right", overflow="fold")
    for trial in best:
        loss = "diverged" if state_of(trial) == "diverged" else f"{trial.value:.4f}"
        values = (format_value(trial.params.get(key)) for key in keys)
        table.add_row(str(origin_of(trial)), loss, *values)
    return table


def rules_table(rules: Sequence[Rule]) -> Table:
    """Return the conditions for carrying the result upward as a table."""
    table = Table(title="May the result be carried upward?", title_justify="left")
    for name in ("condition", "holds", "measured"):
        table.add_column(name, overflow="fold")
    for rule in rules:
        holds = Text("yes", style="green") if rule.holds else Text("NO", style="bold red")
        table.add_row(rule.name, holds, rule.why)
    return table


def _last_loss(trial: FrozenTrial) -> float:
    last = trial.last_step
    return math.nan if last is None else trial.intermediate_values[last]


def _note(
    place: Place, winner: Candidate | None, rules: Sequence[Rule], promotable: bool
) -> str:
    lines = [f"Sweep **{place.study}**: {'promotable' if promotable else 'not promotable'}."]
    if winner is not None:
        values = ", ".join(f"`{key}` {format_value(value)}" for key, value in winner.values.items())
        lines.append(f"Best on fresh seeds: {winner.name}, {values}.")
    lines += [f"- {'holds' if rule.holds else 'FAILS'}: {rule.name}: {rule.why}" for rule in rules]
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def _summary(
    sweep: Sweep, place: Place, trials: pd.DataFrame, winner: Candidate | None,
    rules: Sequence[Rule], reruns: Measured, notes: Sequence[str],
) -> str:
    """Return the page: the verdict and why, the values, the reruns, the trials."""
    promotable = bool(rules) and all(rule.holds for rule in rules)
    default = sweep.default_values()
    name, best = _winner_or_best(winner, trials, sweep)
    values = pd.DataFrame(
        {"key": d.key, "searched": d.describe(), "default": format_value(default[d.key]),
         name: format_value(best.get(d.key, "none"))}
        for d in sweep.space
    )
    again = reruns_frame(reruns)
    verdict = pd.DataFrame(
        {"condition": r.name, "holds": "yes" if r.holds else "NO", "measured": r.why}
        for r in rules
    )
    ordered = trials.sort_values(["loss"], na_position="last")
    parts = [
        f"<h1>{html.escape(place.study)}: {'promotable' if promotable else 'not promotable'}</h1>",
        "" if promotable else "<p>The default stays: carry nothing upward.</p>",
        _table(verdict), "<h2>Values</h2>", _table(values),
        "<h2>Reruns on fresh seeds</h2>", "<p>none</p>" if again.empty else _table(again),
        f"<h2>All trials</h2><p>Plots: {PLOTS}, and as PNG beside it. "
        f"{html.escape(' '.join(notes))}</p>",
        _table(ordered),
    ]
    body = "\n".join(parts).replace("<td>NO</td>", '<td style="background:#f8c8c8">NO</td>')
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{body}"


def _winner_or_best(
    winner: Candidate | None, trials: pd.DataFrame, sweep: Sweep
) -> tuple[str, dict[str, Any]]:
    """Return the winner's values, or those of the best trial where nothing was run again."""
    if winner is not None:
        return f"winner, {winner.name}", dict(winner.values)
    complete = trials[trials["state"] == "complete"]
    if complete.empty:
        return "best trial", {}
    best = complete.sort_values("loss").iloc[0]
    return f"best, trial {best['trial']}", {d.key: best[d.key] for d in sweep.space}


def _table(frame: pd.DataFrame) -> str:
    return str(frame.to_html(index=False, float_format=lambda x: f"{x:.5g}", na_rep=""))


def _draw(search: SweepStudy, folder: Path) -> list[str]:
    """Draw everything twice, to touch and to print; return a note on what could not be drawn."""
    # Only what counts: lost and surplus trials are none.
    study = optuna.create_study(direction="minimize")
    study.add_trials([t for t in search.trials if t.state.is_finished()])
    complete = [t for t in study.get_trials(deepcopy=False) if state_of(t) == "complete"]
    if len(complete) < 2:
        return ["No plots: fewer than two trials ran to their end."]
    import matplotlib as mpl

    mpl.use("Agg")
    from optuna.visualization import matplotlib as printed

    ranges = {key for trial in complete for key in trial.params}
    wanted = ["optimization_history", "intermediate_values", "parallel_coordinate", "slice"]
    notes = []
    if len(ranges) > 1:
        wanted += ["contour"]
        spread = {trial.value for trial in complete}
        if len(complete) > 3 and len(spread) > 1:
            wanted += ["param_importances"]
        else:
            notes.append("No importances: fewer than four trials ran to their end.")
    figures = []
    with _quiet():
        for name in wanted:
            figures.append(_interactive(name)(study))
            _save_printed(getattr(printed, f"plot_{name}")(study), folder / f"{name}.png")
        if LEARNING_RATE in ranges:
            figures.append(_rate_against_loss(complete))
            _print_rate_against_loss(complete, folder / "learning_rate.png")
    pages = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0)
        for number, figure in enumerate(figures)
    ]
    (folder / PLOTS).write_text(
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>" + "\n".join(pages),
        encoding="utf-8",
    )
    return notes


def _interactive(name: str) -> Callable[[optuna.Study], Any]:
    plot: Callable[[optuna.Study], Any] = getattr(interactive, f"plot_{name}")
    return plot


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna calls its matplotlib plots experimental, and both warn where few trials are."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    optuna.logging.set_verbosity(before)


def _save_printed(axes: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure = axes.flat[0].figure if hasattr(axes, "flat") else axes.figure
    figure.set_size_inches(10, 6)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _rate_against_loss(trials: Sequence[FrozenTrial]) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure(go.Scatter(
        x=[trial.params[LEARNING_RATE] for trial in trials],
        y=[trial.value for trial in trials], mode="markers",
        text=[f"trial {origin_of(trial)}" for trial in trials],
    ))
    figure.update_layout(title="Learning rate against held-out loss",
                         xaxis={"type": "log", "title": LEARNING_RATE},
                         yaxis={"title": "held-out loss"})
    return figure


def _print_rate_against_loss(trials: Sequence[FrozenTrial], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    losses = [math.nan if trial.value is None else trial.value for trial in trials]
    axis.scatter([trial.params[LEARNING_RATE] for trial in trials], losses)
    axis.set(xscale="log", xlabel=LEARNING_RATE, ylabel="held-out loss")
    figure.savefig(path, dpi=110)
    plt.close(figure)

