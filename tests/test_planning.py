"""What a run is predicted to cost, against what PyTorch counts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from svend.device import DTYPES
from svend.errors import ResourceError
from svend.models import transformer
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import (
    CheckpointingPolicy,
    Compile,
    DataConfig,
    ModelConfig,
    ModelScale,
    PipelineConfig,
    Precision,
    TrainingConfig,
    get_model_config,
)
from svend.pipeline.run_model import planned_model
from svend.planning import plan as plan_module
from svend.planning.flops import forward_flops_per_token, train_flops_per_token
from svend.planning.memory import MemoryPlan, predict_memory
from svend.planning.plan import COMPILE_SECONDS, COMPILED_SHARE, check_memory, plan_run
from svend.planning.probe import measure_matmul_peak

CPU = torch.device("cpu")


def make_model_config(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "name": "test", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 96,
        "max_position_embeddings": 64, "rope_theta": 10_000.0, "train_memory_gb": 1,
        "recommended_samples": 10,
    }
    return ModelConfig(**(shape | changes))


def make_training(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "precision": Precision.FP32, "batch_size": 2, "gradient_checkpointing": False,
        "data": DataConfig(max_seq_length=16, num_samples=10),
    }
    return TrainingConfig(**(values | changes))


SHAPES = [
    {},
    {"num_hidden_layers": 3, "num_key_value_heads": 1, "intermediate_size": 80},
    {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 200},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [8, 24])
def test_flops_equal_torchs_count_less_half_the_attention_it_counts_and_plus_the_gains(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, int], length: int
) -> None:
    def attend(q: Any, k: Any, v: Any, *_: Any) -> Any:
        """torch's own attention: its counter does not know ours."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(transformer, "attend", attend)
    config = make_model_config(**shape)
    model = ReasoningTransformer(TransformerConfig.from_model_config(config))
    model.initialize(0)
    tokens_BT = torch.randint(config.vocab_size, (2, length))
    labels_BT = torch.randint(config.vocab_size, (2, length))

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(tokens_BT)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as training:
        model(tokens_BT, labels_BT).backward()

    layers, hidden = config.num_hidden_layers, config.hidden_size
    # torch counts causal attention as full: 4 L T d a token, forward, of which half is masked.
    masked = 2 * layers * length * hidden
    # The formula counts a block's parameters, its gains with them; torch counts products only.
    gains = 2 * layers * 2 * hidden
    tokens = tokens_BT.numel()
    counted_forward = forward.get_total_flops() / tokens
    counted_training = training.get_total_flops() / tokens
    assert forward_flops_per_token(config, length) == counted_forward - masked + gains
    assert train_flops_per_token(config, length) == counted_training - 3 * (masked - gains)


def test_the_gains_in_the_formula_are_a_ten_thousandth_of_the_smallest_scale() -> None:
    tiny = get_model_config(ModelScale.TINY)
    gains = 3 * 2 * tiny.num_hidden_layers * 2 * tiny.hidden_size
    assert gains / train_flops_per_token(tiny, 512) < 5e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_of_the_config_equal_what_the_module_holds(shape: dict[str, int]) -> None:
    config = make_model_config(**shape)
    model = ReasoningTransformer(TransformerConfig.from_model_config(config))
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scale", ModelScale)
def test_fp32_weights_gradients_and_moments_are_sixteen_bytes_a_parameter(
    scale: ModelScale,
) -> None:
    model = get_model_config(scale)
    memory = predict_memory(model, make_training(gradient_accumulation_steps=2), 0)
    state = memory.weights + memory.gradients + memory.optimizer
    assert state == 16 * model.num_parameters()


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32768, 256)
        self.head = nn.Linear(256, 32768)


