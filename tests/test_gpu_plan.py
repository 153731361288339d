"""Plans for GPUs that are not here, refusals with what fits, and predicted beside tracked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.bench.fake_memory import check_on_fake_tensors, check_scale
from svend.bench.memory import COMBINATIONS, Combination, Freed, measure_peak
from svend.bench.memory_check import TOLERANCE, MemoryCheck, judge
from svend.bench.memory_worker import build_fresh_state
from svend.cli import main
from svend.errors import ConfigError
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import (
    CheckpointingPolicy,
    DataConfig,
    ModelConfig,
    ModelScale,
    MomentPrecision,
    Precision,
    TrainingConfig,
    WeightPrecision,
    get_model_config,
    load_config,
)
from svend.pipeline.runner import ScaleRunner
from svend.planning.gpu_plan import GPU_COUNTS, plan_on_gpus
from svend.planning.gpus import GPUS, bf16_peak_of
from svend.planning.memory import predict_memory
from svend.planning.plan import explain_out_of_memory, is_out_of_memory
from svend.planning.search import RECIPES, Room, find_cheapest, find_nearest
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache
from tests.registry import store

A100 = GPUS["a100-80gb"]


def training_of(scale: ModelScale, **changes: Any) -> TrainingConfig:
    """The scale's own settings at its whole context, in bf16."""
    training = TrainingConfig(model_scale=scale)
    training.apply_scale_defaults()
    length = get_model_config(scale).max_position_embeddings
    values: dict[str, Any] = {
        "precision": Precision.BF16, "data": DataConfig(max_seq_length=length, num_samples=1),
    }
    return dataclasses.replace(training, **(values | changes))


def shallow(scale: ModelScale, layers: int = 2) -> ModelConfig:
    """The scale's model, so few layers deep that it is tracked in seconds."""
    return dataclasses.replace(get_model_config(scale), num_hidden_layers=layers)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "moment_precision": MomentPrecision.BF16,
         "weight_precision": WeightPrecision.BF16},
        {"precision": Precision.FP32, "gradient_accumulation_steps": 1},
        pytest.param({"gradient_checkpointing": True,
                      "gradient_checkpointing_policy": CheckpointingPolicy.SELECTIVE},
                     marks=pytest.mark.slow),
        pytest.param({"moment_precision": MomentPrecision.INT8}, marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(str(getattr(value, "value", value)) for value in changes.values()),
)
def test_predicted_memory_is_what_pytorchs_tracker_counts(changes: dict[str, Any]) -> None:
    check = check_on_fake_tensors(
        shallow(ModelScale.TINY), training_of(ModelScale.TINY, batch_size=2, **changes)
    )
    assert abs(check.deviation) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("scale", ModelScale)
def test_every_scale_with_its_own_settings_is_predicted_as_the_tracker_counts(
    scale: ModelScale,
) -> None:
    assert abs(check_scale(scale).deviation) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("freed", Freed)
def test_a_process_takes_what_is_predicted(freed: Freed) -> None:
    check = measure_peak(COMBINATIONS[0], freed)
    assert check.deviation >= (0 if freed is Freed.KEPT else -TOLERANCE)
    assert freed is Freed.KEPT or check.deviation <= TOLERANCE


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_a_measured_process_takes_the_micro_batches_that_are_predicted(
    combination: Combination,
) -> None:
    small = dataclasses.replace(
        get_model_config(ModelScale.TINY), hidden_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=64, vocab_size=256,
    )
    training = dataclasses.replace(combination.training(), moment_precision=MomentPrecision.FP32)
    stream = build_fresh_state(small, training).stream
    assert stream.passes == combination.micro_batches
    assert next(stream).tokens_BT.shape == (combination.batch_size, combination.length)


@settings(deadline=None)
@given(
    deviations=st.lists(st.integers(-300, 300).filter(lambda n: abs(n) != 100), min_size=1),
    in_runs=st.lists(st.integers(-300, 300)),
)
def test_the_check_passes_where_all_are_near_and_no_run_holds_more_than_planned(
    deviations: list[int], in_runs: list[int]
) -> None:
    training = training_of(ModelScale.TINY)
    near, runs = (
        [MemoryCheck("", training, 1000 + thousandths, 1000) for thousandths in those]
        for those in (deviations, in_runs)
    )
    passed, _ = judge(near, runs)
    assert passed == (all(abs(n) < 100 for n in deviations) and all(n >= 0 for n in in_runs))


