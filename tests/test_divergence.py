"""Bad batches, bad weights and a learning rate that is too high: skipped, gone back from, ended."""

from __future__ import annotations

import copy
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from svend import cli
from svend.pipeline import replica
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.config import Optimizer, Precision, Schedule, TrainingConfig, load_config
from svend.pipeline.runner import PipelineResult, ScaleRunner
from svend.training.guard import SMALLEST_DEVIATION, StepGuard
from svend.training.loop import StepMetrics, train_steps
from svend.training.optimizers import build_optimizer, take_step
from svend.training.state import TrainState
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache
from tests.registry import store
from tests.test_training import make_model, make_state, make_training

CPU = torch.device("cpu")
UNGATED = {f"training.validation_gates.{gate}": "1e30"
           for gate in ("perplexity", "loss_decreasing", "gradient_norm", "loss_reasonable")}
# A model that trains a step in milliseconds, and learns little.
SMALL = {
    **DEBUG_OVERRIDES, **UNGATED, "model.hidden_size": "32", "model.num_hidden_layers": "1",
    "model.intermediate_size": "64", "model.max_position_embeddings": "128",
    "data.max_seq_length": "64", "data.num_samples": "100", "training.batch_size": "2",
    "training.compile": "off", "training.max_steps": "60", "training.divergence_patience": "4",
}
SEQUENCES_PER_STEP = 2


class DeviceReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a value out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default,
                               torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def everything(state: TrainState) -> dict[str, Any]:
    return copy.deepcopy({
        "model": state.model.state_dict(), "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(), "extra": state.extra_state(),
    })


def assert_same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def poison_gradients(
    state: TrainState, steps: set[int], poison: Callable[[Tensor], Tensor]
) -> None:
    """Spoil the head's gradient in some steps."""
    head: Any = state.model.head
    head.weight.register_hook(lambda g: poison(g) if state.step + 1 in steps else g)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(*[st.sampled_from([1.0, 1.25, 1.5, 2.0, 9.0, 60.0, math.nan, math.inf])] * 2),
        max_size=40,
    ),
    window=st.integers(2, 8), warm_up=st.integers(2, 6), deviations=st.sampled_from([2.0, 6.0]),
)
def test_a_step_is_a_spike_by_the_mean_and_deviation_of_the_last_accepted_ones(
    steps: list[tuple[float, float]], window: int, warm_up: int, deviations: float
) -> None:
    assume(warm_up <= window)
    guard = StepGuard(CPU, deviations, window, warm_up)
    known: deque[tuple[float, float]] = deque(maxlen=window)
    skipped = in_a_row = 0
    for loss, norm in steps:
        expected = math.isfinite(loss) and math.isfinite(norm)
        if expected and len(known) >= warm_up:
            for value, past in zip((loss, norm), zip(*known, strict=True), strict=True):
                mean = fmean(past)
                deviation = max(stdev(past), SMALLEST_DEVIATION * mean)
                bound = mean + deviations * deviation
                assume(abs(value - bound) > 1e-4 * bound)  # rounding decides there
                expected = expected and value <= bound
        accepted = guard.accept(torch.tensor(loss), torch.tensor(norm))
        assert bool(accepted) is expected
        if expected:
            known.append((loss, norm))
        skipped, in_a_row = skipped + (not expected), 0 if expected else in_a_row + 1
        assert (int(guard.skipped_steps), int(guard.skipped_in_a_row)) == (skipped, in_a_row)
        assert guard.last_accepted() == (known[-1] if known else None)


@pytest.mark.parametrize("optimizer", Optimizer)
@settings(max_examples=12, deadline=None)
@given(accepted=st.lists(st.booleans(), min_size=1, max_size=6), seed=st.integers(0, 99),
       bad=st.sampled_from([1e30, math.nan, math.inf]))
def test_a_skipped_step_is_one_that_was_never_taken(
    optimizer: Optimizer, accepted: list[bool], seed: int, bad: float
) -> None:
    training = make_training(optimizer=optimizer, weight_decay=0.1)
    ours, reference = make_model(), make_model()
    guarded, plain = build_optimizer(ours, training), build_optimizer(reference, training)
    torch.manual_seed(seed)
    # Moments to lose, and nothing that is made only at the first step.
    for accept in [True, *accepted]:
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
            if not accept:
                mine.grad.view(-1)[::3] = bad
        take_step(guarded, torch.tensor(accept))
        if accept:
            plain.step()
        assert_same(guarded.state_dict(), plain.state_dict())
        assert_same(ours.state_dict(), reference.state_dict())


