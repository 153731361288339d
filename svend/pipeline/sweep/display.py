"""What a sweep shows a person before and while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from svend.device import describe_device, resolve_device, resolve_precision
from svend.pipeline.progress import TerminalBar
from svend.pipeline.report import format_seconds
from svend.pipeline.sweep.confirmation import LEARNING_RATE
from svend.pipeline.sweep.options import Pruner, Sweep
from svend.pipeline.sweep.storage import Place
from svend.pipeline.sweep.study import best_first, name_of
from svend.planning.plan import check_memory, choose_micro_batch, plan_run


def show_plan(console: Console, sweep: Sweep, place: Place) -> None:
    """Print what the sweep will do and cost, before it does."""
    settings, config = sweep.config, sweep.trial_config({})
    model, training = config.model, config.training
    assert model is not None  # set by PipelineConfig.resolve
    table = Table(title=f"Sweep: {place.study}", show_header=False, title_justify="left")
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    default = sweep.default_values()
    for dimension in sweep.space:
        table.add_row(dimension.key, f"{dimension.describe()} (now {default[dimension.key]})")
    table.add_row("proxy", f"{model.name}: width {model.hidden_size}, {model.num_hidden_layers} "
                           f"layers, {model.num_parameters():,} parameters")
    table.add_row("data", f"{training.data.recipe}: {', '.join(training.data.sources)}")
    device = resolve_device(training.device)
    training = replace(training, precision=resolve_precision(training.precision, device))
    training = choose_micro_batch(model, training, device)
    plan = plan_run(
        training, model, settings.steps, check_memory(model, training, device), device, None
    )
    table.add_row("a trial", f"{settings.steps} steps of {plan.tokens_per_step:,} tokens, "
                             f"{format_seconds(plan.seconds)} on {describe_device(device)}")
    trials = sweep.wanted_trials
    share = _expected_share(sweep)
    table.add_row(
        "search", f"{trials} trials by {settings.sampler.value}, at most "
        f"{format_seconds(trials * plan.seconds)}; with pruner {settings.pruner.value} about "
        f"{format_seconds(trials * plan.seconds * share)}",
    )
    confirm = settings.confirm
    reruns = (confirm.top + 1) * confirm.seeds * (2 if confirm.second_width else 1)
    reruns += confirm.seeds if any(d.key == LEARNING_RATE for d in sweep.space) else 0
    reruns = reruns if confirm.top else 0
    table.add_row("confirmation", f"{reruns} reruns of the best {confirm.top} and the default, at "
                                  f"most {format_seconds(reruns * plan.seconds)}")
    table.add_row("workers", f"{settings.workers} here; more join with --join")
    table.add_row("kept in", place.shown)
    console.print(table)


def _expected_share(sweep: Sweep) -> float:
    """Return the share of all steps that halving leaves: a part of the trials at each rung."""
    settings = sweep.config
    if settings.pruner is not Pruner.HALVING:
        return 1.0
    rung = max(settings.report_steps, round(settings.prune_from * settings.steps))
    share, reached, left = 0.0, 0, 1.0
    while rung < settings.steps:
        share += left * (rung - reached) / settings.steps
        reached, rung, left = rung, rung * settings.reduction, left / settings.reduction
    return share + left * (settings.steps - reached) / settings.steps


class SweepProgress(TerminalBar):
    """A bar with the best so far; a plain line for each trial that ends elsewhere."""

    def __init__(
        self, console: Console, what: str, wanted: int, look: Callable[[], list[FrozenTrial]]
    ) -> None:
        super().__init__(
            console, TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[best]}"),
        )
        self._look = look
        self._wanted = wanted
        self.ended = 0
        self._task = self._bar.add_task(what, total=wanted, best="")
        self._what = what

    def update(self) -> bool:
        """Show what has ended since; return whether all have."""
        ended = [trial for trial in self._look() if trial.state.is_finished()]
        best = next(iter(best_first(ended)), None)
        text = "" if best is None else f"best {best.value:.4f} ({name_of(best)})"
        pruned = sum(t.state is TrialState.PRUNED for t in ended)
        failed = sum(t.state is TrialState.FAIL for t in ended)
        text += f"{', ' if text else ''}{pruned} stopped early" if pruned else ""
        text += f"{', ' if text else ''}{failed} failed" if failed else ""
        self._bar.update(self._task, completed=len(ended), best=text)
        if len(ended) != self.ended:
            self.show_line(f"{self._what}: {len(ended)}/{self._wanted}  {text}", at_once=True)
        self.ended = len(ended)
        return self.ended >= self._wanted
