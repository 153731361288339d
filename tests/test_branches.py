"""Horizons: what a run measures beside itself, and that it goes on as if it had not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from svend.errors import UserError
from svend.pipeline import replica
from svend.pipeline.config import Branch, load_config
from svend.pipeline.runner import PipelineResult, ScaleRunner
from svend.training.loop import train_steps
from svend.training.schedules import learning_rate_factor
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache
from tests.registry import store

WSD = {"training.schedule": "wsd", "training.decay_ratio": "0.25", "training.warmup_ratio": "0.1",
       "training.logging_steps": "5", "training.save_steps": "20", "training.save_total_limit": "9",
       "model.hidden_size": "32", "model.vocab_size": "512", "health.every_steps": "null",
       "training.batch_size": "4"}


class Bench:
    """Runs of one small model in one store, each an experiment of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def train(self, experiment: str, *, resume: bool = False, **changes: str) -> PipelineResult:
        settings = {
            **DEBUG_OVERRIDES, **WSD, "training.experiment_name": experiment,
            "checkpoint_dir": str(self._folder / "checkpoints"),
            "data.cache_dir": str(data_cache()),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return ScaleRunner(load_config({}, list(settings.items()))).run(resume=resume)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("branches")
    with store(folder):
        yield Bench(folder)


def states_at(result: PipelineResult, step: int) -> list[Any]:
    assert result.success and result.checkpoint_dir is not None, result.reason
    folder = result.checkpoint_dir / f"step_{step:08d}"
    states = [torch.load(folder / f"{name}.pt", weights_only=True)
              for name in ("model", "optimizer", "scheduler")]
    extra = torch.load(folder / "extra_state.pt", weights_only=True)
    return [*states, {key: extra[key] for key in ("step", "tokens", "stream", "rng_cpu")}]


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def logged(result: PipelineResult, metric: str) -> dict[int, float]:
    history = MlflowClient().get_metric_history(str(result.run_id), metric)
    assert len({point.step for point in history}) == len(history)
    return {point.step: point.value for point in history}


@pytest.fixture(scope="module")
def branched(bench: Bench) -> PipelineResult:
    return bench.train("branched", training__horizons="[0.3, 0.5]")


def test_a_run_with_horizons_ends_as_one_without(bench: Bench, branched: PipelineResult) -> None:
    assert_ends_alike(bench.train("plain"), branched)


@pytest.mark.slow
def test_a_run_of_muon_with_horizons_ends_as_one_without(bench: Bench) -> None:
    assert_ends_alike(
        bench.train("plain-muon", training__optimizer="muon"),
        bench.train("branched-muon", training__optimizer="muon", training__horizons="[0.3, 0.5]"),
    )


def assert_ends_alike(plain: PipelineResult, branched: PipelineResult) -> None:
    assert_equal(states_at(plain, 40), states_at(branched, 40))
    assert logged(plain, "train/loss") == logged(branched, "train/loss")
    assert sorted(logged(branched, "horizon/heldout_loss")) == [12, 20, 40]
    assert logged(branched, "horizon/tokens") == {s: s * 4 * 128.0 for s in (12, 20, 40)}


@pytest.mark.slow
def test_a_horizon_is_what_the_shorter_run_reaches(bench: Bench) -> None:
    branched = bench.train("long", training__horizons="[0.5]")
    # The same four steps of warm-up, and five of decay.
    shorter = bench.train("short", training__max_steps="20", training__warmup_ratio="0.2")
    assert logged(branched, "horizon/heldout_loss")[20] == pytest.approx(
        logged(shorter, "eval/heldout_loss")[20], rel=1e-12)


def test_a_run_killed_on_a_branch_goes_on_as_if_it_had_not_been(
    bench: Bench, branched: PipelineResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = 0

    def dies_on_the_second(state: Any, *others: Any) -> Iterator[Any]:
        nonlocal killed
        for metrics in train_steps(state, *others):
            if state.step > 17:
                killed += 1
                raise UserError("pulled the plug")
            yield metrics

    with monkeypatch.context() as patch:
        patch.setattr(replica, "train_steps", dies_on_the_second)
        assert not bench.train("cut", training__horizons="[0.3, 0.5]").success
    assert killed == 1
    resumed = bench.train("cut", resume=True, training__horizons="[0.3, 0.5]")
    assert_equal(states_at(branched, 40), states_at(resumed, 40))
    for metric in ("horizon/heldout_loss", "train/loss", "eval/heldout_loss"):
        assert logged(branched, metric) == logged(resumed, metric)


def test_a_branch_decays_as_the_schedule_of_its_length_does() -> None:
    training = load_config({}, [(k, v) for k, v in WSD.items() if k.startswith("training.")] + [
        ("training.horizons", "[0.2, 0.5]")]).training
    assert training.branches(100) == [Branch(15, 20), Branch(38, 50)]
    rates = [learning_rate_factor(step, 100, training, end=50) for step in range(50)]
    assert rates[10:38] == [1.0] * 28
    assert rates[38:] == sorted(rates[38:], reverse=True) and rates[39] < 1
