"""Looks at a run's health: what they measure, that they change nothing, and what they call ill."""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from svend.data.stream import Batch
from svend.device import autocast
from svend.errors import HealthError
from svend.models.config import BaseShape, TransformerConfig
from svend.models.inspection import inspect_row, open_blocks
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import HealthAction, HealthConfig, Optimizer, Precision
from svend.pipeline.health import HealthFigures, HealthMonitor
from svend.pipeline.runner import PipelineResult
from svend.training.guard import StepGuard
from svend.training.health import HealthProbe, LayerWeights
from svend.training.loop import StepMetrics, train_steps
from svend.training.optimizers import build_optimizer, take_step
from svend.training.state import TrainState
from tests.large_weights import large_weights
from tests.registry import store
from tests.test_divergence import (
    DeviceReads,
    Workshop,
    assert_same,
    everything,
    logged,
    poison_gradients,
    run_of,
)
from tests.test_training import make_sequences, make_state, make_training

CPU = torch.device("cpu")
VOCAB = 61
# Heads and key/value heads: of their own, grouped, and one for all.
HEADS = [(4, 4), (4, 2), (4, 1)]
BASES = [None, BaseShape(width=16, depth=1, head_size=16)]


def make_model(
    heads: tuple[int, int] = HEADS[1], base: BaseShape | None = None, seed: int = 0
) -> ReasoningTransformer:
    return large_weights(TransformerConfig(
        name="test", hidden_size=32, num_hidden_layers=3, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], intermediate_size=48, vocab_size=VOCAB, base=base,
    ), seed)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """One row of packed documents, with padding behind them or without."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    padding = draw(st.integers(0, 6))
    documents = [n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tokens_BT = torch.randint(VOCAB, (1, len(documents)), generator=generator)
    return Batch.of(tokens_BT, torch.tensor([documents]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("heads", HEADS)
@settings(max_examples=10, deadline=None)
@given(batch=batches())
def test_the_opened_blocks_compute_what_the_model_does(
    heads: tuple[int, int], base: BaseShape | None, batch: Batch
) -> None:
    model = make_model(heads, base)
    inputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, taken, __: inputs.append(taken[0]))
    with torch.no_grad():
        expected = model.hidden_states(batch.tokens_BT, batch.documents_BT)
        opened = list(open_blocks(model, batch.tokens_BT, batch.documents_BT))
        for block, taken in zip(opened, inputs, strict=True):
            torch.testing.assert_close(block.x_BTD, taken, rtol=1e-4, atol=1e-4)
        last = opened[-1]
        left = model.final_norm(last.x_BTD + last.attention_BTD + last.feed_forward_BTD)
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-4)


def brute_force(model: ReasoningTransformer, batch: Batch) -> list[dict[str, float]]:
    """What an inspection measures, from the model's own queries, keys and branches, in Python."""
    caught: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "attention", "feed_forward")):
            module.register_forward_hook(
                lambda _, __, out, name=name: caught.__setitem__(name, out[0].double())
            )
        if name.count(".") == 1:
            module.register_forward_hook(
                lambda _, taken, __, name=name: caught.__setitem__(name, taken[0][0].double())
            )
    with torch.no_grad():
        model.hidden_states(batch.tokens_BT, batch.documents_BT)
    config, rules = model.config, model.rules
    documents = batch.documents_BT[0].tolist()
    real = [t for t, document in enumerate(documents) if document >= 0]

    def turned(x_TD: Tensor, head: int, t: int) -> list[complex]:
        half, size = config.head_size // 2, config.head_size
        x_S = x_TD[t, head * size : (head + 1) * size].tolist()
        position = t - documents.index(documents[t])
        return [complex(x_S[i], x_S[i + half])
                * cmath.exp(1j * position * config.rope_theta ** (-2 * i / size))
                for i in range(half)]

    def rms(x_TD: Tensor) -> float:
        return float(x_TD[real].square().mean().sqrt())

    measured = []
    for layer in range(config.num_hidden_layers):
        at = f"blocks.{layer}"
        largest, entropies = 0.0, []
        for head in range(config.heads):
            shares = []
            for t in real:
                keys = [s for s in range(t + 1) if documents[s] == documents[t]]
                query = turned(caught[f"{at}.attention.q_proj"] * rules.attention, head, t)
                logits = []
                for s in keys:
                    group = config.heads // config.kv_heads
                    key = turned(caught[f"{at}.attention.k_proj"], head // group, s)
                    product = sum((q * k.conjugate()).real for q, k in zip(query, key, strict=True))
                    logits.append(product / math.sqrt(config.head_size))
                largest = max([largest, *map(abs, logits)])
                if len(keys) > 1:
                    weights = [math.exp(logit - max(logits)) for logit in logits]
                    p = [weight / sum(weights) for weight in weights]
                    entropy = -sum(share * math.log(share) for share in p if share > 0)
                    shares.append(entropy / math.log(len(keys)))
            entropies.append(sum(shares) / len(shares) if shares else math.nan)
        measured.append({
            "attention_logit_L": largest,
            "mean_head_entropy_L": sum(entropies) / len(entropies),
            "min_head_entropy_L": min(entropies),
            "residual_rms_L": rms(caught[at]),
            "attention_branch_rms_L": rms(caught[f"{at}.attention"]) * rules.residual,
            "feed_forward_branch_rms_L": rms(caught[f"{at}.feed_forward"]) * rules.residual,
        })
    return measured


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("heads", HEADS)
@settings(max_examples=5, deadline=None)
@given(batch=batches())
def test_an_inspection_measures_what_brute_force_does(
    heads: tuple[int, int], base: BaseShape | None, batch: Batch
) -> None:
    model = make_model(heads, base)
    inspection = inspect_row(model, batch.tokens_BT, batch.documents_BT)
    for layer, expected in enumerate(brute_force(model, batch)):
        found = {name: float(getattr(inspection, name)[layer]) for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)


def test_attention_to_all_alike_has_entropy_one_and_to_one_key_zero() -> None:
    tokens_BT, documents_BT = torch.arange(20)[None], torch.zeros((1, 20), dtype=torch.int64)
    for scale, low, high in ((0.0, 0.9999, 1.0001), (1e4, -0.0001, 0.05)):
        model = make_model()
        with torch.no_grad():
            for block in model.blocks:
                block.attention.q_proj.weight.mul_(scale)
        inspection = inspect_row(model, tokens_BT, documents_BT)
        entropies = [*inspection.min_head_entropy_L, *inspection.mean_head_entropy_L]
        assert all(low <= float(entropy) <= high for entropy in entropies)


def test_only_the_first_row_without_padding_up_to_512_positions_counts() -> None:
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(VOCAB, (2, 600), generator=generator)
    documents_BT = (torch.arange(600) // 100).expand(2, -1).clone()
    documents_BT[:, 450:500] = -1
    expected = inspect_row(model, tokens_BT, documents_BT)
    other = torch.randint(VOCAB, (2, 600), generator=generator)
    elsewhere = torch.zeros((2, 600), dtype=torch.bool)
    elsewhere[1], elsewhere[0, 450:500], elsewhere[0, 512:] = True, True, True
    assert_same(
        vars(inspect_row(model, torch.where(elsewhere, other, tokens_BT), documents_BT)),
        vars(expected),
    )
    changed = inspect_row(model, torch.where(elsewhere, tokens_BT, other), documents_BT)
    assert not torch.equal(changed.residual_rms_L, expected.residual_rms_L)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_in_half_precision_the_figures_are_those_of_fp32_to_rounding(precision: Precision) -> None:
    model = make_model()
    tokens_BT, documents_BT = torch.arange(48)[None], torch.arange(48)[None] // 20
    expected = inspect_row(model, tokens_BT, documents_BT)
    with autocast(precision, CPU):
        found = inspect_row(model, tokens_BT, documents_BT)
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), values, rtol=0.1, atol=0.02)


