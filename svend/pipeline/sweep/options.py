"""What a sweep searches, with which means, at which cost; from `conf/sweep/` and a command line."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from svend.errors import ConfigError
from svend.pipeline.config import PipelineConfig, load_config
from svend.pipeline.groups import read_group
from svend.pipeline.loading import MAY_CHANGE, MODEL_FACTORY, full_key, split_overrides, value_at
from svend.pipeline.options.defaults import require
from svend.pipeline.schema import build, parse_value, set_at, to_tree

Value = float | int | str | bool | None
Settings = dict[str, Any]
PREFIX = "sweep."
SET_BY_SWEEP = {"training.max_steps": "sweep.steps", "training.save_steps": "sweep.report_steps"}


class Sampler(Enum):
    """What chooses the next trial."""

    TPE = "tpe"
    GP = "gp"
    RANDOM = "random"
    GRID = "grid"


class Pruner(Enum):
    """What stops a trial before its end."""

    HALVING = "halving"  # asynchronous successive halving
    MEDIAN = "median"
    NONE = "none"


@dataclass(kw_only=True)
class Confirmation:
    """How a sweep's result is tried again before it may be carried upward.

    errors_apart: standard errors by which a difference is taken for one. max_rise: of the loss at
    twice the learning rate, as a share.
    """

    top: int
    seeds: int
    errors_apart: float
    max_rise: float
    second_width: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class SweepConfig:
    """A sweep but for its space. `steps` and what stands in steps are optimizer steps.

    silence_seconds: without a heartbeat, after which a process of another machine counts as dead.
    """

    sampler: Sampler
    grid_points: int
    pruner: Pruner
    prune_from: float
    reduction: int
    trials: int
    workers: int
    steps: int
    report_steps: int
    seed: int
    silence_seconds: float
    confirm: Confirmation
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ConfigError for a sweep that could find nothing."""
        for name in ("trials", "workers", "steps", "report_steps", "grid_points"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.report_steps <= self.steps, "report_steps", self.report_steps,
                 f"at most sweep.steps ({self.steps})")
        _require(0 <= self.prune_from < 1, "prune_from", self.prune_from, "at least 0, below 1")
        _require(self.reduction >= 2, "reduction", self.reduction, "at least 2")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and below 2^31")
        _require(math.isfinite(self.silence_seconds) and self.silence_seconds > 0,
                 "silence_seconds", self.silence_seconds, "above 0")
        confirm = self.confirm
        _require(confirm.top >= 0, "confirm.top", confirm.top, "at least 0; 0 confirms nothing")
        _require(confirm.seeds >= 2, "confirm.seeds", confirm.seeds,
                 "at least 2: noise is measured between them")
        for name in ("errors_apart", "max_rise"):
            value = getattr(confirm, name)
            _require(math.isfinite(value) and value > 0, f"confirm.{name}", value, "above 0")


