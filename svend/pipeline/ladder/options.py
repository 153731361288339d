"""What a ladder is: which scales, with which settings, and what each rung must show."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from svend.errors import ConfigError
from svend.pipeline.config import (
    DataConfig,
    ModelConfig,
    ModelScale,
    PipelineConfig,
    load_config,
)
from svend.pipeline.groups import read_group
from svend.pipeline.loading import MODEL_FACTORY, full_key, split_overrides
from svend.pipeline.options.defaults import require
from svend.pipeline.schema import build, flatten, parse_value, set_at, to_tree

PREFIX = "ladder."
ORDER = list(ModelScale)
# What rungs must have in common for one's loss to say something of the other's.
COMPARED = (
    "training.data", "training.schedule", "training.warmup_ratio", "training.decay_ratio",
    "training.min_learning_rate_ratio", "training.horizons", "training.heldout_sequences",
    "training.parametrisation", "training.optimizer", "model.vocab_size",
)
# Of these, what does not change what is trained on.
NOT_COMPARED = ("training.data.cache_dir", "training.data.path", "training.data.heldout_path",
                "training.data.processes")


class OnHold(Enum):
    """What becomes of a rung that is a little worse than predicted."""

    STOP = "stop"
    RERUN = "rerun"  # once, on another seed; the mean decides


class OnStress(Enum):
    """What becomes of a rung whose stress run diverges."""

    WARN = "warn"
    FAIL = "fail"


@dataclass(kw_only=True)
class TrendConfig:
    """Bounds of the loss against its prediction, as shares of the prediction."""

    hold_above: float
    stop_above: float
    investigate_below: float
    on_hold: OnHold
    early_stop_above: float
    early_in_a_row: int
    backtest_after: int


@dataclass(kw_only=True)
class StressConfig:
    """A short run at a multiple of the learning rate, before a rung."""

    steps: int
    rate_factor: float
    action: OnStress


@dataclass(kw_only=True)
class LadderConfig:
    """A ladder, but for what its rungs take from the configuration."""

    start: ModelScale
    end: ModelScale
    tokens_per_parameter: float | None
    trend: TrendConfig
    stress: StressConfig

    def check(self) -> None:
        """Raise ConfigError for a ladder that nobody can climb."""
        if ORDER.index(self.start) > ORDER.index(self.end):
            raise ConfigError(
                f"{PREFIX}start = {self.start.value}: is above {PREFIX}end = {self.end.value}; "
                f"the order is {', '.join(scale.value for scale in ORDER)}"
            )
        ratio = self.tokens_per_parameter
        _require(ratio is None or (math.isfinite(ratio) and ratio > 0), "tokens_per_parameter",
                 ratio, "null, or above 0")
        trend, stress = self.trend, self.stress
        for name in ("hold_above", "stop_above", "early_stop_above"):
            value = getattr(trend, name)
            _require(math.isfinite(value) and value > 0, f"trend.{name}", value, "above 0")
        _require(trend.hold_above <= trend.stop_above, "trend.hold_above", trend.hold_above,
                 f"at most ladder.trend.stop_above ({trend.stop_above})")
        below = trend.investigate_below
        _require(math.isfinite(below) and below < 0, "trend.investigate_below", below, "below 0")
        for name in ("early_in_a_row", "backtest_after"):
            _require(getattr(trend, name) >= 1, f"trend.{name}", getattr(trend, name), "at least 1")
        _require(stress.steps >= 0, "stress.steps", stress.steps, "at least 0; 0 runs none")
        _require(math.isfinite(stress.rate_factor) and stress.rate_factor > 0,
                 "stress.rate_factor", stress.rate_factor, "above 0")

    @property
    def scales(self) -> list[ModelScale]:
        """The rungs to climb, from the lowest."""
        return ORDER[ORDER.index(self.start) : ORDER.index(self.end) + 1]


@dataclass(frozen=True)
class Ladder:
    """A ladder as it was asked for, with the configuration of each rung.

    below: that of the rung below the first, which must be in the registry; None for the lowest.
    """

    config: LadderConfig
    rungs: Mapping[ModelScale, PipelineConfig]
    below: PipelineConfig | None

    @property
    def scales(self) -> list[ModelScale]:
        return self.config.scales

    @property
    def experiment(self) -> str:
        return self.rungs[self.config.start].training.experiment_name


def load_ladder(
    name: str, groups: Mapping[str, str], overrides: Sequence[tuple[str, str]]
) -> Ladder:
    """Compose a ladder from `conf/ladder/<name>.yaml` and overrides.

    Overrides with the prefix `ladder.` are the ladder's, the others those of every rung. Raises
    ConfigError, in one line, for what does not fit, and for rungs that cannot be compared.
    """
    if "scale" in groups:
        raise ConfigError(f"scale = {groups['scale']}: a ladder has several; give --start and "
                          "--end")
    tree = read_group("ladder", name)
    of_ladder, of_rungs = split_overrides(overrides, PREFIX)
    for key, text in of_rungs:
        if key == MODEL_FACTORY:
            raise ConfigError(
                f"{key} = {text}: svend ladder reckons with the scales' own models; from Python, "
                "PipelineRunner(config, model_factory=...).run_progressive() climbs with others"
            )
    for key, text in of_ladder:
        tree = set_at(tree, _path(key), parse_value(text))
    settings = {scale: _settings(tree, scale) for scale in ORDER}
    groups = {"preset": "full", **_groups(tree), **groups}
    for own in ("groups", "settings", "rungs"):
        del tree[own]
    config = build(LadderConfig, tree, prefix=PREFIX)
    config.check()
    if any(key == "training.max_steps" for key, _ in of_rungs):
        config = dataclasses.replace(config, tokens_per_parameter=None)
    first = ORDER.index(config.start)
    wanted = ORDER[max(0, first - 1) : ORDER.index(config.end) + 1]
    # As the configuration leaves it, before a scale's own figures are put in.
    by_hand = dict(of_rungs)

    def rung(scale: ModelScale, common: Mapping[str, str] = {}) -> PipelineConfig:
        # Later ones win: what is common, the ladder's settings, the rung's, what was set by hand.
        texts = {**common, **settings[scale], **by_hand}
        return load_config({**groups, "scale": scale.value}, list(texts.items()))

    told = {**settings[config.start], **by_hand}
    data = DataConfig(**{name: parse_value(told[f"training.data.{name}"])
                         for name in ("max_seq_length", "num_samples")
                         if f"training.data.{name}" in told})
    models = [model for scale in config.scales if (model := rung(scale).model) is not None]
    data = common_data(models, data)
    common = {"training.data.max_seq_length": str(data.max_seq_length),
              "training.data.num_samples": str(data.num_samples)}
    return make_ladder(config, {scale: rung(scale, common) for scale in wanted})


def default_ladder(start: ModelScale, end: ModelScale) -> LadderConfig:
    """Return a ladder of these scales whose rungs take their steps from their configuration."""
    tree = read_group("ladder", "default")
    for own in ("groups", "settings", "rungs"):
        del tree[own]
    config = build(LadderConfig, tree, prefix=PREFIX)
    return dataclasses.replace(config, start=start, end=end, tokens_per_parameter=None)


def make_ladder(
    config: LadderConfig, rungs: Mapping[ModelScale, PipelineConfig]
) -> Ladder:
    """Return a ladder of these rungs, each with the steps that its tokens take.

    The rung below the first may be among them. Raises ConfigError for rungs that differ in what
    must be the same.
    """
    config.check()
    rungs = {scale: _with_steps(rung.resolve(), config) for scale, rung in rungs.items()}
    scales = list(rungs)
    for below, above in itertools.pairwise(scales):
        for difference in find_differences(rungs[below], rungs[above]):
            raise ConfigError(
                f"rung {above.value}: {difference} at {below.value}: not comparable; set it alike "
                "for all rungs"
            )
    first = None if scales[0] is config.start else rungs.pop(scales[0])
    return Ladder(config, rungs, first)


def common_data(models: Sequence[ModelConfig], data: DataConfig) -> DataConfig:
    """Return data in which nothing is left to a scale that has its own.

    The length of a sequence is then the shortest context, and the generated documents are as many
    as the largest rung wants.
    """
    length, samples = data.max_seq_length, data.num_samples
    if length is None:
        length = min(model.max_position_embeddings for model in models)
    if samples is None:
        samples = max(model.recommended_samples for model in models)
    return dataclasses.replace(data, max_seq_length=length, num_samples=samples)


def _with_steps(rung: PipelineConfig, config: LadderConfig) -> PipelineConfig:
    if config.tokens_per_parameter is None:
        return rung
    training, model = rung.training, rung.model
    assert model is not None and training.data.max_seq_length is not None  # resolved
    tokens = config.tokens_per_parameter * model.num_matrix_parameters()
    per_step = (training.batch_size * training.gradient_accumulation_steps
                * training.data.max_seq_length)
    training = dataclasses.replace(training, max_steps=math.ceil(tokens / per_step))
    return dataclasses.replace(rung, training=training)


def attempt_config(
    ladder: Ladder, scale: ModelScale, seed: int, checkpoint_dir: str, experiment: str
) -> PipelineConfig:
    """Return the configuration of an attempt at a rung: the rung's, but for the seed.

    Data and what is held out stay those of the rung, so that attempts can be compared.
    """
    rung = _with_data_seed(ladder.rungs[scale])
    training = dataclasses.replace(rung.training, seed=seed, experiment_name=experiment)
    return dataclasses.replace(rung, training=training, checkpoint_dir=checkpoint_dir)


def _with_data_seed(config: PipelineConfig) -> PipelineConfig:
    data = dataclasses.replace(config.training.data, seed=config.training.data_seed)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, data=data))


def find_differences(below: PipelineConfig, above: PipelineConfig) -> list[str]:
    """Name every setting by which the losses of two rungs say nothing of each other."""
    was, now = (flatten(to_tree(_with_data_seed(config))) for config in (below, above))
    return [
        f"{key} is {now.get(key)}, {was.get(key)}"
        for key in sorted({*was, *now})
        if any(key == part or key.startswith(f"{part}.") for part in COMPARED)
        and key not in NOT_COMPARED and was.get(key) != now.get(key)
    ]


def _groups(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the groups of the configuration that a ladder chooses, where nobody else does."""
    told = tree["groups"]
    _require(isinstance(told, dict) and set(told) <= {"data", "gates", "preset"}, "groups", told,
             "a mapping of data, gates and preset")
    return {str(group): str(member) for group, member in told.items()}


def _settings(tree: Mapping[str, Any], scale: ModelScale) -> dict[str, str]:
    """Return what a ladder sets for a scale, as texts by dotted key; the scale's own wins."""
    of_scales = tree["rungs"] or {}
    known = [scale.value for scale in ORDER]
    _require(isinstance(of_scales, dict) and set(of_scales) <= set(known), "rungs", of_scales,
             f"a mapping of {', '.join(known)}")
    texts: dict[str, str] = {}
    for where, settings in (("settings", tree["settings"]),
                            (f"rungs.{scale.value}", of_scales.get(scale.value))):
        _require(isinstance(settings, dict | None), where, settings,
                 "a mapping of keys, such as {training.schedule: wsd}")
        texts |= {full_key(key): json.dumps(value) for key, value in (settings or {}).items()}
    return texts


def _path(key: str) -> list[str]:
    """Return the parts of a dotted key. The keys of some mappings are dotted themselves."""
    parts = key.split(".")
    if parts[0] == "settings" and len(parts) > 1:
        return ["settings", key.removeprefix("settings.")]
    if parts[0] == "rungs" and len(parts) > 2:
        return ["rungs", parts[1], ".".join(parts[2:])]
    return parts


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    require(condition, f"{PREFIX}{key}", value, allowed)
