"""Weights and moments in fewer bits: against torch's AdamW, left out, saved, and resumed."""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard

from svend.data.documents import Kind
from svend.data.stream import BatchStream, PackedSequences
from svend.data.token_array import TokenArray
from svend.errors import ConfigError, ResourceError
from svend.models.config import BaseShape, TransformerConfig
from svend.models.generation import Decoder, PlainTurn, Request
from svend.models.parametrisation import group_of
from svend.models.shards import part_of, whole
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.checkpoints.sharded import lay_out
from svend.pipeline.config import (
    Compile,
    DataConfig,
    MomentPrecision,
    Optimizer,
    Parametrisation,
    Precision,
    Schedule,
    TrainingConfig,
    WeightPrecision,
)
from svend.pipeline.loading import load_config
from svend.pipeline.version_files import WEIGHTS, load_version_model, write_weights
from svend.training.loop import train_steps
from svend.training.low_memory import RoundedAdamW, prepare_weights, round_stochastically
from svend.training.optimizers import build_optimizer, take_step
from svend.training.state import TrainState, build_state

CPU = torch.device("cpu")
VOCAB, LENGTH, STEPS = 64, 16, 7
FP32, BF16 = WeightPrecision.FP32, WeightPrecision.BF16
RECIPES = [
    (weights, moments) for weights in WeightPrecision for moments in MomentPrecision
    if (weights, moments) != (FP32, MomentPrecision.FP32)
]
QUANTIZED = (MomentPrecision.INT8, MomentPrecision.INT4)
recipes = pytest.mark.parametrize(
    ("weights", "moments"), RECIPES, ids=[f"{w.value}-{m.value}" for w, m in RECIPES]
)


@pytest.fixture(autouse=True)
def with_torchao(request: pytest.FixtureRequest) -> None:
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("moments") in QUANTIZED and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")


def make_training(**changes: Any) -> TrainingConfig:
    settings_: dict[str, Any] = {
        "precision": Precision.BF16, "learning_rate": 1e-2, "batch_size": 4, "warmup_ratio": 0.2,
        "gradient_accumulation_steps": 1, "schedule": Schedule.COSINE, "compile": Compile.OFF,
    }
    return TrainingConfig(**(settings_ | changes))


def make_model(training: TrainingConfig, width: int = 64) -> ReasoningTransformer:
    """A model whose matrices are quantized: they have 4096 entries, or more."""
    return ReasoningTransformer(TransformerConfig(
        name="test", hidden_size=width, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=2 * width, vocab_size=VOCAB,
        initializer_range=0.1, attention_dropout=0.1, base=BaseShape.of(training),
    ))


def make_state(training: TrainingConfig, steps: int = STEPS, seed: int = 0) -> TrainState:
    """Random documents, in each of which a token follows from the one before it."""
    generator = np.random.default_rng(0)
    starts = generator.integers(0, VOCAB, 80)
    documents = [((start + 5 * np.arange(15)) % VOCAB).astype(np.uint16) for start in starts]
    part = TokenArray.of("train", documents, [Kind.GENERAL] * len(documents))
    data = DataConfig(sources=["text"], mix_ratios={"general": 1.0}, max_seq_length=LENGTH)
    model = make_model(training)
    model.initialize(seed)
    stream = BatchStream(PackedSequences(part, data, seed=0), training.batch_size)
    return build_state(model, stream, training, steps, CPU)


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's states by name, copied."""
    named = dict(state.model.state_dict())
    for index, tensors in state.optimizer.state_dict()["state"].items():
        named |= {f"{index}.{name}": tensor for name, tensor in tensors.items()}
    return {name: tensor.clone() for name, tensor in named.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert torch.equal(value, b[name]), name


@settings(max_examples=100, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-2.0**126,
                 max_value=2.0**126))
