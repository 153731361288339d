"""Several processes take the steps that one takes, whole or in parts."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from svend import cli
from svend.data.stream import BatchStream
from svend.errors import CheckpointError, ConfigError, RankLost
from svend.evaluation.heldout import HeldoutLoss
from svend.models.attention import Layout as DocumentLayout
from svend.models.shards import count_nonfinite, is_sharded, local, whole
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.checkpoints import CheckpointManager, sharded
from svend.pipeline.checkpoints.sharded import read_parts
from svend.pipeline.config import (
    CheckpointingPolicy,
    MomentPrecision,
    Optimizer,
    Parallel,
    PipelineConfig,
    Precision,
    TrainingConfig,
    WeightPrecision,
    load_config,
)
from svend.pipeline.crew import Crew
from svend.pipeline.ladder.progressive import PipelineRunner
from svend.pipeline.replica import (
    Replica,
    begin_partial_save,
    load_state,
    measure_heldout,
    sharded_bytes,
    stage_steps,
)
from svend.pipeline.state_files import read_state
from svend.planning.plan import decide_shards
from svend.ranks import Place, find_place, set_rendezvous
from svend.training.examination import examine_step
from svend.training.health import HealthProbe
from svend.training.loop import train_steps
from svend.training.low_memory import prepare_weights
from svend.training.parallel import Ranks, shard_mesh, shard_model
from svend.training.state import TrainState, build_state
from tests.processes import run_together, started_by
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
        prepare_weights(model, training)
        shard_model(model, shard_mesh(ranks, CPU, layout.shards), training)
    model.to_empty(device="cpu")
    model.initialize(0)
    stream = BatchStream(
        make_sequences(), training.batch_size, training.gradient_accumulation_steps, ranks.rank,
        ranks.size,
    )
    # In bf16, which a CPU may have, Muon would round apart what differs in its last bit.
    with mock.patch("svend.training.muon.multiplies_in_bf16", return_value=False):
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
       Layout(Parallel.FSDP, policy=CheckpointingPolicy.FULL),
       Layout(Parallel.FSDP, policy=CheckpointingPolicy.SELECTIVE)]
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


def train_in_bf16(ranks: Ranks) -> tuple[list[float], set[tuple[int, torch.dtype]]]:
    """Return losses, and the dtypes of tensors by their dimensions, weights and moments."""
    training = make_training(
        gradient_accumulation_steps=3, precision=Precision.BF16,
        weight_precision=WeightPrecision.BF16, moment_precision=MomentPrecision.BF16,
    )
    state = build(ranks, Layout(Parallel.FSDP), training)
    losses = [float(metrics.loss) for metrics in train_steps(state, training, STEPS)]
    tensors = [*state.model.parameters(),
               *(t for of in state.optimizer.state.values() for t in of.values())]
    return losses, {(tensor.dim(), tensor.dtype) for tensor in tensors}


@pytest.mark.slow
def test_weights_in_bf16_are_sharded_beside_gains_in_fp32() -> None:
    expected, dtypes = train_in_bf16(Ranks())
    assert dtypes == {(0, torch.float32), (1, torch.float32), (2, torch.bfloat16)}
    for losses, of_rank in run_together(train_in_bf16, 2):
        assert of_rank == dtypes
        # Other random numbers round the weights, and gains are gathered in fp32 all the same.
        assert losses == pytest.approx(expected, rel=0.02)


def make_replica(ranks: Ranks, layout: Layout, training: TrainingConfig) -> Replica:
    return Replica(
        config=PipelineConfig(training=training), device=CPU, sequences=make_sequences(),
        heldout=make_sequences(), state=build(ranks, layout, training), total_steps=STEPS,
        crew=Crew(ranks),
    )


@dataclass(frozen=True)
class Stage:
    """A number of processes that take up a run, train it up to a step, and save it."""

    size: int
    layout: Layout
    stop: int


def take_up(ranks: Ranks, folder: Path, layout: Layout, stop: int) -> list[float]:
    """Go on from the newest checkpoint, if there is one; the first process returns the losses."""
    training = make_training(gradient_accumulation_steps=3, optimizer=layout.optimizer)
    replica = make_replica(ranks, layout, training)
    if not ranks.place.leads:
        return replica.crew.follow(replica) or []
    manager, state = CheckpointManager(folder), replica.state
    if manager.list_checkpoints():
        replica.call(load_state, manager.find_latest().path)
    losses = [float(metrics.loss) for metrics in stage_steps(replica, stop)]
    if replica.sharded:
        place = manager.prepare_folder(state.step, sharded_bytes(replica))
        replica.call(begin_partial_save, place)
    saving = manager.save_in_background(
        None if replica.sharded else state.model, None if replica.sharded else state.optimizer,
        state.scheduler, state.step, 0, {"loss": losses[-1]}, state.extra_state(),
        partial=replica.partial,
    )
    # Training goes on meanwhile: what is saved is a copy.
    with torch.no_grad():
        for parameter in state.model.parameters():
            local(parameter).zero_()
    saving.result()
    replica.crew.dismiss(None)
    return losses


WHOLE, PARTS = Layout(Parallel.DDP), Layout(Parallel.FSDP)
MUON_PARTS = Layout(Parallel.FSDP, optimizer=Optimizer.MUON)


@pytest.mark.parametrize("stages", [
    [Stage(1, WHOLE, 2), Stage(2, PARTS, 4), Stage(1, WHOLE, 6)],
    pytest.param([Stage(1, WHOLE, 1), Stage(4, PARTS, 2), Stage(2, PARTS, 3), Stage(2, WHOLE, 4),
                  Stage(4, Layout(Parallel.FSDP, shards=2), 5), Stage(1, WHOLE, 6)],
                 marks=pytest.mark.slow),
    pytest.param([Stage(4, MUON_PARTS, 2), Stage(2, MUON_PARTS, 4),
                  Stage(1, Layout(Parallel.DDP, optimizer=Optimizer.MUON), 6)],
                 marks=pytest.mark.slow),
], ids=["1-2-1", "1-4-2-2-4-1", "muon-4-2-1"])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, stages: list[Stage]
) -> None:
    expected = take_up(Ranks(), tmp_path / "uninterrupted", Layout(
        Parallel.DDP, optimizer=stages[0].layout.optimizer), STEPS)
    losses = []
    for stage in stages:
        if stage.size == 1:
            losses += take_up(Ranks(), tmp_path / "run", stage.layout, stage.stop)
        else:
            of_ranks = run_together(
                take_up, stage.size, tmp_path / "run", stage.layout, stage.stop
            )
            losses += of_ranks[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    weights = make_model(), make_model(seed=1)
    for model, name in zip(weights, ("uninterrupted", "run"), strict=True):
        CheckpointManager(tmp_path / name).load_latest(model)
    for ours, theirs in zip(*(model.parameters() for model in weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def save_parts(ranks: Ranks, folder: Path) -> list[float]:
    return take_up(ranks, folder, PARTS, 2)


def test_parts_are_verified_and_put_together_and_run_no_code(tmp_path: Path) -> None:
    run_together(save_parts, 2, tmp_path)
    manager = CheckpointManager(tmp_path)
    checkpoint = manager.find_latest()
    assert checkpoint.in_parts
    loaded = make_model(seed=1)
    manager.load(checkpoint, loaded)
    before = checkpoint.weights_sha256
    whole_one = manager.consolidate(checkpoint)
    assert manager.consolidate(whole_one) == whole_one
    assert manager.find_latest() == whole_one
    assert whole_one.weights_sha256 != before
    weights = read_state(whole_one.path / "model.pt")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name])

    index = checkpoint.path / ".metadata"
    content = index.read_bytes()
    index.write_bytes(content[:-1] + b"!")
    with (pytest.warns(UserWarning, match="damaged"),
          pytest.raises(CheckpointError, match="no intact checkpoint")):
        manager.find_latest()
    marker = tmp_path / "ran"
    for planted in (Exploit(marker), Attribute()):
        index.write_bytes(pickle.dumps(planted))
        with pytest.raises(CheckpointError, match=r"\.metadata: cannot be loaded .*run code"):
            read_parts(checkpoint.path, "model", {}, None)
    assert not marker.exists()


class Exploit:
    """Makes a file where its pickle is loaded as pickles are."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