def test_the_model_of_a_factory_is_planned_as_what_it_is() -> None:
    config = PipelineConfig(training=make_training(model_scale=ModelScale.XXL)).resolve()
    own = TransformerConfig(name="own", hidden_size=64, num_hidden_layers=2)
    planned = planned_model(config, lambda scale: ReasoningTransformer(own))
    assert planned.name == "own"
    assert planned.num_parameters() == sum(
        p.numel() for p in ReasoningTransformer(own).parameters()
    )
    other = planned_model(config, lambda scale: Bigrams())
    parameters = sum(p.numel() for p in Bigrams().parameters())
    assert other.num_parameters() == pytest.approx(parameters, rel=0.2)
    assert planned_model(config, None) == config.model


@settings(max_examples=40, deadline=None)
@given(
    batch_size=st.integers(1, 64),
    length=st.sampled_from([2048, 4096]),
    precision=st.sampled_from(tuple(DTYPES)),
    checkpointing=st.booleans(),
)
def test_memory_grows_with_the_batch_by_what_each_sequence_keeps(
    batch_size: int, length: int, precision: Precision, checkpointing: bool
) -> None:
    model = get_model_config(ModelScale.TINY)

    def plan_for(size: int) -> MemoryPlan:
        training = make_training(
            batch_size=size, precision=precision, gradient_checkpointing=checkpointing,
            gradient_accumulation_steps=2, data=DataConfig(max_seq_length=length, num_samples=10),
        )
        return predict_memory(model, training, 123)

    smaller, larger = plan_for(batch_size), plan_for(batch_size + 1)
    assert smaller.total < larger.total
    assert larger.activations - smaller.activations == smaller.activations // batch_size
    for part in ("weights", "gradients", "optimizer", "process"):
        assert getattr(smaller, part) == getattr(larger, part)


@pytest.mark.parametrize("precision", DTYPES)
def test_checkpointing_saves_activations_and_leaves_the_state_as_it_is(
    precision: Precision,
) -> None:
    model = get_model_config(ModelScale.TINY)
    kept, dropped = (
        predict_memory(model, make_training(
            precision=precision, gradient_checkpointing=checkpointing,
            gradient_accumulation_steps=2, data=DataConfig(max_seq_length=2048, num_samples=10),
        ), 0)
        for checkpointing in (False, True)
    )
    assert dropped.activations < kept.activations
    assert dropped.total < kept.total
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(dropped, part) == getattr(kept, part)


def test_the_selective_policy_keeps_more_than_full_and_less_than_none() -> None:
    model = get_model_config(ModelScale.TINY)

    def activations(**changes: Any) -> int:
        return predict_memory(model, make_training(**changes), 0).activations

    full, selective = (
        activations(gradient_checkpointing=True, gradient_checkpointing_policy=policy)
        for policy in (CheckpointingPolicy.FULL, CheckpointingPolicy.SELECTIVE)
    )
    assert full < selective < activations()


def test_the_process_counts_towards_the_total() -> None:
    model = make_model_config()
    small, large = (predict_memory(model, make_training(), held).total for held in (0, 10**9))
    assert large - small == 10**9