def test_rounding_gives_a_neighbour_and_in_the_mean_the_number(number: float) -> None:
    x_N = torch.full((4096,), number)
    rounded_N = round_stochastically(x_N, torch.Generator().manual_seed(1)).double()
    below = (x_N[:1].view(torch.int32) & -(2**16)).view(torch.float32).double().item()
    above = ((x_N[:1].view(torch.int32) & -(2**16)) + 2**16).view(torch.float32).double().item()
    assert set(rounded_N.tolist()) <= {below, above}
    # The mean of n draws is within five of its own deviations, of at most half a unit each.
    assert abs(rounded_N.mean().item() - number) <= 5 * abs(above - below) / 2 / math.sqrt(4096)


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-4, 1e-1), decay=st.floats(0, 0.5), eps=st.sampled_from([1e-12, 1e-8, 1e-4]),
    beta1=st.floats(0.5, 0.95), beta2=st.floats(0.9, 0.999), scale=st.sampled_from([1e-4, 1.0]),
    shape=st.sampled_from([(8, 24), (1, 5), (7,)]), seed=st.integers(0, 2**40),
)
def test_with_states_in_fp32_it_is_torchs_adamw(
    lr: float, decay: float, eps: float, beta1: float, beta2: float, scale: float,
    shape: tuple[int, ...], seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    begun = torch.randn(shape, generator=generator)
    ours, torchs = nn.Parameter(begun.clone()), nn.Parameter(begun.clone())
    group = {"lr": lr, "weight_decay": decay, "eps": eps}
    first = RoundedAdamW([{"params": [ours], **group}], lr, (beta1, beta2), torch.float32, seed)
    second = torch.optim.AdamW([{"params": [torchs], **group}], betas=(beta1, beta2))
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator) * scale
        torchs.grad = ours.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, torchs, rtol=2e-5, atol=2e-6)


def test_chunks_change_nothing_where_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for chunk in (2**22, 7):
        monkeypatch.setattr("svend.training.low_memory.CHUNK", chunk)
        parameter = nn.Parameter(torch.linspace(-1, 1, 60).view(6, 10))
        optimizer = RoundedAdamW([{"params": [parameter]}], 0.1, (0.9, 0.95), torch.float32, 0)
        for step in range(3):
            parameter.grad = torch.cos(parameter.detach() + step)
            optimizer.step()
        moved.append(parameter.detach())
    assert torch.equal(*moved)