def test_a_compiled_model_is_looked_into_without_its_compiled_blocks() -> None:
    model = make_model()
    tokens_BT, documents_BT = torch.arange(16)[None], torch.zeros((1, 16), dtype=torch.int64)
    expected = inspect_row(model, tokens_BT, documents_BT)

    def compiled(*_: Any) -> Tensor:
        raise AssertionError("compiled code was called")

    model.fused = True
    for part in (*model.blocks, model.final_norm):
        part._compiled_call_impl = compiled
    assert_same(vars(inspect_row(model, tokens_BT, documents_BT)), vars(expected))


@pytest.mark.parametrize("optimizer", Optimizer)
@settings(max_examples=8, deadline=None)
@given(
    frozen=st.sets(st.integers(0, 2), max_size=2), accepted=st.booleans(), seed=st.integers(0, 99)
)
def test_the_relative_update_is_the_norm_of_the_change_over_that_of_the_weights(
    optimizer: Optimizer, frozen: set[int], accepted: bool, seed: int
) -> None:
    model = make_model()
    for layer in frozen:
        model.blocks[layer].requires_grad_(False)
    updater = build_optimizer(model, make_training(optimizer=optimizer))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    was = [torch.nn.utils.parameters_to_vector(b.parameters()).detach() for b in model.blocks]
    weights = LayerWeights(model)
    before = weights.sample()
    take_step(updater, torch.tensor(accepted))
    updates = weights.relative_update(before)
    now = [torch.nn.utils.parameters_to_vector(b.parameters()).detach() for b in model.blocks]
    expected = torch.stack([(new - old).norm() / old.norm()
                            for new, old in zip(now, was, strict=True)])
    assert weights.layers == ("layer_00", "layer_01", "layer_02")
    torch.testing.assert_close(updates, expected, rtol=1e-4, atol=0)
    assert [float(update) == 0 for update in updates] == [
        layer in frozen or not accepted for layer in range(3)
    ]