@pytest.mark.parametrize("scale", ModelScale)
def test_every_scale_fits_the_memory_it_is_meant_for_on_one_card(scale: ModelScale) -> None:
    plan = plan_on_gpus(
        get_model_config(scale), training_of(scale), A100, gpus=1, mfu=0.4, tokens=None
    )
    assert plan.fits
    assert plan.over_guide_bytes <= 0


@settings(max_examples=25, deadline=None)
@given(
    scale=st.sampled_from(ModelScale),
    recipe=st.sampled_from(RECIPES),
    shards=st.sampled_from(GPU_COUNTS),
)
def test_state_shrinks_with_the_precision_and_with_those_that_share_it(
    scale: ModelScale, recipe: tuple[WeightPrecision, MomentPrecision], shards: int
) -> None:
    model = get_model_config(scale)
    weights, moments = recipe
    training = training_of(scale, weight_precision=weights, moment_precision=moments,
                           gradient_accumulation_steps=2)

    def state_bytes(training: TrainingConfig, shards: int) -> int:
        plan = predict_memory(model, training, 0, device_type="cuda", shards=shards)
        assert sum(plan.parts().values()) == plan.total
        return plan.weights + plan.gradients + plan.optimizer

    whole = state_bytes(training, 1)
    assert state_bytes(training, shards) == pytest.approx(whole / shards, rel=1e-6)
    in_fp32 = dataclasses.replace(
        training, weight_precision=WeightPrecision.FP32, moment_precision=MomentPrecision.FP32
    )
    assert whole <= state_bytes(in_fp32, 1) == 16 * model.num_parameters()


@settings(max_examples=25, deadline=None)
@given(gigabytes=st.floats(1, 200), scale=st.sampled_from(ModelScale))
def test_the_nearest_combination_fits_keeps_the_step_and_is_reached_by_what_it_says(
    gigabytes: float, scale: ModelScale
) -> None:
    model, training = get_model_config(scale), training_of(scale)
    room = Room("cuda", int(gigabytes * 1e9), 500_000_000)
    nearest = find_nearest(model, training, room)
    cheapest = find_cheapest(model, training, room, 1)
    assert (nearest is None) == (not cheapest)
    if nearest is None:
        return
    assert nearest.memory.total <= room.available_bytes
    settings_of = nearest.training
    assert (settings_of.batch_size * settings_of.gradient_accumulation_steps
            == training.batch_size * training.gradient_accumulation_steps)
    # What is said is all that differs.
    said = dict(word.split("=") for change in nearest.changes for word in change.split())
    for name in ("batch_size", "gradient_accumulation_steps", "weight_precision",
                 "moment_precision", "gradient_checkpointing"):
        old, new = getattr(training, name), getattr(settings_of, name)
        assert (f"training.{name}" in said) == (old != new)
    fits_as_it_is = predict_memory(
        model, training, room.process_bytes, device_type="cuda"
    ).total <= room.available_bytes
    assert fits_as_it_is == (not nearest.changes)
    assert [c.computed_flops_per_token for c in cheapest] == sorted(
        c.computed_flops_per_token for c in cheapest
    )


def test_more_gpus_take_less_time_and_the_same_gpu_hours() -> None:
    model, training = get_model_config(ModelScale.LARGE), training_of(ModelScale.LARGE)
    one, four = (
        plan_on_gpus(model, training, A100, gpus=gpus, mfu=0.5, tokens=10**9) for gpus in (1, 4)
    )
    assert four.gpu_hours == pytest.approx(one.gpu_hours)
    assert four.step_seconds == pytest.approx(one.step_seconds / 4)
    by_hand = 10**9 * one.flops_per_token / (0.5 * A100.bf16_flops) / 3600
    assert by_hand < one.gpu_hours < 4 / 3 * by_hand  # the blocks run forward once more


