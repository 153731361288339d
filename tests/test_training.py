"""The loop, its schedule and optimizer, and the held-out loss, against plain PyTorch."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svend.data.documents import Kind
from svend.data.stream import (
    IGNORE_LABEL,
    BatchStream,
    PackedSequences,
    next_token_labels,
)
from svend.data.token_array import TokenArray
from svend.device import DTYPES
from svend.errors import ConfigError
from svend.evaluation.heldout import measure_gradient_norm, measure_heldout_loss
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.config import DataConfig, Optimizer, Precision, Schedule, TrainingConfig
from svend.training.clipping import clip_gradients, norm_in_fp32
from svend.training.loop import StepMetrics, train_steps
from svend.training.muon import Muon, orthogonalize
from svend.training.optimizers import build_optimizer
from svend.training.schedules import learning_rate_factor
from svend.training.state import TrainState, build_state

CPU = torch.device("cpu")
VOCAB = 53
LENGTH = 24


def make_training(**changes: Any) -> TrainingConfig:
    settings_: dict[str, Any] = {
        "precision": Precision.FP32, "learning_rate": 1e-2, "batch_size": 2,
        "gradient_accumulation_steps": 1, "schedule": Schedule.COSINE, "warmup_ratio": 0.2,
    }
    return TrainingConfig(**(settings_ | changes))


def make_model(dropout: float = 0.0, seed: int = 0) -> ReasoningTransformer:
    model = ReasoningTransformer(
        TransformerConfig(
            name="test", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, vocab_size=VOCAB,
            initializer_range=0.1, attention_dropout=dropout,
        )
    )
    model.initialize(seed)
    return model


def make_sequences(documents: int = 60, longest: int = 20) -> PackedSequences:
    """Rows of random documents, some mostly padding."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, longest + 1, documents)
    drawn = [generator.integers(0, VOCAB, length).astype(np.uint16) for length in lengths]
    part = TokenArray.of("train", drawn, [Kind.GENERAL] * documents)
    data = DataConfig(sources=["text"], mix_ratios={"general": 1.0}, max_seq_length=LENGTH)
    return PackedSequences(part, data, seed=0)


def make_state(
    training: TrainingConfig, total_steps: int, *, dropout: float = 0.0, seed: int = 0,
    documents: int = 60,
) -> TrainState:
    stream = BatchStream(
        make_sequences(documents), training.batch_size, training.gradient_accumulation_steps
    )
    return build_state(make_model(dropout, seed), stream, training, total_steps, CPU)


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


schedules = st.builds(
    make_training,
    schedule=st.sampled_from(Schedule),
    warmup_ratio=st.floats(0, 0.5),
    decay_ratio=st.floats(0, 0.5),
    min_learning_rate_ratio=st.floats(0, 1),
)
total_steps_ = st.integers(2, 3000)


@settings(max_examples=100, deadline=None)
@given(training=schedules, total_steps=total_steps_)
def test_the_warm_up_rises_in_equal_steps_from_above_zero_to_the_peak(
    training: TrainingConfig, total_steps: int
) -> None:
    warmup_steps = round(training.warmup_ratio * total_steps)
    rising = [learning_rate_factor(s, total_steps, training) for s in range(warmup_steps)]
    rising.append(1.0)
    differences = np.diff([0.0, *rising])
    assert np.allclose(differences, 1 / (warmup_steps + 1), rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(training=schedules, total_steps=total_steps_, data=st.data())
def test_the_learning_rate_stays_between_zero_and_the_peak_and_only_falls_after_warm_up(
    training: TrainingConfig, total_steps: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, total_steps))
    here = learning_rate_factor(step, total_steps, training)
    assert 0 <= here <= 1
    if step >= round(training.warmup_ratio * total_steps):
        assert learning_rate_factor(step + 1, total_steps, training) <= here + 1e-12
        assert here >= training.min_learning_rate_ratio - 1e-12


