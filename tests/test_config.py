"""The configuration: what it says, what it refuses, and in which words."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_logged_model_name, _validate_model_name

import svend.pipeline.groups as groups_module
import svend.pipeline.loading as loading_module
from svend.cli import main
from svend.errors import ConfigError
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import (
    CONF_DIR,
    Compile,
    DataConfig,
    Device,
    LongDocuments,
    ModelScale,
    PipelineConfig,
    Precision,
    Schedule,
    TrainingConfig,
    get_model_config,
    print_scale_comparison,
)
from svend.pipeline.loading import load_config
from svend.pipeline.schema import read_yaml

ROOT = Path(__file__).resolve().parents[1]

SCALE_TABLE = """\
====================================================================================================
SVEND Model Scale Comparison
====================================================================================================
Scale      Name                 Params     Hidden   Layers   Heads    Context    Train GB   Samples
----------------------------------------------------------------------------------------------------
tiny       svend-tiny-50m       52M        512      8        8        2K         4          1K
small      svend-small-125m     125M       768      12       12       4K         8          5K
medium     svend-medium-500m    503M       1024     24       16       4K         16         20K
large      svend-large-1b       1.0B       1536     28       12       8K         28         50K
xl         svend-xl-3b          2.9B       2560     32       20       8K         45         100K
xxl        svend-xxl-7b         6.9B       4096     32       32       8K         65         150K
flagship   svend-flagship-13b   13.0B      5120     40       40       8K         80         200K
====================================================================================================
"""


def _value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def test_what_is_done_to_one_configuration_reaches_no_other(tmp_path: Path) -> None:
    before, path = load_config(), tmp_path / "a.yaml"
    changed = load_config({}, [("gates.full", "[]"), ("eval_benchmarks", "[accuracy]")])
    changed.eval_benchmarks.append("gsm8k")
    for config in (before, changed):
        config.training.data.mix_ratios.clear()
        config.gates.standard.clear()
    again = load_config({}, [("gates.full", "[]"), ("eval_benchmarks", "[accuracy]")])
    assert again.training.data.mix_ratios and again.gates.standard
    assert again.eval_benchmarks == ["accuracy"] and again.gates.full == []
    path.write_text("a: [1]")
    read_yaml(path)["a"].append(2)
    assert read_yaml(path) == {"a": [1]}
    path.write_text("a: [3]")
    assert read_yaml(path) == {"a": [3]}


def _run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT,
                          env=environment, timeout=60, check=False)


def test_scale_comparison_prints_the_table_of_the_guide(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_scale_comparison()
    assert capsys.readouterr().out == SCALE_TABLE


@pytest.mark.parametrize("scale", ModelScale)
def test_number_of_parameters_is_that_of_the_module(scale: ModelScale) -> None:
    model_config = get_model_config(scale)
    with torch.device("meta"):
        module = ReasoningTransformer(TransformerConfig.from_model_config(model_config))
    assert model_config.num_parameters() == sum(p.numel() for p in module.parameters())
    in_blocks = sum(p.numel() for p in module.blocks.parameters())
    assert model_config.num_block_parameters() == in_blocks


@pytest.mark.parametrize("scale", ModelScale)
def test_every_scale_has_the_shape_that_the_design_asks_for(scale: ModelScale) -> None:
    model = get_model_config(scale)
    assert model.vocab_size == 32768
    assert model.num_attention_heads == 4 * model.num_key_value_heads
    assert model.hidden_size % 64 == 0
    assert model.intermediate_size % 32 == 0
    assert model.hidden_size == model.num_attention_heads * model.head_size
    assert model.head_size % 2 == 0


def test_scales_grow_from_rung_to_rung() -> None:
    models = [get_model_config(scale) for scale in ModelScale]
    for figure in ("train_memory_gb", "recommended_samples"):
        figures = [getattr(model, figure) for model in models]
        assert figures == sorted(set(figures))
    counts = [model.num_parameters() for model in models]
    assert counts == sorted(set(counts))


LAYERS = ["config.yaml", "scale/tiny.yaml", "data/embedded.yaml", "gates/guide.yaml",
          "preset/laptop.yaml"]


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for source in CONF_DIR.rglob("*.yaml"):
        target = tmp_path / "conf" / source.relative_to(CONF_DIR)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    monkeypatch.setattr(groups_module, "CONF_DIR", tmp_path / "conf")
    monkeypatch.setattr(loading_module, "CONF_DIR", tmp_path / "conf")
    return tmp_path / "conf"


def _put_value(path: Path, key: str, value: Any) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    branch = tree
    *parents, leaf = key.split(".")
    for part in parents:
        branch = branch.setdefault(part, {})
    branch[leaf] = value
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")


@pytest.mark.parametrize("layers", range(1, len(LAYERS) + 1))
@pytest.mark.parametrize("key", ["training.save_steps", "training.data.cache_dir"])
def test_later_files_win_over_earlier_ones(own_conf: Path, layers: int, key: str) -> None:
    made: Any = int if key.endswith("steps") else "place-{}".format
    for position, layer in enumerate(LAYERS):
        if position < layers:
            _put_value(own_conf / layer, key, made(1000 + position))
        else:
            tree = yaml.safe_load((own_conf / layer).read_text(encoding="utf-8"))
            tree.get("training", {}).pop("save_steps", None)
            (own_conf / layer).write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert _value_at(load_config(), key) == made(999 + layers)
    overridden = load_config(overrides=[(key, str(made(7)))])
    assert _value_at(overridden, key) == made(7)


def test_schema_defaults_fill_what_no_file_states(own_conf: Path) -> None:
    tree = yaml.safe_load((own_conf / "config.yaml").read_text(encoding="utf-8"))
    del tree["training"]["quick_gate_steps"]
    (own_conf / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert load_config().training.quick_gate_steps == TrainingConfig().quick_gate_steps == 100


def test_a_scale_names_its_own_preset_and_the_command_line_another() -> None:
    assert load_config().preset == "laptop"
    assert load_config().training.gradient_accumulation_steps == 1
    full = load_config({"preset": "full"})
    assert full.preset == "full"
    assert full.training.gradient_accumulation_steps == 4
    assert load_config({"scale": "small"}).preset == "full"


def test_the_last_of_several_overrides_of_a_key_wins() -> None:
    overrides = [("training.max_steps", "5"), ("training.max_steps", "6")]
    assert load_config(overrides=overrides).training.max_steps == 6


@pytest.mark.parametrize(("key", "text", "expected"), [
    ("training.learning_rate", "1e-4", 1e-4),
    ("training.learning_rate", "2E-5", 2e-5),
    ("training.learning_rate", "1", 1.0),
    ("training.max_steps", "null", None),
    ("training.gradient_checkpointing", "true", True),
    ("training.compile", "on", Compile.ON),
    ("training.compile", "off", Compile.OFF),
    ("training.schedule", "wsd", Schedule.WSD),
    ("training.experiment_name", "5", "5"),
    ("training.experiment_name", "a=b", "a=b"),
    ("training.data.sources", "[gsm8k, openmath]", ["gsm8k", "openmath"]),
    ("training.validation_gates", "{min_accuracy: 0.05}", {"min_accuracy": 0.05}),
    ("training.validation_gates.min_accuracy", "0.05", {"min_accuracy": 0.05}),
    ("model.name", "own-64", "own-64"),
    ("gates.full", "[]", []),
])
def test_a_value_on_the_command_line_is_read_as_yaml(key: str, text: str, expected: Any) -> None:
    config = load_config(overrides=[(key, text)])
    value = _value_at(config, key.removesuffix(".min_accuracy"))
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(("key", "text", "expected"), [
    ("data.path", "../gsm8k", "../gsm8k"),
    ("data.max_seq_length", "128", 128),
    ("data.long_documents", "drop", LongDocuments.DROP),
])
def test_data_is_short_for_training_data(key: str, text: str, expected: Any) -> None:
    config = load_config(overrides=[(key, text)])
    assert _value_at(config.training, key) == expected
    assert config == load_config(overrides=[(f"training.{key}", text)])


@pytest.mark.parametrize(("recipe", "ratios"), [
    ("embedded", {"reasoning": 0.6, "tool_use": 0.25, "general": 0.15}),
    ("gsm8k", {"reasoning": 1.0}),
    ("guide", {"reasoning": 0.7, "general": 0.3}),
])
def test_mix_ratios_of_a_recipe_replace_those_of_the_default(
    recipe: str, ratios: dict[str, float]
) -> None:
    assert load_config({"data": recipe}).training.data.mix_ratios == ratios


def test_mix_ratios_of_a_file_replace_those_of_the_default(tmp_path: Path) -> None:
    path = tmp_path / "training.yaml"
    path.write_text("data:\n  mix_ratios: {own: 1.0}\n", encoding="utf-8")
    assert TrainingConfig.load(path).data.mix_ratios == {"own": 1.0}


def test_resolving_fills_in_the_model_and_what_follows_from_it() -> None:
    training = TrainingConfig(model_scale=ModelScale.SMALL)
    resolved = PipelineConfig(training=training).resolve()
    assert resolved.model == get_model_config(ModelScale.SMALL)
    assert resolved.training.data.max_seq_length == 4096
    assert resolved.training.data.num_samples == 5000
    assert training.data.max_seq_length is None
    assert resolved.resolve() == resolved


@pytest.mark.parametrize("scale", ModelScale)
def test_scale_defaults_are_those_of_the_scale_file(scale: ModelScale) -> None:
    training = TrainingConfig(model_scale=scale, experiment_name="own", seed=7, max_steps=3)
    before = dataclasses.replace(training)
    training.apply_scale_defaults()
    stated = yaml.safe_load((CONF_DIR / "scale" / f"{scale.value}.yaml").read_text())["training"]
    del stated["model_scale"]
    values = {name: getattr(training, name) for name in stated}
    assert {n: getattr(value, "value", value) for n, value in values.items()} == stated
    assert dataclasses.replace(training, **{n: getattr(before, n) for n in stated}) == before
    assert training.model_scale is scale


PLAIN_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="$?"), max_size=30)
NAMES = PLAIN_TEXT.filter(lambda text: bool(text.strip()))
COUNTS = st.integers(1, 10**6)
RATIOS = st.floats(0, 1)
HALVES = st.floats(0, 0.5)
POSITIVE = st.floats(1e-30, 1e30)


@st.composite
def mixes(draw: st.DrawFn) -> dict[str, float]:
    names = draw(st.lists(PLAIN_TEXT, min_size=1, max_size=4, unique=True))
    shares = [draw(st.floats(0.01, 1.0)) for _ in names]
    return {name: share / sum(shares) for name, share in zip(names, shares, strict=True)}


DATA = st.builds(
    DataConfig, recipe=PLAIN_TEXT, purpose=PLAIN_TEXT,
    sources=st.lists(PLAIN_TEXT, min_size=1, max_size=3), mix_ratios=mixes(),
    max_seq_length=st.none() | st.integers(8, 10**6), num_samples=st.none() | COUNTS,
    path=st.none() | PLAIN_TEXT, heldout_path=st.none() | PLAIN_TEXT,
    heldout_fraction=st.floats(0, 1, exclude_min=True, exclude_max=True), tokenizer=PLAIN_TEXT,
    long_documents=st.sampled_from(LongDocuments), cache_dir=PLAIN_TEXT,
)
TRAINING = st.builds(
    TrainingConfig, experiment_name=NAMES, model_scale=st.sampled_from(ModelScale),
    seed=st.integers(0, 2**63 - 1), num_epochs=COUNTS, max_steps=st.none() | COUNTS,
    batch_size=COUNTS, gradient_accumulation_steps=COUNTS, learning_rate=POSITIVE,
    schedule=st.sampled_from(Schedule), warmup_ratio=HALVES, decay_ratio=HALVES,
    min_learning_rate_ratio=RATIOS, weight_decay=st.floats(0, 1e30),
    adam_beta1=st.floats(0, 1, exclude_max=True), adam_beta2=st.floats(0, 1, exclude_max=True),
    adam_epsilon=POSITIVE, max_grad_norm=POSITIVE,
    skip_spike_deviations=st.none() | POSITIVE, divergence_patience=COUNTS,
    precision=st.sampled_from(Precision), compile=st.sampled_from(Compile),
    gradient_checkpointing=st.booleans(),
    device=st.sampled_from(Device), save_steps=COUNTS, save_total_limit=COUNTS,
    quick_gate_steps=COUNTS, logging_steps=COUNTS, heldout_sequences=COUNTS,
    validation_gates=st.dictionaries(PLAIN_TEXT, st.floats(-1e30, 1e30), max_size=3), data=DATA,
)


def _save_and_load(training: TrainingConfig) -> TrainingConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made" / "training.yaml"
        training.save(path)
        return TrainingConfig.load(path)


@settings(max_examples=40, deadline=None)
@given(TRAINING)
def test_saving_and_loading_a_training_config_is_the_identity(training: TrainingConfig) -> None:
    training.check()
    assert _save_and_load(training) == training


@pytest.mark.parametrize("text", [
    "on", "null", "1e-4", "007", "a: b", "# no comment", "two\nlines", " spaced ", "'", '"', "é",
    "!!str x", "a $ b",
])
def test_text_that_yaml_could_mistake_survives_saving_and_loading(text: str) -> None:
    training = TrainingConfig(
        experiment_name=text, data=DataConfig(sources=[text], path=text, mix_ratios={text: 1.0})
    )
    assert _save_and_load(training) == training


@pytest.mark.parametrize("text", ["???", "${seed}", "${oc.env:HOME}", "\\${x}"])
def test_text_that_means_something_to_omegaconf_is_refused_when_saving(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(ConfigError, match="experiment_name"):
        TrainingConfig(experiment_name=text).save(tmp_path / "training.yaml")
    assert not (tmp_path / "training.yaml").exists()


def test_a_resolved_config_survives_as_the_overrides_that_it_is() -> None:
    config = load_config({"scale": "medium", "data": "guide"})
    assert _save_and_load(config.training) == config.training


def _gate(**changes: str) -> str:
    gate = {"name": "a", "metric_name": "b", "threshold": "1"} | changes
    return "[{" + ", ".join(f"{k}: {v}" for k, v in gate.items()) + "}]"


REFUSED_OVERRIDES = [
    # key, text, what the message must name
    ("training.lerning_rate", "1e-4", "did you mean training.learning_rate?"),
    ("training.zzz", "1", "unknown key training.zzz"),
    ("trainig.max_steps", "1", "did you mean training?"),
    ("model.hidden", "64", "did you mean model.hidden_size?"),
    ("data.sorces", "[a]", "did you mean training.data.sources?"),
    ("foo", "1", "unknown key foo"),
    ("data", "x", "data"),
    ("groups.scale", "small", "unknown key groups"),
    ("training..max_steps", "1", "training..max_steps"),
    ("", "1", "not a key"),
    ("training.max_steps.x", "1", "training.max_steps"),
    ("training.data.sources.0", "a", "training.data.sources"),
    ("training.max_steps", "abc", "training.max_steps"),
    ("training.max_steps", "1.5", "training.max_steps"),
    ("training.max_steps", "0", "training.max_steps"),
    ("training.max_steps", "-5", "training.max_steps"),
    ("training.max_steps", "true", "training.max_steps"),
    ("training.max_steps", "[1]", "training.max_steps"),
    ("training.max_steps", "{a: 1}", "training.max_steps"),
    ("training.max_steps", "${oc.env:HOME}", "training.max_steps"),
    ("training.max_steps", "???", "training.max_steps"),
    ("training.learning_rate", ".nan", "training.learning_rate"),
    ("training.learning_rate", ".inf", "training.learning_rate"),
    ("training.learning_rate", "0", "training.learning_rate"),
    ("training.learning_rate", "-1e-4", "training.learning_rate"),
    ("training.learning_rate", "fast", "training.learning_rate"),
    ("training.learning_rate", "null", "training.learning_rate"),
    ("training.learning_rate", "[1e-4]", "training.learning_rate"),
    ("training.learning_rate", "true", "training.learning_rate"),
    ("training.weight_decay", ".nan", "training.weight_decay"),
    ("training.weight_decay", "-0.1", "training.weight_decay"),
    ("training.weight_decay", ".inf", "training.weight_decay"),
    ("training.warmup_ratio", "1.5", "training.warmup_ratio"),
    ("training.decay_ratio", ".nan", "training.decay_ratio"),
    ("training.adam_beta1", "1", "training.adam_beta1"),
    ("training.adam_epsilon", "0", "training.adam_epsilon"),
    ("training.max_grad_norm", ".inf", "training.max_grad_norm"),
    ("training.skip_spike_deviations", "0", "training.skip_spike_deviations"),
    ("training.skip_spike_deviations", ".nan", "training.skip_spike_deviations"),
    ("training.divergence_patience", "0", "training.divergence_patience"),
    ("training.seed", "null", "training.seed"),
    ("training.seed", "-1", "training.seed"),
    ("training.seed", "99999999999999999999999", "training.seed"),
    ("training.num_epochs", "0", "training.num_epochs"),
    ("training.batch_size", "0", "training.batch_size"),
    ("training.save_total_limit", "0", "training.save_total_limit"),
    ("training.gradient_checkpointing", "perhaps", "training.gradient_checkpointing"),
    ("training.schedule", "linear", "must be one of cosine, wsd, constant"),
    ("training.schedule", "null", "training.schedule"),
    ("training.schedule", "[cosine]", "training.schedule"),
    ("training.schedule", "{a: 1}", "training.schedule"),
    ("training.precision", "int8", "must be one of auto, fp32, bf16, fp16"),
    ("training.compile", "maybe", "must be one of auto, on, off"),
    ("training.compile", "1", "training.compile"),
    ("training.device", "tpu", "must be one of auto, cpu, cuda"),
    ("training.model_scale", "huge", "training.model_scale"),
    ("training.model_scale", "small", "training.model_scale"),
    ("training.experiment_name", "'  '", "training.experiment_name"),
    ("training.experiment_name", "null", "training.experiment_name"),
    ("training.experiment_name", "[a]", "training.experiment_name"),
    ("training.experiment_name", "???", "training.experiment_name"),
    ("training.validation_gates", "{min_accuracy: high}", "training.validation_gates.min_accuracy"),
    ("training.validation_gates", "{min_accuracy: .nan}", "training.validation_gates"),
    ("training.validation_gates", "0.5", "training.validation_gates"),
    ("training.validation_gates", "[a]", "training.validation_gates"),
    ("data.long_documents", "keep", "must be one of split, drop"),
    ("data.max_seq_length", "4096", "at most the context of svend-tiny-50m, 2048"),
    ("data.max_seq_length", "4", "training.data.max_seq_length"),
    ("data.max_seq_length", "0", "training.data.max_seq_length"),
    ("data.num_samples", "0", "training.data.num_samples"),
    ("data.num_samples", "-3", "training.data.num_samples"),
    ("data.heldout_fraction", "0", "training.data.heldout_fraction"),
    ("data.heldout_fraction", "1", "training.data.heldout_fraction"),
    ("data.heldout_fraction", ".nan", "training.data.heldout_fraction"),
    ("data.mix_ratios", "{reasoning: 0.5}", "training.data.mix_ratios"),
    ("data.mix_ratios", "{reasoning: -0.4, general: 1.15}", "training.data.mix_ratios"),
    ("data.mix_ratios", "{general: .nan}", "training.data.mix_ratios"),
    ("data.mix_ratios", "{general: much}", "training.data.mix_ratios.general"),
    ("data.mix_ratios", "[1.0]", "training.data.mix_ratios"),
    ("data.mix_ratios", "1.0", "training.data.mix_ratios"),
    ("data.mix_ratios", "null", "training.data.mix_ratios"),
    ("data.sources", "gsm8k", "training.data.sources"),
    ("data.sources", "[]", "training.data.sources"),
    ("data.sources", "null", "training.data.sources"),
    ("data.sources", "{a: 1}", "training.data.sources"),
    ("data.sources", "[null]", "training.data.sources"),
    ("data.sources", "[[a]]", "training.data.sources"),
    ("data.cache_dir", "null", "training.data.cache_dir"),
    ("training", "5", "training = 5: is a section"),
    ("training", "null", "training"),
    ("training.data", "embedded", "training.data = embedded: is a section"),
    ("model", "big", "model = big: is a section"),
    ("model.hidden_size", "510", "model.hidden_size"),
    ("model.hidden_size", "-512", "model.hidden_size"),
    ("model.hidden_size", "null", "model.hidden_size"),
    ("model.num_attention_heads", "7", "model.num_attention_heads"),
    ("model.num_attention_heads", "0", "model.num_attention_heads"),
    ("model.num_key_value_heads", "3", "model.num_key_value_heads"),
    ("model.vocab_size", "0", "model.vocab_size"),
    ("model.rope_theta", ".nan", "model.rope_theta"),
    ("model.rope_theta", "0", "model.rope_theta"),
    ("model.rope_theta", "-1", "model.rope_theta"),
    ("gates", "[a]", "gates"),
    ("gates.full", "strict", "gates.full"),
    ("gates.full", "null", "gates.full"),
    ("gates.full", "[1]", "gates.full"),
    ("gates.full", "[{name: a}]", "gates.full[0].metric_name"),
    ("gates.full", _gate(threshold="x"), "gates.full[0].threshold"),
    ("gates.full", _gate(threshold=".nan"), "threshold"),
    ("gates.full", _gate(comparison="'!='"), "comparison '!='"),
    ("gates.full", _gate(nam="x"), "did you mean gates.full[0].name?"),
    ("health.every_steps", "0", "health.every_steps"),
    ("health.every_steps", "often", "health.every_steps"),
    ("health.max_attention_logit", "0", "health.max_attention_logit"),
    ("health.max_attention_logit", ".nan", "health.max_attention_logit"),
    ("health.max_attention_logit", ".inf", "health.max_attention_logit"),
    ("health.min_relative_update", "-1e-6", "health.min_relative_update"),
    ("health.min_relative_update", ".nan", "health.min_relative_update"),
    ("health.min_branch_share", "1", "health.min_branch_share"),
    ("health.max_spikes", "-1", "health.max_spikes"),
    ("health.max_spikes", "2.5", "health.max_spikes"),
    ("health.action", "stop", "must be one of warn, fail"),
    ("health.patience", "0", "health.patience"),
    ("health.patience", "null", "health.patience"),
    ("health.max_logit", "50", "unknown key health.max_logit"),
    ("health", "off", "health"),
    ("strict_validation", "maybe", "strict_validation"),
    ("strict_validation", "null", "strict_validation"),
    ("eval_benchmarks", "gsm8k", "eval_benchmarks"),
    ("checkpoint_dir", "null", "checkpoint_dir"),
]


@pytest.mark.parametrize(("key", "text", "named"), REFUSED_OVERRIDES)
def test_a_bad_override_is_refused_in_one_line_that_names_it(
    key: str, text: str, named: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(overrides=[(key, text)])
    assert named in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(("groups", "named"), [
    ({"scale": "gigantic"}, "scale 'gigantic': choose one of tiny, small, medium, large, xl"),
    ({"scale": ""}, "scale ''"),
    ({"scale": "../scale/tiny"}, "scale '../scale/tiny'"),
    ({"data": "nowhere"}, "data 'nowhere': choose one of chat, embedded, gsm8k, guide"),
    ({"gates": "none"}, "gates 'none': choose one of guide"),
    ({"preset": "desktop"}, "preset 'desktop': choose one of full, gate, laptop"),
    ({"optimizer": "adam"}, "optimizer"),
])
def test_an_unknown_group_member_is_refused_with_the_known_ones(
    groups: Mapping[str, str], named: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(groups)
    assert named in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(("content", "named"), [
    ("max_steps: 1\n  seed: 2", "training.yaml"),
    ("[unclosed", "training.yaml"),
    ("- a\n- b\n", "keys and values"),
    ("just text", "just text"),
    ("sed: 1\n", "training.sed"),
    ("data: {path: [a]}\n", "training.data.path"),
    ("data: embedded\n", "training.data = embedded"),
])
def test_a_malformed_file_is_refused_in_one_line(
    tmp_path: Path, content: str, named: str
) -> None:
    path = tmp_path / "training.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        TrainingConfig.load(path)
    assert named in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        TrainingConfig.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("tag", [
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]",
])
def test_an_object_tag_in_a_file_is_refused_and_nothing_is_executed(
    tmp_path: Path, tag: str
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "training.yaml"
    path.write_text(f"experiment_name: {tag.format(marker=marker)}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        TrainingConfig.load(path)
    assert len(str(refusal.value).splitlines()) == 1
    assert str(path) in str(refusal.value)
    assert not marker.exists()


def test_an_object_tag_on_the_command_line_is_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    tag = f"!!python/object/apply:os.system ['touch {marker}']"
    with pytest.raises(ConfigError, match=r"training\.learning_rate"):
        load_config(overrides=[("training.learning_rate", tag)])
    assert not marker.exists()


IMPORTED = """
import runpy, sys
sys.argv = ["svend", *{arguments!r}]
try:
    runpy.run_module("svend", run_name="__main__")
