"""Several processes take the steps that one takes, whole or in parts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from svend.data.stream import BatchStream
from svend.models.shards import count_nonfinite, is_sharded, whole
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import CheckpointingPolicy, Optimizer, Parallel, TrainingConfig
from svend.ranks import Place
from svend.training.examination import examine_step
from svend.training.health import HealthProbe
from svend.training.loop import train_steps
from svend.training.parallel import Ranks, shard_mesh, shard_model
from svend.training.state import TrainState, build_state
from tests.processes import run_together
from tests.test_training import CPU, make_model, make_sequences, make_training

STEPS = 6
ALONE = Place()


@dataclass(frozen=True)
class Layout:
    """How the processes of a test share a model."""

    parallel: Parallel
    shards: int | None = None
    optimizer: Optimizer = Optimizer.ADAMW
    policy: CheckpointingPolicy | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Curve:
    """What a run of a few steps shows."""

    losses: list[float]
    norms: list[float]
    tokens: int
    weights: dict[str, torch.Tensor]
    update_L: torch.Tensor
    gradient_norms: list[float]
    held: int
    nonfinite: int


def build(ranks: Ranks, layout: Layout, training: TrainingConfig) -> TrainState:
    with torch.device("meta"):
        model = ReasoningTransformer(make_model().config)
    model.checkpoint_blocks(layout.policy)
    if layout.compiled:
        model.compile_blocks()
    if layout.parallel is Parallel.FSDP and ranks.size > 1:
        shard_model(model, shard_mesh(ranks, CPU, layout.shards), training)
    model.to_empty(device="cpu")
    model.initialize(0)
    stream = BatchStream(
        make_sequences(), training.batch_size, training.gradient_accumulation_steps, ranks.rank,
        ranks.size,
    )
    return build_state(model, stream, training, STEPS, CPU, ranks)


def train(ranks: Ranks, layouts: list[Layout]) -> list[Curve]:
    return [curve_of(ranks, layout) for layout in layouts]


def curve_of(ranks: Ranks, layout: Layout) -> Curve:
    # Six sequences a step of at most two at once: with four processes, of two or one.
    training = make_training(
        gradient_accumulation_steps=3, optimizer=layout.optimizer, max_grad_norm=0.5
    )
    state = build(ranks, layout, training)
    probe = HealthProbe(state.model, training.precision, STEPS)
    metrics = list(train_steps(state, training, STEPS, probe))
    assert metrics[-1].health is not None
    nonfinite = count_nonfinite(state.model)
    batches = [make_sequences().batch(0, 2), make_sequences().batch(2, 2)]
    examination = examine_step(state, training.precision, batches)
    return Curve(
        [float(step.loss) for step in metrics], [float(step.gradient_norm) for step in metrics],
        state.tokens,
        {name: whole(value).detach().clone() for name, value in state.model.named_parameters()},
        metrics[-1].health.relative_update_L,
        [parameter.gradient_norm for parameter in examination.parameters],
        sum(p.to_local().numel() if is_sharded(p) else p.numel()
            for p in state.model.parameters()),
        nonfinite,
    )


def assert_alike(measured: Curve, expected: Curve) -> None:
    """To fp32's rounding: sums are the same, in another order."""
    assert measured.tokens == expected.tokens
    assert measured.losses == pytest.approx(expected.losses, rel=2e-6)
    assert measured.norms == pytest.approx(expected.norms, rel=2e-5)
    assert measured.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-3, abs=1e-6)
    assert measured.nonfinite == 0
    torch.testing.assert_close(measured.update_L, expected.update_L, rtol=1e-3, atol=1e-6)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(measured.weights[name], weight, rtol=2e-4, atol=2e-5)


TWO = [Layout(Parallel.DDP), Layout(Parallel.FSDP),
       Layout(Parallel.FSDP, policy=CheckpointingPolicy.FULL)]
FOUR = [
    Layout(Parallel.DDP), Layout(Parallel.FSDP), Layout(Parallel.FSDP, shards=2),
    Layout(Parallel.FSDP, policy=CheckpointingPolicy.SELECTIVE),
    Layout(Parallel.FSDP, optimizer=Optimizer.MUON),
    Layout(Parallel.DDP, optimizer=Optimizer.MUON),
]


@pytest.mark.parametrize(("size", "layouts"), [
    (2, TWO), pytest.param(3, TWO[:2], marks=pytest.mark.slow),
    pytest.param(4, FOUR, marks=pytest.mark.slow),
    pytest.param(2, [Layout(Parallel.FSDP, compiled=True), Layout(Parallel.DDP, compiled=True)],
                 marks=pytest.mark.slow),
])
def test_processes_take_the_steps_that_one_takes(size: int, layouts: list[Layout]) -> None:
    expected = {optimizer: curve_of(Ranks(), Layout(Parallel.DDP, optimizer=optimizer))
                for optimizer in {layout.optimizer for layout in layouts}}
    assert len(set(expected[layouts[0].optimizer].losses)) == STEPS
    of_ranks = run_together(train, size, layouts)
    for number, layout in enumerate(layouts):
        for curves in of_ranks:
            assert_alike(curves[number], expected[layout.optimizer])
        parameters = sum(curves[number].held for curves in of_ranks)
        copies = size if layout.parallel is Parallel.DDP else size // (layout.shards or size)
        assert parameters == copies * expected[layout.optimizer].held
