"""What a sweep found, read back, refused where it does not hold, and carried by the rules."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svend.cli import main
from svend.errors import ConfigError
from svend.pipeline.config import Parametrisation, PipelineConfig, load_config
from svend.pipeline.hyperparameters import (
    FoundAt,
    Hyperparameters,
    carry,
    fetch_hyperparameters,
    read_hyperparameters,
)
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache

VALUES = {
    "training.learning_rate": 4e-3, "training.weight_decay": 0.2, "training.adam_beta2": 0.95,
    "training.warmup_ratio": 0.03,
}
SMALL = [
    ("model.name", "proxy"), ("model.hidden_size", "128"), ("model.num_hidden_layers", "4"),
    ("model.num_attention_heads", "2"), ("model.num_key_value_heads", "1"),
    ("training.batch_size", "4"), ("training.gradient_accumulation_steps", "1"),
    ("data.max_seq_length", "512"),
]
STEPS = 300


def found(
    parametrisation: str = "completep", promotable: bool = True, **values: object
) -> Hyperparameters:
    config = load_config({}, [*SMALL, ("training.parametrisation", parametrisation)])
    return Hyperparameters(
        values={**VALUES, **values}, found_at=FoundAt.of(config, STEPS), promotable=promotable,
        why=[] if promotable else ["beats the default: by 0"], study="sweep-tiny",
        sweep_run_id="0" * 32, git_commit="0" * 40, recipe="embedded", data_fingerprint="f" * 64,
    )


def config_of(hyperparameters: Hyperparameters, *overrides: tuple[str, str]) -> PipelineConfig:
    return load_config({"scale": "xl"}, [*hyperparameters.settings(), *overrides])


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text(found().to_yaml())
    assert read_hyperparameters(tmp_path / "hparams.yaml") == found()


def test_a_result_that_is_not_promotable_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "hparams.yaml"
    path.write_text(found(promotable=False).to_yaml())
    with pytest.raises(ConfigError, match=r"not promotable .beats the default: by 0.; run a sweep"):
        fetch_hyperparameters(str(path))


@pytest.mark.parametrize(
    ("text", "told"), [("values: 3", "must be a mapping"), ("a: 1", "unknown key"), ("[1]", "keys")]
)
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "hparams.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        read_hyperparameters(path)
    assert "\n" not in str(caught.value)


def test_the_run_that_it_was_found_at_gets_the_values_as_they_are() -> None:
    config = load_config({}, [*SMALL, *found().settings()])
    training, rows = carry(found(), config, STEPS)
    assert {row.key: row.here for row in rows if row.key in VALUES} == VALUES
    assert training.learning_rate == VALUES["training.learning_rate"]


FOUND = found()
LARGE = config_of(FOUND, ("training.batch_size", "1"), ("data.max_seq_length", "2048"))


@given(accumulation=st.integers(1, 64), steps=st.integers(10, 10**6))
def test_batch_and_horizon_follow_the_rules(accumulation: int, steps: int) -> None:
    config = replace(LARGE, training=replace(
        LARGE.training, gradient_accumulation_steps=accumulation
    ))
    training, _ = carry(FOUND, config, steps)
    batch, tokens = accumulation * 2048 / 2048, accumulation * 2048 * steps / (2048 * STEPS)
    assert training.learning_rate == pytest.approx(4e-3 * math.sqrt(batch) * tokens**-0.3)
    # AdamW's average over a run, B / (rate decay D), is the same share of it as before.
    share = batch / (training.learning_rate * training.weight_decay * tokens)
    assert share == pytest.approx(1 / (4e-3 * 0.2))
    assert training.adam_beta2 == pytest.approx(max(0.95**batch, 0.9))
    assert training.warmup_ratio == 0.03


def test_every_value_is_explained_and_those_set_by_hand_stay() -> None:
    config = config_of(found(), ("training.weight_decay", "0.07"))
    training, rows = carry(found(), config, 10_000)
    assert training.weight_decay == 0.07
    told = {row.key: row.why for row in rows}
    assert told["training.weight_decay"] == "set by hand"
    assert told["training.warmup_ratio"] == "as it was found"
    assert "times the batch" in told["training.learning_rate"]
    assert "completep" in told["width"]
    assert training.parametrisation is Parametrisation.COMPLETEP


def test_the_exponents_are_the_configurations() -> None:
    config = config_of(found(), ("carry.learning_rate_by_tokens", "0"),
                       ("carry.learning_rate_by_batch", "0"))
    assert carry(found(), config, 99)[0].learning_rate == 4e-3
    with pytest.raises(ConfigError, match=r"carry.learning_rate_by_tokens = 9.*between -2 and 2"):
        config_of(found(), ("carry.learning_rate_by_tokens", "9"))


def test_the_standard_parametrisation_carries_to_no_other_shape() -> None:
    standard = found("standard")
    with pytest.raises(ConfigError, match="holds at no other shape"):
        carry(standard, config_of(standard), STEPS)
    same = load_config({}, [*SMALL, *standard.settings()])
    assert carry(standard, same, STEPS)[0].learning_rate == 4e-3


def test_another_parametrisation_or_optimizer_than_it_was_found_with_is_refused() -> None:
    for key, value in (("training.optimizer", "muon"), ("training.base_width", "128")):
        with pytest.raises(ConfigError, match=f"{key} = {value}: the hyperparameters were found"):
            carry(found(), config_of(
                found(), (key, value), ("training.moment_precision", "fp32")), STEPS)


def test_values_that_are_nowhere_in_the_config_are_not_silently_left_out() -> None:
    config = config_of(found())
    bare = replace(config, training=replace(
        config.training, learning_rate=1e-9, weight_decay=0.0, adam_beta2=0.1, warmup_ratio=0.5
    ))
    with pytest.raises(ConfigError, match="none of its values is in the configuration"):
        carry(found(), bare, STEPS)


def test_the_plan_of_a_scale_of_billions_needs_no_weights_no_data_and_no_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hparams.yaml").write_text(found().to_yaml())
    assert main(["plan", "--scale", "xl", "--hparams", "hparams.yaml", "--training.max_steps",
                 "10000", "--training.weight_decay", "0.07"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "(2.9B)" in told
    assert "10,000 of 131,072 tokens" in told
    assert "CompleteP, base 256 wide" in told
    for key, value in VALUES.items():
        assert f"│ {key} │ {value:.4g} │" in told
    for why in ("set by hand", "as it was found", "times the batch to the power 0.5",
                "completep: the rates of hidden matrices follow, from base 256"):
        assert why in told
    assert [path.name for path in tmp_path.iterdir()] == ["hparams.yaml"]


def test_a_plan_refuses_what_a_run_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hparams.yaml"
    path.write_text(found("standard").to_yaml())
    assert main(["plan", "--scale", "xl", "--hparams", str(path),
                 "--training.max_steps", "100"]) == 1
    assert "holds at no other shape" in capsys.readouterr().err


def test_steps_are_counted_on_the_data_where_they_are_not_set(
    capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {**DEBUG_OVERRIDES, "data.cache_dir": str(data_cache())}
    del overrides["training.max_steps"]
    assert main(["plan", *(w for k, v in overrides.items() for w in (f"--{k}", v))]) == 0
    told = capsys.readouterr().out
    assert "steps" in told
    assert "time " in told
    assert "not measured" in told