@settings(max_examples=100, deadline=None)
@given(training=schedules, total_steps=total_steps_, beyond=st.integers(0, 5))
def test_cosine_and_wsd_end_at_the_minimum_and_constant_at_the_peak(
    training: TrainingConfig, total_steps: int, beyond: int
) -> None:
    end = learning_rate_factor(total_steps + beyond, total_steps, training)
    constant = training.schedule is Schedule.CONSTANT
    assert math.isclose(
        end, 1.0 if constant else training.min_learning_rate_ratio, abs_tol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(training=schedules, total_steps=total_steps_)
def test_the_wsd_plateau_is_flat_and_its_decay_linear(
    training: TrainingConfig, total_steps: int
) -> None:
    training.schedule = Schedule.WSD
    warmup_steps = round(training.warmup_ratio * total_steps)
    decay_steps = max(1, round(training.decay_ratio * total_steps))
    start = max(warmup_steps, total_steps - decay_steps)
    plateau = [learning_rate_factor(s, total_steps, training) for s in range(warmup_steps, start)]
    assert set(plateau) <= {1.0}
    falling = [
        learning_rate_factor(s, total_steps, training) for s in range(start, total_steps + 1)
    ]
    slope = -(1 - training.min_learning_rate_ratio) / decay_steps
    assert np.allclose(np.diff(falling), slope, atol=1e-9)


def test_the_cosine_is_half_way_down_at_half_time() -> None:
    training = make_training(warmup_ratio=0.0, min_learning_rate_ratio=0.1)
    assert learning_rate_factor(0, 100, training) == 1.0
    assert learning_rate_factor(50, 100, training) == pytest.approx(0.55)


def test_each_step_uses_the_schedules_learning_rate() -> None:
    training = make_training()
    state = make_state(training, 10)
    used = [metrics.learning_rate for metrics in train_steps(state, training, 10)]
    expected = [1e-2 * learning_rate_factor(step, 10, training) for step in range(10)]
    assert used == pytest.approx(expected, rel=1e-12)


def test_weight_decay_shrinks_matrices_and_leaves_gains() -> None:
    training = make_training(weight_decay=0.3, learning_rate=0.1)
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, training).step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.3 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_every_parameter_is_optimized_once_and_frozen_ones_never() -> None:
    model = make_model()
    model.embedding.weight.requires_grad_(False)
    groups = build_optimizer(model, make_training()).param_groups
    optimized = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(optimized) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("accumulation", "batch_size"), [(2, 1), (4, 1), (3, 2)])