def test_where_a_scale_does_not_fit_whole_gpus_share_it() -> None:
    training = training_of(ModelScale.XL, moment_precision=MomentPrecision.FP32)
    plan = plan_on_gpus(
        get_model_config(ModelScale.XL), training, GPUS["a100-40gb"], gpus=None, mfu=0.4,
        tokens=None,
    )
    assert plan.fits
    assert plan.shards == plan.gpus > 1
    assert plan.memory.total <= 40e9 < plan.memory_of_one.total


def test_gpus_that_cannot_share_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus = 3.*16 sequences.*divisor"):
        plan_on_gpus(get_model_config(ModelScale.TINY), training_of(ModelScale.TINY), A100,
                     gpus=3, mfu=0.4, tokens=None)


def test_the_command_prints_the_plan_of_a_scale_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--scale", "flagship", "--gpu", "a100-80gb", "--json",
                 "--dollars-per-gpu-hour", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    model = get_model_config(ModelScale.FLAGSHIP)
    assert plan["parameters"] == model.num_parameters()
    assert plan["tokens"] == 20 * model.num_parameters()
    assert plan["fits"]
    memory = plan["memory_bytes"]
    assert sum(size for name, size in memory.items() if name != "total") == memory["total"]
    assert {"weights", "gradients", "optimizer", "activations", "logits"} <= set(memory)
    assert plan["dollars"] == pytest.approx(2 * plan["gpu_hours"])
    assert any(one["shards"] > 1 for one in plan["fitting"])


def test_the_command_prints_all_scales_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "h100-80gb", "--preset", "full"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines()
             if any(f" {scale.value} " in line for scale in ModelScale)]
    assert len(lines) == len(ModelScale)
    assert "assumed" in printed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--gpu", "abacus"), "gpu = abacus: must be one of a100-40gb"),
        (("--gpu", "l4", "--mfu", "1.5"), "mfu = 1.5"),
        (("--gpu", "l4", "--gpus", "0"), "gpus = 0"),
        (("--gpu", "l4", "--tokens", "nan"), "tokens = nan"),
        (("--mfu", "0.5"), "add --gpu"),
        (("--scale", "all"), "add --gpu"),
        (("--gpu", "l4", "--hparams", "x.yaml"), "hparams = x.yaml"),
    ],
)
def test_a_mistake_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], named: str
) -> None:
    assert main(["plan", *options]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert named in line


def test_a_real_allocation_that_fails_is_told_with_plan_and_remedy() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    model, training = get_model_config(ModelScale.TINY), training_of(ModelScale.TINY, batch_size=8)
    line = explain_out_of_memory(model, training, torch.device("cpu"), None, failed.value)
    assert "\n" not in line
    for text in ("out of memory on cpu", "were held at most", "planned were", "optimizer",
                 "activations"):
        assert text in line
    assert "the nearest that fits" in line or "no settings make it fit" in line


class _Greedy(ReasoningTransformer):
    """Asks for more memory than any machine has."""

    def forward(self, *_: Any) -> torch.Tensor:
        return torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_all_the_same_ends_with_plan_and_remedy(
    tmp_path: Path,
) -> None:
    overrides = {
        **DEBUG_OVERRIDES, "checkpoint_dir": str(tmp_path / "checkpoints"),
        "data.cache_dir": str(data_cache()), "training.compile": "off",
    }
    shape = TransformerConfig(
        name="svend-debug", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, vocab_size=4096,
        max_position_embeddings=256,
    )
    with store(tmp_path):
        runner = ScaleRunner(load_config({}, list(overrides.items())), lambda _: _Greedy(shape))
        result = runner.run()
    assert not result.success
    line = str(result.reason)
    assert len(line.splitlines()) == 1
    for text in ("out of memory on cpu", "were held at most", "planned were", "activations"):
        assert text in line


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12), ("NVIDIA H100 PCIe", None), ("NVIDIA GeForce GTX 1080", None),
])
def test_a_card_is_known_by_what_cuda_calls_it(name: str, peak: float | None) -> None:
    assert bf16_peak_of(name) == peak