@dataclass(frozen=True)
class Dimension:
    """One key of the space: a range, or choices."""

    key: str
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()

    @property
    def integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self, points: int) -> list[Value]:
        """Return the values of a grid: the choices, or so many points of the range."""
        if self.choices:
            return list(self.choices)
        shares = [i / (points - 1) for i in range(points)] if points > 1 else [0.5]
        if self.log:
            values = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            values = [self.low + (self.high - self.low) * share for share in shares]
        if self.step is not None:
            steps = [round((value - self.low) / self.step) for value in values]
            values = [min(self.low + n * self.step, self.high) for n in steps]
        return list(dict.fromkeys(round(v) if self.integer else v for v in values))

    def at_edge(self, value: Value) -> str | None:
        """Return the edge, "low" or "high", of which a value is within a twentieth of the range."""
        if self.choices or not isinstance(value, int | float):
            return None
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return "low" if share < 0.05 else "high" if share > 0.95 else None

    def describe(self) -> str:
        """Return the dimension as a person writes it."""
        if self.choices:
            return ", ".join("null" if choice is None else str(choice) for choice in self.choices)
        how = ", logarithmic" if self.log else ""
        how += f", in steps of {self.step:g}" if self.step is not None else ""
        return f"{self.low:g} to {self.high:g}{how}"


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for: its settings, its space, and the config that trials vary."""

    config: SweepConfig
    space: tuple[Dimension, ...]
    groups: dict[str, str]
    overrides: tuple[tuple[str, str], ...]

    @property
    def scale(self) -> str:
        return self.groups.get("scale", "tiny")

    def trial_config(
        self, values: Mapping[str, Value], changes: Mapping[str, Any] | None = None
    ) -> PipelineConfig:
        """Return the config of a trial with these values, and `changes` that win over the proxy."""
        settings = {
            "model.name": f"svend-sweep-{self.scale}",
            "eval_benchmarks": [],
            # A bad trial is stopped by comparison, not by a threshold made for whole runs.
            "strict_validation": False,
            "training.logging_steps": 5,
            "training.quick_gate_steps": self.config.report_steps,
            "training.save_total_limit": 1,
            **self.config.settings,
        }
        own = {"training.max_steps": self.config.steps,
               "training.save_steps": self.config.report_steps, **(changes or {}), **values}
        # Later ones win: the proxy, what was set by hand, what the trial is.
        texts = {full_key(key): json.dumps(value) for key, value in settings.items()}
        texts |= {full_key(key): text for key, text in self.overrides}
        texts |= {full_key(key): json.dumps(value) for key, value in own.items()}
        return load_config(self.groups, list(texts.items()))

    @property
    def wanted_trials(self) -> int:
        """How many trials there are to be: the points of a grid, or as many as were asked for."""
        if self.config.sampler is not Sampler.GRID:
            return self.config.trials
        return len(self.grid_points())

    def default_values(self) -> dict[str, Value]:
        """Return what the keys of the space are where nobody searches."""
        config = self.trial_config({})
        return {dimension.key: value_at(config, dimension.key) for dimension in self.space}

    def grid(self) -> dict[str, list[Value]]:
        """Return the values of each key on the grid."""
        return {d.key: d.grid(self.config.grid_points) for d in self.space}

    def grid_points(self) -> list[dict[str, Value]]:
        """Return every point of the grid."""
        grid = self.grid()
        return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]

    def definition(self) -> str:
        """Return, as JSON, what makes trials of one study comparable.

        Where things lie is no part of it: a worker of another machine has other folders.
        """
        config = to_tree(self.config)
        # A study may be given more of these.
        for name in ("trials", "workers", "confirm", "silence_seconds"):
            del config[name]
        return json.dumps(
            {"space": {d.key: d.describe() for d in self.space}, "groups": self.groups,
             "overrides": {key: text for key, text in self.overrides if key not in MAY_CHANGE},
             **config},
            sort_keys=True,
        )


def load_sweep(
    name: str, groups: Mapping[str, str], overrides: Sequence[tuple[str, str]],
    search: str | None = None,
) -> Sweep:
    """Compose a sweep from `conf/sweep/<name>.yaml`, overrides, and a YAML mapping of the space.

    Overrides with the prefix `sweep.` are the sweep's, the others those of every trial. Raises
    ConfigError, in one line, for an unknown key, an empty range, or a value that no run can have.
    """
    tree = read_group("sweep", name)
    space = dict(tree.pop("space"))
    of_sweep, of_trials = split_overrides(overrides, PREFIX)
    for key, text in of_sweep:
        tree = set_at(tree, _path(key), parse_value(text))
    for key, text in of_trials:
        if key == MODEL_FACTORY:
            raise ConfigError(
                f"{key} = {text}: a sweep makes its proxy, and the second width that confirms it, "
                "by model.*, which a factory does not read; try learning rates run by run"
            )
        if key in SET_BY_SWEEP:
            raise ConfigError(f"{key} = {text}: a sweep sets it; give {SET_BY_SWEEP[key]}")
    if search is not None:
        searched = parse_value(search)
        if not isinstance(searched, dict):
            raise ConfigError(
                f"search = {search}: must be a mapping of keys, such as "
                "'{training.learning_rate: {low: 1e-4, high: 1e-2, log: true}}'"
            )
        space |= {str(key): value for key, value in searched.items()}
    config = build(SweepConfig, tree, prefix=PREFIX)
    config.check()
    dimensions = tuple(
        _dimension(key, value) for key, value in space.items() if value is not None
    )
    if not dimensions:
        raise ConfigError("sweep.space: is empty; name at least one key to search")
    fixed = {key for key, _ in of_trials} & {full_key(d.key) for d in dimensions}
    if fixed:
        raise ConfigError(
            f"{min(fixed)}: is in the sweep's space and set by hand; leave out one, such as with "
            f"--search '{{{min(fixed)}: null}}'"
        )
    sweep = Sweep(config, dimensions, dict(groups), tuple(of_trials))
    _try_values(sweep)
    return sweep


def _dimension(key: str, told: Any) -> Dimension:
    """Read one entry of the space."""
    where = f"{PREFIX}space.{key}"
    if isinstance(told, list):
        if len(set(map(str, told))) < 2:
            raise ConfigError(f"{where} = {told}: must have at least two choices")
        return Dimension(key, choices=tuple(told))
    if not isinstance(told, dict) or not {"low", "high"} <= set(told):
        raise ConfigError(
            f"{where} = {told}: must be {{low: A, high: B}}, with log: true or step: N where "
            "wanted, or a list of choices"
        )
    unknown = set(told) - {"low", "high", "log", "step"}
    if unknown:
        raise ConfigError(f"unknown key {where}.{min(unknown)}: known: low, high, log, step")
    low, high, log, step = told["low"], told["high"], told.get("log", False), told.get("step")
    for name, value in (("low", low), ("high", high), ("step", 1 if step is None else step)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ConfigError(f"{where}.{name} = {value}: must be a number")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log = {log}: must be true or false")
    if not low < high:
        raise ConfigError(f"{where}: the range from {low:g} to {high:g} is empty; low must be "
                          "below high")
    if log and low <= 0:
        raise ConfigError(f"{where}.low = {low:g}: must be above 0 where log is true")
    if step is not None and (step <= 0 or log):
        raise ConfigError(f"{where}.step = {step:g}: must be above 0, and not beside log: true")
    return Dimension(key, low, high, log, step)


def _try_values(sweep: Sweep) -> None:
    """Have the schema refuse an unknown key or an impossible value before the first trial."""
    base = sweep.trial_config({})
    for dimension in sweep.space:
        for value in dimension.choices or (dimension.low, dimension.high):
            sweep.trial_config({dimension.key: value})
    if sweep.config.confirm.second_width:
        second = sweep.trial_config({}, sweep.config.confirm.second_width)
        assert base.model is not None and second.model is not None  # load_config resolves
        if second.model.hidden_size == base.model.hidden_size:
            raise ConfigError(
                f"sweep.confirm.second_width: has the proxy's width, {base.model.hidden_size}; "
                "set another model.hidden_size"
            )


def _path(key: str) -> list[str]:
    """Return the parts of a dotted key. The keys of some mappings are dotted themselves."""
    for whole in ("settings", "confirm.second_width"):
        if key.startswith(f"{whole}."):
            return [*whole.split("."), key.removeprefix(f"{whole}.")]
    return key.split(".")


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    require(condition, f"{PREFIX}{key}", value, allowed)