def set_available(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(plan_module, "available_bytes", lambda device: int(gigabytes * 1e9))


def test_a_scale_too_large_for_the_machine_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_available(monkeypatch, 16)
    model = get_model_config(ModelScale.XL)
    with pytest.raises(ResourceError) as refused:
        check_memory(model, make_training(batch_size=1), CPU)
    message = str(refused.value)
    assert "\n" not in message
    assert model.name in message
    assert "16.0 GB are available" in message
    assert "smaller scale" in message


def test_a_batch_too_large_for_the_machine_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_available(monkeypatch, 8)
    training = make_training(
        batch_size=512, data=DataConfig(max_seq_length=2048, num_samples=10)
    )
    with pytest.raises(ResourceError) as refused:
        check_memory(get_model_config(ModelScale.TINY), training, CPU)
    changes = str(refused.value).partition("the nearest that fits, in ")[2].partition(": ")[2]
    # One change, which the refusal's own words make to a run that is let through.
    batch, steps = (int(word.partition("=")[2]) for word in changes.split())
    assert batch * steps == 512
    check_memory(
        get_model_config(ModelScale.TINY),
        dataclasses.replace(training, batch_size=batch, gradient_accumulation_steps=steps), CPU,
    )


def test_a_run_that_fits_is_let_through_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    set_available(monkeypatch, 64)
    memory, available = check_memory(get_model_config(ModelScale.TINY), make_training(), CPU)
    assert available == 64_000_000_000
    assert 16 * 52_000_000 < memory.total < available


def test_a_copy_for_saving_is_planned_where_there_is_room_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, training = get_model_config(ModelScale.TINY), make_training()
    set_available(monkeypatch, 64)
    roomy, _ = check_memory(model, training, CPU)
    assert roomy.snapshot == 12 * model.num_parameters()
    set_available(monkeypatch, (roomy.total - 1) / 1e9)
    tight, _ = check_memory(model, training, CPU)
    assert tight.snapshot == 0
    for memory in (roomy, tight):
        plan = plan_of(monkeypatch, Compile.OFF, 10.0, compiler=False, memory=memory)
        assert plan.saves_in_background is (memory is roomy)


def plan_of(
    monkeypatch: pytest.MonkeyPatch, compile_: Compile, seconds: float, compiler: bool,
    memory: MemoryPlan | None = None, **changes: Any,
) -> plan_module.RunPlan:
    """The plan of 100 steps on a machine where they take about `seconds`."""
    monkeypatch.setattr(plan_module, "can_compile", lambda _: compiler)
    monkeypatch.setattr(plan_module, "measure_matmul_peak", lambda *_: 1e11)
    monkeypatch.setattr(
        plan_module, "measure_micro_batch_seconds", lambda *_: (seconds / 100, 0.0)
    )
    model = make_model_config()
    training = make_training(
        compile=compile_, heldout_sequences=1, save_steps=100, **changes
    )
    memory = memory or predict_memory(model, training, 0)
    return plan_run(training, model, 100, (memory, 10**9), CPU)


@pytest.mark.parametrize(
    ("compile_", "seconds", "compiler", "compiled"),
    [
        (Compile.AUTO, 10.0, True, False),
        (Compile.AUTO, 50_000.0, True, True),
        (Compile.AUTO, 50_000.0, False, False),
        (Compile.ON, 10.0, True, True),
        (Compile.OFF, 50_000.0, True, False),
        (Compile.OFF, 50_000.0, False, False),
    ],
)
def test_auto_compiles_long_runs_where_there_is_a_compiler_and_on_and_off_are_obeyed(
    monkeypatch: pytest.MonkeyPatch, compile_: Compile, seconds: float, compiler: bool,
    compiled: bool,
) -> None:
    assert plan_of(monkeypatch, compile_, seconds, compiler).compile is compiled


def test_what_compiling_takes_and_saves_is_in_the_planned_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = plan_of(monkeypatch, Compile.OFF, 50_000.0, compiler=True)
    compiled = plan_of(monkeypatch, Compile.ON, 50_000.0, compiler=True)
    assert compiled.seconds == pytest.approx(
        COMPILE_SECONDS["cpu"] + COMPILED_SHARE["cpu"] * eager.seconds
    )


def test_compile_on_without_a_compiler_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ResourceError, match=r"training\.compile.*install g\+\+"):
        plan_of(monkeypatch, Compile.ON, 10.0, compiler=False)


def test_a_plans_tokens_flops_and_time_follow_from_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(
        monkeypatch, Compile.OFF, 100.0, compiler=True, gradient_accumulation_steps=3
    )
    assert plan.tokens_per_step == 3 * 2 * 16
    assert plan.tokens == 100 * 3 * 2 * 16
    assert plan.flops == plan.tokens * train_flops_per_token(make_model_config(), 16)
    # Three micro-batches of a second each a step, and one sequence evaluated once.
    assert plan.seconds == pytest.approx(300 + 1 / 2 / 3, rel=1e-6)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_the_measured_peak_is_a_rate_that_a_processor_can_have(precision: Precision) -> None:
    peak = measure_matmul_peak(precision, CPU)
    assert math.isfinite(peak)
    assert 1e8 < peak < 1e15