class TwoParts(nn.Module):
    """A module of another kind, with matrices too large to be looked at whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(512, 1024, bias=False)
        self.second = nn.Sequential(nn.Linear(96, 3000), nn.Linear(64, 64))
        self.scale = nn.Parameter(torch.ones(()))


def test_another_module_is_looked_at_by_its_parts_on_a_sample_that_no_column_escapes() -> None:
    torch.manual_seed(0)
    model = TwoParts()
    with torch.no_grad():
        model.second[1].weight.mul_(5)
    weights = LayerWeights(model)
    assert sorted(weights.layers) == ["first", "scale", "second"]
    before = weights.sample()
    assert max(len(sampled) for sampled in before) <= 65_536
    with torch.no_grad():
        # One column in eight moves: a stride along the columns would see all of it, or nothing.
        model.first.weight[:, ::8] *= 1.5
        model.second[0].weight.add_(torch.randn(3000, 96) * 0.01)
        # Beside a small one that is looked at whole: each counts by its entries, not its sample's.
        norm = float(torch.nn.utils.parameters_to_vector(model.second.parameters()).norm())
    found = dict(zip(weights.layers, weights.relative_update(before).tolist(), strict=True))
    assert found["first"] == pytest.approx(0.5 / math.sqrt(8), rel=0.03)
    assert found["second"] == pytest.approx(0.01 * math.sqrt(3000 * 96) / norm, rel=0.05)
    assert found["scale"] == 0
    probe = HealthProbe(model, Precision.FP32, 1)
    end = probe.begin(1)
    assert end is not None
    reading = end(make_sequences().batch(0, 1))
    assert reading.inspection is None
    assert set(HealthFigures.read(reading).metrics()) == {
        "health/min_relative_update", "health/max_relative_update",
        *(f"health/{part}/relative_update" for part in ("first", "second", "scale")),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("optimizer", Optimizer)
def test_a_run_that_is_looked_at_is_the_run_that_is_not_bit_for_bit(
    optimizer: Optimizer, precision: Precision, dropout: float
) -> None:
    training = make_training(
        gradient_accumulation_steps=2, optimizer=optimizer, precision=precision
    )

    def run(every_steps: int | None) -> tuple[TrainState, list[StepMetrics]]:
        torch.manual_seed(0)
        state = make_state(training, 6, dropout=dropout)
        probe = every_steps and HealthProbe(state.model, precision, every_steps)
        return state, list(train_steps(state, training, 6, probe or None))

    plain, expected = run(None)
    looked_at, metrics = run(2)
    assert [m.step for m in metrics if m.health] == [2, 4, 6]
    assert_same([m.loss for m in metrics], [m.loss for m in expected])
    assert_same([m.gradient_norm for m in metrics], [m.gradient_norm for m in expected])
    assert_same(everything(looked_at), everything(plain))


def test_a_resumed_run_is_looked_at_in_the_same_steps_with_the_same_figures() -> None:
    training = make_training()
    whole = make_state(training, 12)
    expected = [
        (m.step, HealthFigures.read(m.health)) for m in
        train_steps(whole, training, 12, HealthProbe(whole.model, Precision.FP32, 3)) if m.health
    ]
    found = []
    state = make_state(training, 12)
    for stop in (4, 9, 12):  # each time with a probe of its own
        probe = HealthProbe(state.model, Precision.FP32, 3)
        found += [(m.step, HealthFigures.read(m.health))
                  for m in train_steps(state, training, stop, probe) if m.health]
    assert [step for step, _ in found] == [3, 6, 9, 12]
    assert found == expected


def test_a_look_never_waits_for_the_device() -> None:
    model, batch = make_model(), Batch.of(torch.arange(40)[None], torch.arange(40)[None] // 15)
    probe = HealthProbe(model, Precision.FP32, 1)
    with DeviceReads() as reads:
        end = probe.begin(1)
        assert end is not None
        reading = end(batch)
    assert reads.count == 0
    with DeviceReads() as reads:
        float(reading.relative_update_L[0])
    assert reads.count == 1


def test_a_look_at_a_skipped_step_shows_that_nothing_moved() -> None:
    training = make_training()
    state = make_state(training, 6)
    state.guard = StepGuard(CPU, None)
    poison_gradients(state, {2, 3}, lambda g: g * math.nan)
    probe = HealthProbe(state.model, Precision.FP32, 1)
    moved = [bool((m.health.relative_update_L > 0).all())
             for m in train_steps(state, training, 5, probe) if m.health]
    assert moved == [True, False, False, True, True]


def figures(
    update: float = 1e-3, logit: float = 5.0, attention: float = 0.1, feed_forward: float = 0.1
) -> HealthFigures:
    """A look at two layers, of which the second shows these values."""
    return HealthFigures(
        ("layer_00", "layer_01"),
        {
            "relative_update": [1e-3, update], "attention_logit": [5.0, logit],
            "head_entropy": [0.5, 0.5], "residual_rms": [2.0, 2.0],
            "attention_branch_rms": [1.0, 2 * attention],
            "feed_forward_branch_rms": [1.0, 2 * feed_forward],
        },
        [0.2, 0.3],
    )


def judge(
    monitor: HealthMonitor, look: HealthFigures, step: int, *, rate_factor: float = 1.0,
    skipped_steps: int = 0, skipped: bool = False,
) -> list[str]:
    return monitor.judge(look, step, rate_factor, skipped_steps, skipped=skipped)


ILL = [
    (figures(logit=150.0), 0, "max_attention_logit",
     "layer_01: the largest attention logit is 150, above health.max_attention_logit = 100"),
    (figures(logit=math.inf), 0, "max_attention_logit",
     "layer_01: the largest attention logit is inf, above health.max_attention_logit = 100"),
    (figures(update=0.0), 0, "min_relative_update",
     "layer_01: the relative update, at the peak rate, is 0, below "
     "health.min_relative_update = 1e-06"),
    (figures(attention=2e-4), 0, "min_branch_share",
     "layer_01: attention adds 0.0002 of the residual stream, below health.min_branch_share"),
    (figures(feed_forward=0.0), 0, "min_branch_share",
     "layer_01: feed_forward adds 0 of the residual stream, below health.min_branch_share"),
    (figures(), 4, "max_spikes", "4 steps skipped so far, above health.max_spikes = 3"),
]


@pytest.mark.parametrize(("look", "skipped_steps", "threshold", "named"), ILL)
def test_a_problem_is_told_once_and_ends_a_run_that_it_shows_in_for_the_configured_looks(
    look: HealthFigures, skipped_steps: int, threshold: str, named: str
) -> None:
    health = HealthConfig(action=HealthAction.FAIL, patience=3, max_spikes=3)
    monitor, warning = HealthMonitor(health), HealthMonitor(HealthConfig(patience=3, max_spikes=3))
    assert judge(monitor, figures(), 100) == []
    [line] = judge(monitor, look, 200, skipped_steps=skipped_steps)
    assert line.startswith(f"step 200: {named}")
    assert judge(monitor, look, 300, skipped_steps=skipped_steps) == []
    # A look without it begins the count anew, and what was told is not told again.
    assert judge(monitor, figures(), 400) == []
    for step in (500, 600):
        assert judge(monitor, look, step, skipped_steps=skipped_steps) == []
    assert monitor.failure is None
    judge(monitor, look, 700, skipped_steps=skipped_steps)
    assert isinstance(monitor.failure, HealthError)
    reason = str(monitor.failure)
    assert reason.startswith(f"health at step 700: {named}") and "\n" not in reason
    assert "in 3 looks in a row" in reason and f"or set health.{threshold} otherwise" in reason
    assert monitor.summary == line
    for step in range(1, 9):
        judge(warning, look, step, skipped_steps=skipped_steps)
    assert warning.failure is None
    off = HealthMonitor(HealthConfig(
        action=HealthAction.FAIL, patience=1,
        **{ill: None for _, _, ill, _ in ILL},  # type: ignore[arg-type]
    ))
    assert judge(off, look, 1, skipped_steps=skipped_steps) == [] and off.failure is None


def test_each_kind_of_problem_is_told_and_the_worst_layer_named() -> None:
    monitor = HealthMonitor(HealthConfig())
    look = figures(update=0.0, logit=120.0)
    assert len(judge(monitor, look, 100)) == 2
    assert judge(monitor, figures(logit=500.0, update=0.0), 200) == []
    [line] = judge(monitor, figures(attention=1e-4, feed_forward=1e-5), 300)
    assert "feed_forward adds 1e-05" in line
    assert monitor.summary.count("step ") == 3


@pytest.mark.parametrize(("rate_factor", "update", "ill"), [
    (1.0, 2e-6, False), (1.0, 5e-7, True),
    (0.01, 2e-8, False), (0.01, 5e-9, True),  # as large at the peak rate
    (1e-4, 0.0, False), (0.0, 0.0, False),  # nothing can be told of a layer that could not move
])
def test_an_update_is_judged_as_it_would_be_at_the_peak_rate(
    rate_factor: float, update: float, ill: bool
) -> None:
    lines = judge(HealthMonitor(HealthConfig()), figures(update), 100, rate_factor=rate_factor)
    assert bool(lines) is ill


def test_a_skipped_step_neither_shows_a_dead_layer_nor_clears_one() -> None:
    monitor = HealthMonitor(HealthConfig(action=HealthAction.FAIL, patience=2))
    still = figures(update=0.0)
    for step in (100, 200, 300):
        assert judge(monitor, still, step, skipped=True) == []
    assert len(judge(monitor, still, 400)) == 1
    judge(monitor, still, 500, skipped=True)
    assert monitor.failure is None
    judge(monitor, still, 600)
    assert monitor.failure is not None


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("health")
    with store(folder):
        yield Workshop(folder)


RUN = {"model__num_hidden_layers": "2", "training__max_steps": "12", "training__save_steps": "12",
       "health__every_steps": "4", "training__schedule": "cosine",
       "training__min_learning_rate_ratio": "0"}


def plant_problems(state: TrainState, metrics: StepMetrics) -> None:
    """Freeze the second layer, and blow up the first one's queries."""
    if metrics.step == 1:
        state.model.get_submodule("blocks.1").requires_grad_(False)
        with torch.no_grad():
            state.model.get_parameter("blocks.0.attention.q_proj.weight").mul_(1e4)