except SystemExit as ended:
    print("code", ended.code)
print("imported", sorted({{"torch", "mlflow", "omegaconf"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(("arguments", "shown"), [
    (["scales"], SCALE_TABLE),
    (["--help"], "scales"),
    (["train", "--help"], "--training.learning_rate"),
])
def test_asking_for_the_scales_or_help_imports_neither_torch_nor_mlflow(
    arguments: list[str], shown: str
) -> None:
    done = _run_python("-c", IMPORTED.format(arguments=arguments))
    assert shown in done.stdout
    assert "code 0" in done.stdout, done.stderr
    imported = done.stdout.split("imported", 1)[1]
    assert "torch" not in imported
    assert "mlflow" not in imported


@pytest.mark.parametrize(("arguments", "named"), [
    (["train", "foo"], "'foo'"),
    (["train", "--training.max_steps"], "--training.max_steps has no value"),
])
def test_an_unknown_form_ends_the_command_with_one_line_and_no_traceback(
    arguments: Sequence[str], named: str
) -> None:
    done = _run_python("-m", "svend", *arguments)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("arguments", "named"), [
    (["train", "--training.max_steps", "--scale", "tiny"], "--training.max_steps has no value"),
    (["train", "--training.max_steps="], "--training.max_steps has no value"),
    (["train", "-x"], "'-x'"),
    (["train", "--scal", "small"], "--scal is not an option: did you mean --scale?"),
    (["train", "--scale", "huge"], "scale 'huge'"),
    (["train", "--resume", "maybe"], "resume = maybe"),
    (["train", "--training.max_steps=-1"], "training.max_steps = -1"),
    (["train", "--training.max_steps", "-1"], "training.max_steps = -1"),
    (["scales", "--wide"], "--wide"),
    (["scales", "tiny"], "tiny"),
])
def test_a_bad_command_line_is_refused_in_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert named in shown.err


def test_a_model_of_another_shape_cannot_enter_the_registry_of_the_scale() -> None:
    with pytest.raises(ConfigError, match=r"^model\.name = svend-tiny-50m: must be a name of its"):
        load_config(overrides=[("model.hidden_size", "64")])
    own = load_config(overrides=[("model.hidden_size", "64"), ("model.name", "own")])
    assert own.model is not None
    assert (own.model.name, own.model.hidden_size) == ("own", 64)


def test_a_name_is_refused_before_training_where_mlflow_would_refuse_it_behind_it() -> None:
    """By MLflow's own rules: of a registered model, and of a checkpoint with its step behind."""
    model, refused = get_model_config(ModelScale.TINY), set()
    for character in map(chr, range(32, 127)):
        name = f"own{character}model"
        try:
            _validate_model_name(name)
            _validate_logged_model_name(f"{name}-step-1")
        except MlflowException:
            refused.add(character)
        if character in refused or character == "@":  # which parts name and alias
            with pytest.raises(ConfigError, match=r"^model\.name = "):
                dataclasses.replace(model, name=name).check()
        else:
            dataclasses.replace(model, name=name).check()
    assert refused == set("/:.%\"'")


@pytest.mark.parametrize("name", ["a.b", "a\nb", "a" * 201, " "])
def test_a_name_that_no_registry_takes_is_refused_at_load(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.name = [^\n]+ the registry takes$"):
        load_config(overrides=[("model.name", json.dumps(name))])


def test_other_sources_do_not_carry_the_recipes_name() -> None:
    data = load_config(
        {"data": "gsm8k"}, [("data.sources", "[gym_reasoning]")]
    ).training.data
    assert (data.recipe, data.purpose) == ("custom", "own sources")
    assert load_config({"data": "gsm8k"}).training.data.recipe == "gsm8k"