def test_updates_too_small_for_bf16_add_up() -> None:
    """Hundreds of steps of 1e-5 on weights of 1, whose neighbours are 1/128 and 1/256 away."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = RoundedAdamW(
        [{"params": [parameter], "lr": 1e-5}], 1e-5, (0.9, 0.95), torch.bfloat16, 3
    )
    for _ in range(400):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.detach().float().mean().item() == pytest.approx(1 - 0.004, abs=5e-4)


@pytest.mark.parametrize(("moments", "decades"), [
    (MomentPrecision.BF16, 2), (MomentPrecision.INT8, 2), (MomentPrecision.INT4, 0),
], ids=lambda value: getattr(value, "value", value))
def test_on_a_quadratic_the_path_stays_near_that_of_fp32(
    moments: MomentPrecision, decades: int
) -> None:
    """Distances to the minimum, as a share of that at the start, differ by less than 0.05.

    decades: over which the curvature of a row's entries varies. In 4 bits, entries that share a
    scale must be of like size: over two decades int4 is half as far on its way as fp32.
    """
    torch.manual_seed(0)
    target, curvature = torch.randn(64, 64), torch.logspace(-decades, 0, 64)

    def distance(of: MomentPrecision) -> float:
        module = nn.Linear(64, 64, bias=False)
        nn.init.zeros_(module.weight)
        optimizer = build_optimizer(
            module, make_training(learning_rate=0.03, weight_decay=0.0, moment_precision=of)
        )
        for _ in range(25):
            module.weight.grad = curvature * (module.weight.detach() - target)
            optimizer.step()
        return ((module.weight - target).norm() / target.norm()).item()

    reference = distance(MomentPrecision.FP32)
    assert 0.1 < reference < 0.8  # on its way
    assert distance(moments) == pytest.approx(reference, abs=0.05)


@pytest.mark.parametrize(
    ("weights", "moments"),
    [pytest.param(w, m, marks=[pytest.mark.slow] if m in QUANTIZED else []) for w, m in RECIPES],
    ids=[f"{w.value}-{m.value}" for w, m in RECIPES],
)
def test_training_stays_near_fp32(weights: WeightPrecision, moments: MomentPrecision) -> None:
    """Over 60 steps, in which the loss falls from 4.2 to below 1: within 0.15 nats at the end."""
    trained = losses_of_60_steps(weights, moments)
    reference = losses_of_60_steps(FP32, MomentPrecision.FP32)
    assert reference[0] > 4 > 1 > np.mean(reference[-5:])
    assert np.mean(trained[-5:]) == pytest.approx(np.mean(reference[-5:]), abs=0.15)


@functools.cache
def losses_of_60_steps(weights: WeightPrecision, moments: MomentPrecision) -> list[float]:
    torch.manual_seed(0)
    training = make_training(weight_precision=weights, moment_precision=moments)
    state = make_state(training, 60)
    return [metrics.loss.item() for metrics in train_steps(state, training, 60)]


@recipes
def test_states_are_kept_in_the_precision_that_is_asked_for(
    weights: WeightPrecision, moments: MomentPrecision
) -> None:
    training = make_training(weight_precision=weights, moment_precision=moments)
    state = make_state(training, 1)
    next(train_steps(state, training, 1))
    for parameter in state.model.parameters():
        vector = parameter.dim() < 2
        wide = vector or weights is FP32
        assert parameter.dtype is (torch.float32 if wide else torch.bfloat16)
    saved = state.optimizer.state_dict()["state"]
    kinds = {type(tensor) for tensors in saved.values() for tensor in tensors.values()}
    assert kinds == {torch.Tensor}
    matrix, vector_ = saved[0], saved[max(saved)]
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}[moments.value]
    size = next(iter(state.model.parameters())).numel()
    held = sum(t.nbytes for name, t in matrix.items() if name != "step")
    assert held == pytest.approx(2 * size * bits / 8, rel=0.07)  # scales of blocks, too
    assert {t.dtype for name, t in vector_.items() if name != "step"} == {torch.float32}


@recipes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_accepted_changes_no_bit(
    weights: WeightPrecision, moments: MomentPrecision, bad: float
) -> None:
    training = make_training(weight_precision=weights, moment_precision=moments)
    state = make_state(training)
    for _ in train_steps(state, training, 2):
        pass
    before = everything(state)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, bad)
    take_step(state.optimizer, torch.tensor(False))
    assert_same(everything(state), before)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    take_step(state.optimizer, torch.tensor(True))
    assert any(not torch.equal(v, before[k]) for k, v in everything(state).items())


@recipes
def test_a_run_saved_and_loaded_goes_on_bit_for_bit(
    weights: WeightPrecision, moments: MomentPrecision, tmp_path: Path
) -> None:
    training = make_training(weight_precision=weights, moment_precision=moments)
    torch.manual_seed(5)
    whole = make_state(training)
    expected = [metrics.loss.item() for metrics in train_steps(whole, training, STEPS)]

    torch.manual_seed(5)
    stopped = make_state(training)
    first = [metrics.loss.item() for metrics in train_steps(stopped, training, 3)]
    CheckpointManager(tmp_path).save(
        stopped.model, stopped.optimizer, stopped.scheduler, step=stopped.step,
        extra_state=stopped.extra_state(),
    )
    torch.manual_seed(99)
    resumed = make_state(training, seed=42)
    _, _, extra = CheckpointManager(tmp_path).load_latest(
        resumed.model, resumed.optimizer, resumed.scheduler
    )
    resumed.load_extra_state(extra)
    rest = [metrics.loss.item() for metrics in train_steps(resumed, training, STEPS)]

    assert [*first, *rest] == expected
    assert_same(everything(resumed), everything(whole))


@recipes
def test_rounding_draws_nothing_from_what_the_model_draws_from(
    weights: WeightPrecision, moments: MomentPrecision
) -> None:
    training = make_training(weight_precision=weights, moment_precision=moments)
    state = make_state(training)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = torch.get_rng_state()
    take_step(state.optimizer, torch.tensor(True))
    assert torch.equal(torch.get_rng_state(), before)


@recipes
def test_two_seeds_round_differently_and_one_alike(
    weights: WeightPrecision, moments: MomentPrecision
) -> None:
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        training = make_training(weight_precision=weights, moment_precision=moments, seed=seed)
        state = make_state(training, 2)
        for _ in train_steps(state, training, 2):
            pass
        ends.append(everything(state))
    assert_same(ends[0], ends[1])
    rounded = weights is BF16 or moments is MomentPrecision.BF16
    same = all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])
    assert same is not rounded


@pytest.mark.parametrize("moments", MomentPrecision)
def test_states_of_another_precision_are_refused(moments: MomentPrecision) -> None:
    if moments in QUANTIZED and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    other = MomentPrecision.INT8 if moments is MomentPrecision.BF16 else MomentPrecision.BF16
    states = []
    for kept in (moments, other):
        training = make_training(weight_precision=BF16, moment_precision=kept)
        state = make_state(training, 1)
        next(train_steps(state, training, 1))
        states.append(state)
    with pytest.raises(ValueError, match=r"keep training\.moment_precision"):
        states[0].optimizer.load_state_dict(states[1].optimizer.state_dict())


@pytest.mark.parametrize("moments", [MomentPrecision.BF16, *QUANTIZED])
def test_the_parametrisations_factors_and_the_schedule_hold(moments: MomentPrecision) -> None:
    training = make_training(
        parametrisation=Parametrisation.COMPLETEP, base_width=32, base_depth=1, base_head_size=8,
        weight_precision=BF16, moment_precision=moments, schedule=Schedule.WSD,
    )
    state = make_state(training)
    assert isinstance(state.model, ReasoningTransformer)
    for _ in range(3):
        factor = state.rate_factor
        of = {id(p): group for group in state.optimizer.param_groups for p in group["params"]}
        for name, parameter in state.model.named_parameters():
            expected = state.model.rules.adamw[group_of(name, parameter)]
            group = of[id(parameter)]
            assert float(group["lr"]) == pytest.approx(1e-2 * expected.learning_rate * factor)
            assert group["weight_decay"] == pytest.approx(0.1 * expected.weight_decay)
            assert group["eps"] == pytest.approx(1e-8 * expected.epsilon)
        next(train_steps(state, training, STEPS))


@pytest.mark.parametrize(("changes", "message"), [
    ({"weight_precision": BF16, "optimizer": Optimizer.MUON}, "training.optimizer = muon: must be"),
    ({"moment_precision": MomentPrecision.INT4, "optimizer": Optimizer.MUON}, "adamw where"),
    ({"weight_precision": BF16, "precision": Precision.FP16}, "training.precision = fp16: must be"),
    ({"weight_precision": BF16, "precision": Precision.FP32}, "auto or bf16 where"),
])
def test_what_does_not_go_together_is_refused_in_one_line(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make_training(**changes).check()
    assert "\n" not in str(raised.value)


def test_bf16_weights_are_refused_where_auto_is_another_precision() -> None:
    training = make_training(weight_precision=BF16, precision=Precision.FP32)
    with pytest.raises(ConfigError, match=r"training\.precision is fp32 here"):
        make_state(training)


def test_without_torchao_int8_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"svend\[lowbit\]"):
        make_state(make_training(moment_precision=MomentPrecision.INT8))


def test_a_version_of_bf16_weights_is_loaded_and_decoded_as_the_same_numbers(
    tmp_path: Path,
) -> None:
    config = load_config({}, list({
        "model.name": "svend-debug", "model.hidden_size": "64", "model.num_hidden_layers": "1",
        "model.num_attention_heads": "4", "model.num_key_value_heads": "4",
        "model.intermediate_size": "128", "model.vocab_size": "64",
        "training.weight_precision": "bf16",
    }.items()))
    assert config.model is not None
    model = ReasoningTransformer(TransformerConfig.from_model_config(config.model, None))
    prepare_weights(model, replace(config.training, precision=Precision.BF16))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    write_weights(tmp_path / "model.pt", tmp_path / WEIGHTS)
    loaded = load_version_model(tmp_path, config, CPU)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype is torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.float())
    tokens = []
    for of in (loaded, model.eval()):
        decoder = Decoder(of, lanes=1, max_length=32, precision=Precision.FP32)
        (completion,) = decoder.generate([Request([1, 2, 3], PlainTurn(8))])
        tokens.append(completion.tokens)
    assert tokens[0] == tokens[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("moments", QUANTIZED)
def test_compiled_steps_are_the_eager_ones_and_draw_from_the_seed(
    moments: MomentPrecision,
) -> None:
    """Rounding draws other numbers there, from the same seed: weights agree to a unit of bf16."""
    ends = []
    for compiled in (Compile.OFF, Compile.AUTO, Compile.AUTO):
        training = make_training(
            weight_precision=BF16, moment_precision=moments, compile=compiled
        )
        torch.manual_seed(0)
        module = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        optimizer = build_optimizer(module, training)
        before = torch.get_rng_state()
        for step in range(2):
            module.weight.grad = torch.cos(torch.arange(4096.0) + step).view(64, 64).bfloat16()
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(module.weight.detach().clone())
    assert torch.equal(ends[1], ends[2])
    torch.testing.assert_close(ends[0], ends[1], rtol=2**-6, atol=1e-4)


def _train_sharded(rank: int, folder: str, shards: int) -> None:
    """Take the same steps in some shards, and write down where they came to."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{shards}", rank=rank, world_size=shards
    )
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (shards,))
    for moments in MomentPrecision:
        for weights in WeightPrecision:
            if (weights, moments) == (FP32, MomentPrecision.FP32):
                continue
            training = make_training(weight_precision=weights, moment_precision=moments)
            torch.manual_seed(0)
            module = nn.Linear(256, 64, bias=False)
            prepare_weights(module, training)
            if shards > 1:
                fully_shard(module, mesh=mesh)
            optimizer = build_optimizer(module, training)
            generator = torch.Generator().manual_seed(1)
            for step in range(4):
                gradient = torch.randn(64, 256, generator=generator).to(module.weight.dtype)
                module.weight.grad = part_of(gradient, module.weight)
                if step == 2:  # as from a checkpoint of any number of processes
                    saved = optimizer.state_dict()
                    saved["state"] = {0: {k: whole(v) for k, v in saved["state"][0].items()}}
                    optimizer = build_optimizer(module, training)
                    optimizer.load_state_dict(lay_out(saved, module.weight))
                take_step(optimizer, torch.tensor(step != 1))
            states = optimizer.state_dict()["state"][0]
            reached = {k: whole(v).detach() for k, v in {"weight": module.weight, **states}.items()}
            if rank == 0:
                torch.save(reached, f"{folder}/{shards}-{weights.value}-{moments.value}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_sharded_states_are_those_of_one_process(tmp_path: Path) -> None:
    """To the bit where nothing is rounded at random: each part draws numbers of its own."""
    for shards in (1, 2):
        torch.multiprocessing.spawn(_train_sharded, (str(tmp_path), shards), nprocs=shards)
    for weights, moments in RECIPES:
        one, two = (
            torch.load(tmp_path / f"{shards}-{weights.value}-{moments.value}.pt")
            for shards in (1, 2)
        )
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            if weights is FP32 and moments in QUANTIZED:
                assert torch.equal(two[name], tensor), (weights, moments, name)
            elif name == "weight":
                assert two[name].dtype is tensor.dtype
                assert (two[name] - tensor).abs().max() < 2**-7