def health_tag(result: PipelineResult) -> str | None:
    tag: str | None = run_of(result).data.tags.get("svend.health")
    return tag


def test_a_healthy_run_logs_each_layer_and_warns_of_nothing(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    result = workshop.train("healthy", health__action="fail", health__patience="1", **RUN)
    assert result.success, result.reason
    assert "warning: health" not in capfd.readouterr().out
    assert health_tag(result) is None
    of_layers = ["attention_logit", "head_entropy", "relative_update", "residual_rms",
                 "attention_branch_rms", "feed_forward_branch_rms"]
    summary = ["max_attention_logit", "min_head_entropy", "mean_head_entropy",
               "min_relative_update", "max_relative_update", "min_branch_share", "residual_rms"]
    names = {f"health/{name}" for name in summary} | {
        f"health/layer_0{layer}/{name}" for layer in range(2) for name in of_layers
    }
    values = {name: logged(result, name) for name in names}
    assert {key for key in run_of(result).data.metrics if key.startswith("health/")} == names
    for points in values.values():
        assert [step for step, _ in points] == [4, 8, 12]
        assert all(math.isfinite(value) and value > 0 for _, value in points)
    for _, entropy in values["health/mean_head_entropy"]:
        assert 0 < entropy <= 1


TOLD = [
    r"step 4: layer_00: the largest attention logit is \S+, above health.max_attention_logit = 100",
    r"step 4: layer_01: the relative update, at the peak rate, is 0, below "
    r"health.min_relative_update = 1e-06",
]


def told_by(result: PipelineResult, output: str) -> list[str]:
    """The warnings of a run, which its tag holds too."""
    told = re.findall("warning: health at (.*)", output)
    assert health_tag(result) == "; ".join(told)
    assert len(told) == len(TOLD)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(TOLD, told, strict=True))
    return told