class Attribute:
    """Takes an attribute of a class that the index may name."""

    def __reduce__(self) -> Any:
        return (getattr, (torch.Size, "__class__"))


def hold_out(ranks: Ranks) -> tuple[list[HeldoutLoss], set[tuple[type, ...]]]:
    """Return the losses, and the types of inputs that FSDP is given, to move them to the device."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    found, moved = [], set()
    move = FSDPState._root_pre_forward

    def note(state: Any, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if isinstance(module, ReasoningTransformer):
            moved.add(tuple(map(type, inputs)))
        return move(state, module, inputs, named)

    with mock.patch.object(FSDPState, "_root_pre_forward", note):
        for layout in (WHOLE, PARTS):
            for count in (1, 5, 8):
                training = make_training(heldout_sequences=count)
                replica = make_replica(ranks, layout, training)
                found.append(measure_heldout(replica))
    return found, moved


def test_processes_share_the_held_out_sequences() -> None:
    expected, _ = hold_out(Ranks())
    for measured, moved in run_together(hold_out, 2):
        for ours, theirs in zip(measured, expected, strict=True):
            assert ours.predicted == theirs.predicted
            assert ours.sums == pytest.approx(theirs.sums, rel=1e-5)
        # No document numbers: where documents begin is not to be asked of the device.
        assert moved == {(torch.Tensor, torch.Tensor, DocumentLayout)}


def spoil_the_last(ranks: Ranks) -> tuple[int, int]:
    """Return what is counted of a NaN in the last process's part, before and after an evaluation.
    """
    replica = make_replica(ranks, PARTS, make_training())
    measure_heldout(replica)
    before = count_nonfinite(replica.state.model)
    if ranks.rank == ranks.size - 1:
        with torch.no_grad():
            local(replica.state.model.head.weight)[0, 0] = torch.nan  # type: ignore[union-attr]
    measure_heldout(replica)
    return before, count_nonfinite(replica.state.model)


def test_a_weight_that_is_not_finite_is_seen_in_whichever_part_it_lies() -> None:
    assert run_together(spoil_the_last, 2) == [(0, 1), (0, 1)]


def fail_to_write(ranks: Ranks, folder: Path) -> str:
    """Say what a process hears where another cannot write, or writes where nobody sees it."""
    replica = make_replica(ranks, PARTS, make_training())
    place = folder / "shared" if ranks.place.leads else folder / "elsewhere"
    place.mkdir(parents=True)
    sharded.ARRIVAL_SECONDS = 0.5
    begin_partial_save(replica, place)
    assert replica.partial is not None
    try:
        (replica.written or replica.partial).result()
    except (CheckpointError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "written"


def test_a_part_that_is_not_where_the_others_are_is_missed(tmp_path: Path) -> None:
    first, second = run_together(fail_to_write, 2, tmp_path)
    assert re.search(r"CheckpointError: .*__1_0\.distcp: was written by another machine", first)
    assert second == "written"


def lose_the_last(ranks: Ranks) -> tuple[str, float]:
    """Have the last process die in a step; the first returns what it hears of it, and how late."""
    replica = make_replica(ranks, PARTS, make_training())
    died_seconds = 0.0
    try:
        if not ranks.place.leads:
            replica.crew.follow(replica)
        for metrics in stage_steps(replica, STEPS):
            died_seconds = time.monotonic()
            if metrics.step == 2:
                replica.call(die, ranks.size - 1)
    except RankLost as error:
        return str(error), time.monotonic() - died_seconds
    return "nothing", 0.0


def die(replica: Replica, rank: int) -> None:
    if replica.crew.ranks.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_in_a_step_is_named_at_once() -> None:
    (told, seconds), _ = run_together(lose_the_last, 2)
    assert re.fullmatch(r"rank 1 \(process \d+ on .*\) died", told)
    assert seconds < 30


@given(environment=st.fixed_dictionaries({}, optional={
    name: st.sampled_from(["0", "1", "3", "-1", "x", "", "4(x2),2", "4(x"]) for name in
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID",
     "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
}))
@example(environment={"SLURM_STEP_NUM_TASKS": "x"})
@example(environment={"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
                      "SLURM_NODEID": "5", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2"})
@example(environment={"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
                      "SLURM_STEP_TASKS_PER_NODE": "4(x"})
def test_a_place_is_one_that_can_be_or_refused(environment: dict[str, str]) -> None:
    try:
        place = find_place(environment)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert 0 <= place.rank < place.size
    assert 0 <= place.local_rank < place.local_size


def test_slurm_s_tasks_find_their_places() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "4,2"}
    for rank, local_rank, node, local_size in ((3, 3, 0, 4), (5, 1, 1, 2)):
        task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank),
                "SLURM_NODEID": str(node)}
        assert find_place({**step, **task}) == Place(rank, 6, local_rank, local_size)
    # A batch script, which has no tasks of its own.
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}) == ALONE


def test_where_scontrol_is_missing_a_line_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"node\[01-04\].* set MASTER_ADDR to the first of them$"):
        set_rendezvous({"SLURM_STEP_NODELIST": "node[01-04]"})


def count_up(ranks: Ranks) -> tuple[int, Place]:
    return ranks.sum_count(ranks.rank + 1), ranks.place


def test_the_tasks_of_a_slurm_step_meet() -> None:
    assert started_by("slurm", count_up, 2) == [(3, Place(0, 2, 0, 2)), (3, Place(1, 2, 1, 2))]


def test_a_sweep_and_a_progressive_run_want_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["sweep"]) == 1
    assert "this is one of 2; start it without torchrun or srun" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="svend ladder --nproc N"):
        PipelineRunner(PipelineConfig()).run_progressive()


@pytest.mark.parametrize(("parallel", "size", "expected"), [
    (Parallel.FSDP, 1, 1), (Parallel.FSDP, 8, 4), (Parallel.DDP, 8, 1), (Parallel.AUTO, 8, 1),
])
def test_weights_are_divided_where_there_are_processes_to_divide_them(
    parallel: Parallel, size: int, expected: int
) -> None:
    config = load_config({}, [("training.parallel", parallel.value),
                              ("training.shard_processes", "4"), ("data.max_seq_length", "64")])
    assert config.model is not None
    assert decide_shards(config.model, config.training, CPU, Place(0, size)) == expected


def test_groups_that_do_not_come_out_even_are_refused() -> None:
    config = load_config({}, [("training.parallel", "fsdp"), ("training.shard_processes", "4")])
    assert config.model is not None
    with pytest.raises(ConfigError, match="shard_processes = 4: must divide the 6 processes"):
        decide_shards(config.model, config.training, CPU, Place(0, 6))