def test_accumulated_micro_batches_update_as_the_one_large_batch(
    accumulation: int, batch_size: int
) -> None:
    def run(steps: int, size: int) -> tuple[list[StepMetrics], TrainState]:
        # A large epsilon, or Adam blows rounding errors in near-zero gradients up.
        training = make_training(
            gradient_accumulation_steps=steps, batch_size=size, adam_epsilon=1e-3,
            max_grad_norm=0.5,
        )
        state = make_state(training, 3, documents=11)
        return list(train_steps(state, training, 3)), state

    sequences = make_sequences(documents=11)
    token_counts = [
        int((next_token_labels(b.tokens_BT, b.documents_BT) != IGNORE_LABEL).sum())
        for b in (sequences.batch(i * batch_size, batch_size) for i in range(accumulation))
    ]
    assert len(set(token_counts)) > 1

    small, small_state = run(accumulation, batch_size)
    large, large_state = run(1, accumulation * batch_size)
    for a, b in zip(small, large, strict=True):
        assert (a.step, a.tokens, a.learning_rate) == (b.step, b.tokens, b.learning_rate)
        torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.gradient_norm, b.gradient_norm, atol=1e-4, rtol=1e-4)
    for name, value in weights(small_state).items():
        torch.testing.assert_close(value, weights(large_state)[name], atol=2e-5, rtol=1e-4)
    assert small_state.stream.state_dict() == large_state.stream.state_dict()


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
def test_steps_equal_a_reference_written_out_in_plain_torch(max_grad_norm: float) -> None:
    training = make_training(max_grad_norm=max_grad_norm, batch_size=3, weight_decay=0.2)
    state = make_state(training, 5)
    model = make_model()
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.2},
         {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=1.0, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_epsilon,
        foreach=False, fused=False,
    )
    sequences = make_sequences()
    tokens = 0
    for metrics in train_steps(state, training, 5):
        batch = sequences.batch((metrics.step - 1) * 3, 3)
        labels_BT = next_token_labels(batch.tokens_BT, batch.documents_BT)
        logits_BTV = model(batch.tokens_BT, documents_BT=batch.documents_BT)
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE_LABEL
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * learning_rate_factor(metrics.step - 1, 5, training)
        optimizer.step()
        tokens += int((labels_BT != IGNORE_LABEL).sum())

        torch.testing.assert_close(metrics.loss, loss.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(metrics.gradient_norm, norm, atol=1e-5, rtol=1e-4)
        assert metrics.tokens == tokens
        for name, value in model.state_dict().items():
            torch.testing.assert_close(
                state.model.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name
            )


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest() -> None:
    training = make_training(optimizer=Optimizer.MUON, weight_decay=0.1)
    ours, reference = make_model(), make_model()
    optimizer = build_optimizer(ours, training)
    matrices = [p for n, p in reference.named_parameters() if "blocks" in n and p.dim() == 2]
    rest = [p for n, p in reference.named_parameters() if "blocks" not in n or p.dim() == 1]
    assert len(matrices) == 14
    expected = [
        Muon(matrices, lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([
            {"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
        ], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True),
    ]
    for seed in range(3):
        torch.manual_seed(seed)
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        optimizer.step()
        for each in expected:
            each.step()
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


# Of what three steps move: fp32 differs from torch's, which is in bf16, by the rounding of that.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-3), (torch.float32, 0.015)])
def test_muon_takes_the_steps_of_torchs(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((64, 32), (32, 64), (32, 32), (32, 64), (16, 32))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=1e-2, weight_decay=0.1, dtype=dtype),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for mine, reference in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            reference.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, mine, reference in zip(start, ours, theirs, strict=True):
        moved = (reference.detach() - before).norm()
        assert (mine - reference).detach().norm() < tolerance * moved


def test_orthogonalised_matrices_keep_their_singular_vectors() -> None:
    torch.manual_seed(0)
    x_NRC = torch.randn(3, 20, 50)
    left, _, right = torch.linalg.svd(x_NRC, full_matrices=False)
    inner = left.mT @ orthogonalize(x_NRC) @ right.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.3 and values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3


def test_muon_is_refused_for_a_model_without_blocks() -> None:
    with pytest.raises(ConfigError, match=r"^training\.optimizer = muon: "):
        build_optimizer(nn.Linear(4, 4), make_training(optimizer=Optimizer.MUON))


@pytest.mark.parametrize("optimizer", Optimizer)
@pytest.mark.parametrize("precision", DTYPES)
def test_a_run_stopped_saved_and_loaded_goes_on_bit_for_bit(
    precision: Precision, optimizer: Optimizer, tmp_path: Path
) -> None:
    training = make_training(
        precision=precision, optimizer=optimizer, gradient_accumulation_steps=2
    )
    torch.manual_seed(5)
    whole = make_state(training, 7, dropout=0.1)
    expected = list(train_steps(whole, training, 7))

    torch.manual_seed(5)
    stopped = make_state(training, 7, dropout=0.1)
    first = list(train_steps(stopped, training, 3))
    CheckpointManager(tmp_path).save(
        stopped.model, stopped.optimizer, stopped.scheduler, step=stopped.step,
        extra_state=stopped.extra_state(), scaler=stopped.scaler,
    )

    torch.manual_seed(99)
    resumed = make_state(training, 7, dropout=0.1, seed=42)
    step, _, extra = CheckpointManager(tmp_path).load_latest(
        resumed.model, resumed.optimizer, resumed.scheduler, resumed.scaler
    )
    resumed.load_extra_state(extra)
    rest = list(train_steps(resumed, training, 7))

    assert step == 3
    for measured, reference in zip([*first, *rest], expected, strict=True):
        assert measured.loss.item() == reference.loss.item()
        assert measured.gradient_norm.item() == reference.gradient_norm.item()
        assert measured.learning_rate == reference.learning_rate
        assert (measured.step, measured.tokens) == (reference.step, reference.tokens)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_random_state_matters_to_the_run_that_is_resumed() -> None:
    training = make_training()
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = make_state(training, 1, dropout=0.1)
        losses.append(next(train_steps(state, training, 1)).loss.item())
    assert losses[0] != losses[1]


def test_fp16_scales_the_loss_and_steps_as_fp32_does() -> None:
    losses, norms = {}, {}
    for precision in (Precision.FP32, Precision.FP16):
        training = make_training(precision=precision)
        state = make_state(training, 10)
        before = weights(state)
        metrics = next(train_steps(state, training, 10))
        losses[precision], norms[precision] = metrics.loss.item(), metrics.gradient_norm.item()
        assert any(not torch.equal(weights(state)[name], value) for name, value in before.items())
    assert losses[Precision.FP16] == pytest.approx(losses[Precision.FP32], rel=2e-3)
    assert norms[Precision.FP16] == pytest.approx(norms[Precision.FP32], rel=2e-2)


def test_fp16_skips_the_step_whose_gradient_is_infinite_and_halves_the_scale() -> None:
    training = make_training(precision=Precision.FP16, schedule=Schedule.CONSTANT)
    state = make_state(training, 10)
    assert state.scaler is not None
    scale = state.scaler.get_scale()
    assert isinstance(state.model, ReasoningTransformer)
    poison = state.model.head.weight.register_hook(lambda grad: grad * math.inf)
    before = weights(state)
    steps = train_steps(state, training, 10)

    assert not math.isfinite(next(steps).gradient_norm.item())
    assert all(torch.equal(weights(state)[name], value) for name, value in before.items())
    assert state.scaler.get_scale() == scale / 2

    poison.remove()
    assert math.isfinite(next(steps).gradient_norm.item())
    after = weights(state)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_the_loop_overfits_one_batch() -> None:
    training = make_training(warmup_ratio=0.1, weight_decay=0.0)
    state = make_state(training, 120, documents=3)
    losses = [metrics.loss.item() for metrics in train_steps(state, training, 120)]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=1.0)
    assert losses[-1] < 0.1


def test_the_loop_stops_at_the_last_step_and_goes_on_from_there() -> None:
    training = make_training()
    state = make_state(training, 5)
    assert [m.step for m in train_steps(state, training, 3)] == [1, 2, 3]
    assert [m.step for m in train_steps(state, training, 3)] == []
    assert [m.step for m in train_steps(state, training, 5)] == [4, 5]
    assert state.stream.next_sequence == 5 * training.batch_size


def test_the_loop_leaks_no_context_to_its_consumer() -> None:
    training = make_training(precision=Precision.BF16)
    for _ in train_steps(make_state(training, 2), training, 2):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


def test_a_consumer_that_evaluates_between_steps_changes_nothing() -> None:
    training = make_training()
    heldout = make_sequences(documents=9)
    runs = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        state = make_state(training, 4, dropout=0.1)
        losses = []
        for metrics in train_steps(state, training, 4):
            losses.append(metrics.loss.item())
            if evaluates:
                measure_heldout_loss(state.model, heldout.first(2), Precision.FP32, CPU)
        runs.append(losses)
    assert runs[0] == runs[1]


def test_the_gradient_norm_of_a_version_is_that_of_its_mean_loss() -> None:
    model, sequences = make_model(), make_sequences(documents=40)
    measured = measure_gradient_norm(model, sequences.first(4), Precision.FP32, CPU)
    assert all(parameter.grad is None for parameter in model.parameters())
    batches = list(sequences.first(4))
    summed = [model(b.tokens_BT, b.labels_BT, b.documents_BT) for b in batches]
    (sum(summed) / sum(b.predicted_tokens for b in batches)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert measured == pytest.approx(float(expected), rel=1e-5)


def test_the_held_out_loss_and_its_error_equal_a_direct_computation() -> None:
    model, sequences = make_model(), make_sequences(documents=40)
    measured = measure_heldout_loss(model, sequences.first(8), Precision.FP32, CPU)
    sums, counts = [], []
    for number in range(8):
        batch = sequences.batch(number, 1)
        labels_BT = next_token_labels(batch.tokens_BT, batch.documents_BT)
        with torch.no_grad():
            logits_BTV = model(batch.tokens_BT, documents_BT=batch.documents_BT).double()
        sums.append(F.cross_entropy(
            logits_BTV[0], labels_BT[0], ignore_index=IGNORE_LABEL, reduction="sum"
        ).item())
        counts.append(int((labels_BT != IGNORE_LABEL).sum()))
    s, t = np.array(sums), np.array(counts)
    loss = s.sum() / t.sum()
    error = np.std(s - loss * t, ddof=1) / math.sqrt(8) / t.mean()
    assert measured.tokens == t.sum()
    assert measured.sequences == 8
    assert measured.loss == pytest.approx(loss, rel=1e-5)
    # The residuals s - loss t sum to zero, so that ddof=1 is the n / (n - 1) of the estimator.
    assert measured.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    measurements = measured.measurements()
    assert measurements["loss"].sample_size == 8
    # A bootstrap draws as if n were n - 1: sqrt(7 / 8) of the estimator's error.
    low, high = measurements["loss"].interval
    assert (high - low) / 2 == pytest.approx(1.96 * error * math.sqrt(7 / 8), rel=0.15)
    assert (low + high) / 2 == pytest.approx(loss, abs=error / 2)
    assert measurements["perplexity"].interval == pytest.approx((math.exp(low), math.exp(high)))


def test_the_held_out_interval_narrows_as_sequences_are_added() -> None:
    model, sequences = make_model(), make_sequences(documents=600)
    widths = []
    for count in (4, 32, 200):
        measured = measure_heldout_loss(model, sequences.first(count), Precision.FP32, CPU)
        low, high = measured.measurements()["loss"].interval
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


def test_one_held_out_sequence_has_no_finite_interval_and_all_are_used_where_there_are_fewer() -> (
    None
):
    model, sequences = make_model(), make_sequences(documents=9)
    one = measure_heldout_loss(model, sequences.first(1), Precision.FP32, CPU)
    assert one.measurements()["loss"].interval == (-math.inf, math.inf)
    all_ = measure_heldout_loss(model, sequences.first(10_000), Precision.FP32, CPU)
    assert all_.sequences == len(sequences)


@pytest.mark.parametrize("training_mode", [True, False])
def test_evaluating_leaves_mode_random_state_weights_and_gradients_as_they_were(
    training_mode: bool,
) -> None:
    model = make_model(dropout=0.5).train(training_mode)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    sequences = make_sequences(documents=9)
    first = measure_heldout_loss(model, sequences.first(3), Precision.BF16, CPU)
    second = measure_heldout_loss(model, sequences.first(3), Precision.BF16, CPU)
    assert first == second
    assert model.training is training_mode
    assert all(module.training is training_mode for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {parameter.grad for parameter in model.parameters()} == {None}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    max_norm=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_clipping_equals_torchs(
    sizes: list[int], scale: float, max_norm: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = [scale * torch.randn(size, 2, generator=generator) for size in sizes]

    def parameters() -> list[torch.Tensor]:
        made = [torch.zeros_like(gradient, requires_grad=True) for gradient in drawn]
        for parameter, gradient in zip(made, drawn, strict=True):
            parameter.grad = gradient.clone()
        return [*made, torch.zeros(3, requires_grad=True)]

    ours, theirs = parameters(), parameters()
    norm = clip_gradients(ours, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    torch.testing.assert_close(norm_in_fp32(drawn), norm)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_reported(bad: float) -> None:
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.tensor([1.0, bad, 1.0])
    assert not math.isfinite(float(clip_gradients([parameter], 1.0)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_first_step_does_not_wait_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced only: what the compiler would make of it is not asked here.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    training = make_training()
    state, plain = make_state(training, 2), make_state(training, 2)
    state.model.compile_blocks()
    torch._dynamo.utils.counters.clear()
    steps = train_steps(state, training, 2)
    first = next(steps)
    assert torch._dynamo.utils.counters["frames"]["ok"] == 0
    second = next(steps)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for step, expected in zip((first, second), train_steps(plain, training, 2), strict=True):
        torch.testing.assert_close(step.loss, expected.loss, rtol=1e-5, atol=1e-6)