def test_a_frozen_layer_and_exploding_logits_fail_a_run_with_what_to_change(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    result = workshop.train("failed", plant_problems, health__action="fail", **RUN)
    told_by(result, capfd.readouterr().out)
    assert not result.success and isinstance(result.error, HealthError)
    reason = str(result.reason)
    assert reason.startswith("health at step 8: layer_00: the largest attention logit is ")
    assert "in 2 looks in a row; begin again with a lower training.learning_rate" in reason
    assert run_of(result).info.status == "FAILED"
    assert run_of(result).data.tags["svend.reason"] == reason
    assert [value for _, value in logged(result, "health/layer_01/relative_update")] == [0, 0]


@pytest.mark.slow
def test_a_run_that_only_warns_tells_each_problem_once_and_ends_well(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    result = workshop.train("warned", plant_problems, **RUN)
    assert result.success, result.reason
    told_by(result, capfd.readouterr().out)
    assert [value for _, value in logged(result, "health/layer_01/relative_update")] == [0, 0, 0]
    assert min(value for _, value in logged(result, "health/max_attention_logit")) > 100


@pytest.mark.slow
def test_looks_can_be_turned_off(workshop: Workshop) -> None:
    result = workshop.train("off", plant_problems, **{**RUN, "health__every_steps": "null"})
    assert result.success, result.reason
    assert not any(key.startswith("health/") for key in run_of(result).data.metrics)
