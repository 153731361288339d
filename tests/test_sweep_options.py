"""A sweep's space and settings: read as written, and refused in one line where they cannot be."""

from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svend.errors import ConfigError
from svend.pipeline.sweep.options import Dimension, Sweep, load_sweep

LOG_RATE = "{training.learning_rate: {low: 1e-4, high: 1e-2, log: true}}"


@cache
def load(search: str | None = None, **overrides: str) -> Sweep:
    named = [(key.replace("__", "."), text) for key, text in overrides.items()]
    return load_sweep("minute", {"scale": "tiny"}, named, search)


def test_a_key_is_added_and_another_leaves_the_space() -> None:
    sweep = load("{training.adam_beta2: [0.95, 0.99], training.weight_decay: null}")
    assert [d.key for d in sweep.space] == ["training.learning_rate", "training.adam_beta2"]
    assert sweep.space[1].choices == (0.95, 0.99)


def test_a_trial_has_its_values_on_the_proxy_and_the_users_settings_win() -> None:
    sweep = load(training__batch_size="3", model__hidden_size="128", sweep__steps="77")
    config = sweep.trial_config({"training.learning_rate": 0.0123})
    assert config.training.learning_rate == 0.0123
    assert config.training.max_steps == 77
    assert config.training.batch_size == 3
    assert config.model is not None
    assert config.model.hidden_size == 128
    assert config.model.name == "svend-sweep-tiny"
    assert config.eval_benchmarks == []


def test_a_second_width_is_laid_over_the_proxy() -> None:
    sweep = load()
    config = sweep.trial_config({}, {**sweep.config.confirm.second_width, "training.seed": 5})
    assert config.model is not None
    assert (config.model.hidden_size, config.training.seed) == (32, 5)


def test_a_setting_of_the_proxy_gives_way_by_its_long_name_too() -> None:
    for key in ("data.num_samples", "training.data.num_samples"):
        assert load(**{key: "123"}).trial_config({}).training.data.num_samples == 123


def test_a_mapping_is_replaced_as_a_whole_and_by_its_keys() -> None:
    assert load(sweep__confirm__second_width="{}").config.confirm.second_width == {}
    changed = load(**{"sweep.settings.data.num_samples": "7"}).config.settings
    assert changed == {**load().config.settings, "data.num_samples": 7}


@pytest.mark.parametrize(
    ("search", "overrides", "told"),
    [
        ("{training.lerning_rate: [1, 2]}", {}, "unknown key training.lerning_rate"),
        ("{training.learning_rate: {low: 2, high: 1}}", {}, "the range from 2 to 1 is empty"),
        ("{training.learning_rate: {low: 1, high: 1}}", {}, "is empty"),
        ("{training.learning_rate: {low: 0, high: 1, log: true}}", {}, "must be above 0"),
        ("{training.learning_rate: {low: a, high: 1}}", {}, "must be a number"),
        ("{training.learning_rate: {low: .nan, high: 1}}", {}, "must be a number"),
        ("{training.learning_rate: {low: 1e-3}}", {}, "must be {low: A, high: B}"),
        ("{training.learning_rate: {low: 1e-3, high: 1, lag: true}}", {}, "unknown key"),
        ("{training.optimizer: [adamw]}", {}, "at least two choices"),
        ("{training.optimizer: [adamw, lion]}", {}, "must be one of adamw, muon"),
        ("{training.warmup_ratio: {low: 0.5, high: 2}}", {}, "between 0 and 1"),
        ("3", {}, "must be a mapping"),
        ("{training.learning_rate: null, training.weight_decay: null}", {}, "is empty"),
        (None, {"sweep__trials": "0"}, "sweep.trials = 0: must be at least 1"),
        (None, {"sweep__workers": "0"}, "sweep.workers = 0: must be at least 1"),
        (None, {"sweep__sampler": "cmaes"}, "sweep.sampler = cmaes: must be one of tpe, gp"),
        (None, {"sweep__trails": "3"}, "unknown key sweep.trails: did you mean sweep.trials?"),
        (None, {"sweep__report_steps": "100"}, "at most sweep.steps"),
        (None, {"training__max_steps": "9"}, "= 9: a sweep sets it; give sweep.steps"),
        (None, {"training__learning_rate": "1e-3"}, "is in the sweep's space and set by hand"),
        (None, {"sweep__confirm__second_width__model.hidden_size": "64",
                "sweep__confirm__second_width__model.num_attention_heads": "2"},
         "has the proxy's width, 64"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    search: str | None, overrides: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(search, **overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="unknown sweep 'nope': choose one of default, minute"):
        load_sweep("nope", {"scale": "tiny"}, [])


def test_the_definition_changes_with_the_space_and_not_with_the_number_of_trials() -> None:
    assert load(sweep__trials="5").definition() == load(sweep__trials="9").definition()
    assert load(LOG_RATE).definition() != load().definition()
    assert load(sweep__steps="70").definition() != load().definition()
    assert load(training__batch_size="3").definition() != load().definition()
    assert load(checkpoint_dir="elsewhere", data__cache_dir="x").definition() == load().definition()


@given(
    low=st.floats(1e-6, 1.0), ratio=st.floats(1.5, 1e4), points=st.integers(2, 9),
    log=st.booleans(),
)
def test_a_grid_reaches_from_end_to_end_and_its_ends_are_edges(
    low: float, ratio: float, points: int, log: bool
) -> None:
    dimension = Dimension("k", low, low * ratio, log)
    grid = dimension.grid(points)
    assert len(grid) == points
    assert grid == sorted(grid, key=float)  # type: ignore[arg-type]
    assert math.isclose(float(grid[0] or 0), low)
    assert math.isclose(float(grid[-1] or 0), low * ratio)
    assert dimension.at_edge(grid[0]) == "low"
    assert dimension.at_edge(grid[-1]) == "high"
    middle = math.sqrt(low * low * ratio) if log else low * (1 + ratio) / 2
    assert dimension.at_edge(middle) is None


def test_a_grid_of_integers_and_steps_stays_on_them() -> None:
    assert Dimension("k", 1, 5).grid(5) == [1, 2, 3, 4, 5]
    assert Dimension("k", 1, 3).grid(9) == [1, 2, 3]
    assert Dimension("k", 0.0, 1.0, step=0.25).grid(3) == [0.0, 0.5, 1.0]
    assert Dimension("k", choices=("a", "b")).grid(7) == ["a", "b"]