@pytest.mark.parametrize("optimizer", Optimizer)
def test_deciding_and_skipping_never_waits_for_the_device(optimizer: Optimizer) -> None:
    model = make_model()
    built = build_optimizer(model, make_training(optimizer=optimizer))
    guard = StepGuard(CPU, 6.0, warm_up=1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with DeviceReads() as reads:
        for loss in (1.0, math.nan, 2.0):
            take_step(built, guard.accept(torch.tensor(loss), torch.tensor(loss)))
        assert reads.count == 0
        assert bool(guard.skipped_steps)  # the one read is counted
        assert reads.count == 1


@pytest.mark.parametrize("optimizer", Optimizer)
@pytest.mark.parametrize("poison", [
    lambda g: g * math.nan, lambda g: g * math.inf, lambda g: g * 1e4,
], ids=["nan", "infinite", "spike"])
def test_a_run_with_a_bad_batch_is_the_one_in_which_its_update_was_left_out(
    optimizer: Optimizer, poison: Callable[[Tensor], Tensor]
) -> None:
    training = make_training(optimizer=optimizer, schedule=Schedule.COSINE)

    def begin() -> TrainState:
        state = make_state(training, 14)
        state.guard = StepGuard(CPU, 30.0, window=8, warm_up=4)
        return state

    poisoned = begin()
    poison_gradients(poisoned, {9}, poison)
    metrics = list(train_steps(poisoned, training, 14))
    assert [m.step for m in metrics if int(m.skipped_in_a_row)] == [9]
    assert [int(m.skipped_steps) for m in metrics] == [0] * 8 + [1] * 6

    expected = begin()
    list(train_steps(expected, training, 8))
    before = everything(expected)
    list(train_steps(expected, training, 9))
    expected.model.load_state_dict(before["model"])
    expected.optimizer.load_state_dict(before["optimizer"])
    # Loading takes rates along; the schedule of a skipped step moves on.
    for group, rate in zip(expected.optimizer.param_groups,
                           expected.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    expected.guard.load_state_dict(before["extra"]["guard"])
    rest = list(train_steps(expected, training, 14))
    assert [float(m.loss) for m in metrics[9:]] == [float(m.loss) for m in rest]
    assert [m.learning_rate for m in metrics[9:]] == [m.learning_rate for m in rest]
    mine, theirs = everything(poisoned), everything(expected)
    for side in (mine, theirs):
        side["extra"]["guard"].pop("skipped_steps")
    assert_same(mine, theirs)


def test_a_resumed_run_decides_by_the_statistics_of_the_one_that_was_stopped(
    tmp_path: Path,
) -> None:
    training = make_training(schedule=Schedule.CONSTANT)

    def begin() -> TrainState:
        state = make_state(training, 16)
        state.guard = StepGuard(CPU, 30.0, window=8, warm_up=4)
        poison_gradients(state, {7, 8, 9, 12}, lambda g: g * 1e4)
        return state

    whole = begin()
    expected = [int(m.skipped_in_a_row) for m in train_steps(whole, training, 16)]
    assert expected[6:9] == [1, 2, 3] and expected[11] == 1
    stopped = begin()
    list(train_steps(stopped, training, 8))
    CheckpointManager(tmp_path).save(
        stopped.model, stopped.optimizer, stopped.scheduler, stopped.step,
        extra_state=stopped.extra_state(),
    )
    resumed = begin()
    _, _, extra = CheckpointManager(tmp_path).load_latest(
        resumed.model, resumed.optimizer, resumed.scheduler
    )
    resumed.load_extra_state(extra)
    assert [int(m.skipped_in_a_row) for m in train_steps(resumed, training, 16)] == expected[8:]
    assert_same(everything(resumed), everything(whole))


@pytest.mark.parametrize("optimizer", Optimizer)
def test_in_fp16_an_overflow_is_skipped_and_a_spike_does_not_lower_the_scale(
    optimizer: Optimizer,
) -> None:
    training = make_training(precision=Precision.FP16, optimizer=optimizer)
    state = make_state(training, 10)
    state.guard = StepGuard(CPU, 30.0, window=8, warm_up=4)
    poison_gradients(state, {2}, lambda g: g * math.inf)
    poison_gradients(state, {8}, lambda g: g * 1e4)
    assert state.scaler is not None
    scales, skipped = [], []
    for metrics in train_steps(state, training, 10):
        scales.append(state.scaler.get_scale())
        skipped.append(metrics.step if int(metrics.skipped_in_a_row) else 0)
    assert [step for step in skipped if step] == [2, 8]
    assert scales == [65536.0] + [32768.0] * 9
    assert all(p.isfinite().all() for p in state.model.parameters())


Plant = Callable[[TrainState, StepMetrics], None]


class Workshop:
    """Runs of the small model in one store, with something planted between their steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def overrides(self, experiment: str, **changes: str) -> dict[str, str]:
        return {
            **SMALL, "training.experiment_name": experiment,
            "checkpoint_dir": str(self.folder / "checkpoints"),
            "data.cache_dir": str(data_cache()),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }

    def train(
        self, experiment: str, plant: Plant | None = None, *, resume: bool = False, **changes: str
    ) -> PipelineResult:
        config = load_config({}, list(self.overrides(experiment, **changes).items()))

        def planted(
            state: TrainState, training: TrainingConfig, total_steps: int, *health: Any
        ) -> Iterator[StepMetrics]:
            for metrics in train_steps(state, training, total_steps, *health):
                if plant is not None:
                    plant(state, metrics)
                yield metrics

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replica, "train_steps", planted)
            return ScaleRunner(config).run(resume=resume)

    def state(self, result: PipelineResult, step: int) -> dict[str, Any]:
        assert result.checkpoint_dir is not None
        folder = result.checkpoint_dir / f"step_{step:08d}"
        return {name: torch.load(folder / f"{name}.pt", weights_only=True)
                for name in ("model", "optimizer", "scheduler", "extra_state")}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("divergence")
    with store(folder):
        yield Workshop(folder)


def run_of(result: PipelineResult) -> Run:
    return MlflowClient().get_run(str(result.run_id))


def logged(result: PipelineResult, metric: str) -> list[tuple[int, float]]:
    """What was logged, in the order in which it was."""
    history = MlflowClient().get_metric_history(str(result.run_id), metric)
    return [(p.step, p.value) for p in sorted(history, key=lambda p: (p.timestamp, p.step))]


def evidence_of(result: PipelineResult, name: str) -> dict[str, Any]:
    path = MlflowClient().download_artifacts(str(result.run_id), name)
    evidence: dict[str, Any] = json.loads(Path(path).read_text(), parse_constant=pytest.fail)
    return evidence


def spoil_a_weight(*steps: int) -> Plant:
    """Write NaN into one weight after some steps, each the first time that it is reached."""
    left = list(steps)

    def plant(state: TrainState, metrics: StepMetrics) -> None:
        if metrics.step in left:
            left.remove(metrics.step)
            with torch.no_grad():
                state.model.get_parameter("blocks.0.feed_forward.up_proj.weight")[0, 0] = math.nan

    return plant


@pytest.fixture(scope="module")
def rewound(workshop: Workshop) -> PipelineResult:
    """A run whose weight goes bad after step 31: steps 32 to 35 are skipped."""
    return workshop.train("bad-weight", spoil_a_weight(31))


def test_a_bad_weight_has_the_run_go_back_and_on_behind_the_data_of_the_steps_in_between(
    rewound: PipelineResult, workshop: Workshop
) -> None:
    assert rewound.success, rewound.reason
    run, state = run_of(rewound), workshop.state(rewound, 60)
    assert run.info.status == "FINISHED"
    assert run.data.tags["svend.rewind"].startswith(
        f"from step 35 to step 20; sequences {20 * SEQUENCES_PER_STEP} to "
        f"{35 * SEQUENCES_PER_STEP - 1} left out; 4 steps skipped in a row (loss nan"
    )
    assert logged(rewound, "train/rewinds") == [(20, 1.0)]
    assert all(value.isfinite().all() for value in state["model"].values())
    position = state["extra_state"]["stream"]["next_sequence"]
    assert position == (60 - 20 + 35) * SEQUENCES_PER_STEP
    assert state["scheduler"]["last_epoch"] == 60
    # Both tries are on record, in their order; the counts are of the one that stands.
    steps, losses = zip(*logged(rewound, "train/loss"), strict=True)
    assert list(steps) == [*range(1, 36), *range(21, 61)]
    assert [math.isnan(loss) for loss in losses] == [31 < n <= 35 for n in range(1, 76)]
    assert logged(rewound, "train/skipped_steps")[-1] == (60, 0.0)
    assert [s for s, _ in logged(rewound, "eval/heldout_loss")] == [0, 20, 40, 60]
    evidence = evidence_of(rewound, "rewind.json")
    bad = {p["name"]: p["nonfinite_weights"] for p in evidence["parameters"]}
    assert {name for name, count in bad.items() if count} == {
        "blocks.0.feed_forward.up_proj.weight"
    }


@pytest.mark.slow
def test_a_run_killed_after_it_went_back_goes_on_as_the_one_that_never_was(
    rewound: PipelineResult, workshop: Workshop
) -> None:
    spoil = spoil_a_weight(31)

    def plant(state: TrainState, metrics: StepMetrics) -> None:
        spoil(state, metrics)
        if metrics.step == 36 and state.rewinds:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        workshop.train("killed", plant)
    resumed = workshop.train("killed", resume=True)
    assert resumed.success, resumed.reason
    mine, theirs = workshop.state(resumed, 60), workshop.state(rewound, 60)
    assert mine["extra_state"]["rewinds"] == 1
    assert_same(mine, theirs)
    assert_same(logged(resumed, "train/loss"), logged(rewound, "train/loss"))


@pytest.mark.slow
def test_a_run_goes_back_once_and_fails_the_second_time_with_the_evidence(
    workshop: Workshop
) -> None:
    spoil = spoil_a_weight(31)

    def plant(state: TrainState, metrics: StepMetrics) -> None:
        spoil(state, metrics)
        if metrics.step == 25 and state.rewinds:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        workshop.train("twice", plant)
    failed = workshop.train("twice", spoil_a_weight(30), resume=True)
    assert str(failed.reason).startswith("training diverged at step 30: 1 weights are not finite")
    assert "it had gone back to a checkpoint before; divergence.json" in str(failed.reason)
    evidence = evidence_of(failed, "divergence.json")
    assert evidence["step"] == 30
    [micro_batch] = evidence["micro_batches"]
    assert micro_batch["loss"] == "nan"
    # Steps 1 to 35 are seen, then those of the second try from 21 on.
    first = (35 + 30 - 20 - 1) * SEQUENCES_PER_STEP
    assert [s["sequence"] for s in micro_batch["sequences"]] == [first, first + 1]
    for sequence in micro_batch["sequences"]:
        assert sequence["documents"]
        assert all(d["source"].startswith("gym_") for d in sequence["documents"])
    assert {p["name"] for p in evidence["parameters"]} >= {"head.weight", "embedding.weight"}
    assert all({"gradient_norm", "weight_norm"} <= set(p) for p in evidence["parameters"])
    assert len(run_of(failed).data.metrics) > 0
    assert run_of(failed).info.status == "FAILED"


def test_without_a_good_checkpoint_a_bad_weight_ends_the_run(workshop: Workshop) -> None:
    failed = workshop.train("early", spoil_a_weight(3))
    assert "there is no good checkpoint to go back to; divergence.json" in str(failed.reason)
    assert "at step 7: 4 steps skipped in a row (loss nan" in str(failed.reason)
    assert failed.checkpoint_dir is not None and not failed.checkpoint_dir.exists()


def test_a_bad_batch_is_a_line_and_fails_no_gate_and_puts_off_a_checkpoint(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    def plant(state: TrainState, metrics: StepMetrics) -> None:
        head = state.model.get_parameter("head.weight")
        if metrics.step == 19:
            hook = head.register_hook(lambda g: (hook.remove(), g * math.nan)[1])

    done = workshop.train("bad-batch", plant, training__max_steps="40")
    assert done.success, done.reason
    assert "step 20: skipped (loss " in capfd.readouterr().out
    assert done.checkpoint_dir is not None
    assert {path.name for path in done.checkpoint_dir.glob("step_*")} == {
        "step_00000021", "step_00000040"
    }
    assert [value for _, value in logged(done, "train/skipped_steps")] == [0] * 19 + [1] * 21
    assert dict(logged(done, "gate/quick/loss_reasonable"))[20] == 1.0
    assert "svend.rewind" not in run_of(done).data.tags


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_is_gone_back_from_once_and_ends_in_one_line(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = workshop.overrides(
        "too-high", training__learning_rate="3", training__warmup_ratio="1.0",
        training__max_steps="160", training__divergence_patience="3",
    )
    words = [word for key, value in overrides.items()
             for word in (f"--{key}", value)]
    code = cli.main(["train", *words])
    printed = capfd.readouterr()
    assert code == 1
    [line] = [line for line in (printed.out + printed.err).splitlines()
              if line.startswith("error: ")]
    assert line.startswith("error: training diverged at step ")
    assert "3 steps skipped in a row" in line
    assert "it had gone back to a checkpoint before" in line
    assert "lower training.learning_rate" in line
    assert "Traceback" not in printed.out + printed.err
    client = MlflowClient()
    found = client.get_experiment_by_name("too-high")
    [run] = client.search_runs([found.experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.tags["svend.reason"] == line.removeprefix("error: ")
    names = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert names >= {"rewind.json", "divergence.json", "verdicts.csv"}
