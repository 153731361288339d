"""How a step is cut on a GPU: as large pieces as it can hold, and the same step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from svend.pipeline import job
from svend.pipeline.config import (
    CheckpointingPolicy,
    DataConfig,
    MicroBatch,
    ModelScale,
    Precision,
    TrainingConfig,
    get_model_config,
    load_config,
)
from svend.pipeline.runner import ScaleRunner
from svend.planning import plan as plan_module
from svend.planning.memory import predict_memory
from svend.planning.plan import choose_micro_batch
from svend.planning.search import CHECKPOINTING, Room, fill
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache
from tests.registry import store

CUDA = torch.device("cuda")
CONTEXT_BYTES = 500_000_000


def training_of(scale: ModelScale, **changes: Any) -> TrainingConfig:
    """The scale's own settings at its whole context, in bf16."""
    training = load_config({"scale": scale.value, "preset": "full"}).resolve().training
    data = DataConfig(max_seq_length=training.data.max_seq_length, num_samples=1)
    return dataclasses.replace(training, precision=Precision.BF16, data=data, **changes)


def policy_of(training: TrainingConfig) -> CheckpointingPolicy | None:
    on = training.gradient_checkpointing
    return training.gradient_checkpointing_policy if on else None


@settings(max_examples=60, deadline=None)
@given(
    gigabytes=st.floats(1, 200), scale=st.sampled_from(ModelScale),
    batch_size=st.integers(1, 6), accumulation=st.integers(1, 24),
    policy=st.sampled_from(CHECKPOINTING),
)
def test_what_fills_a_gpu_fits_is_the_same_step_and_computes_no_more_again(
    gigabytes: float, scale: ModelScale, batch_size: int, accumulation: int,
    policy: CheckpointingPolicy | None,
) -> None:
    model, training = get_model_config(scale), training_of(
        scale, batch_size=batch_size, gradient_accumulation_steps=accumulation,
        gradient_checkpointing=policy is not None,
        gradient_checkpointing_policy=policy or CheckpointingPolicy.FULL,
    )
    room = Room("cuda", int(gigabytes * 1e9), CONTEXT_BYTES)
    filled = fill(model, training, room)
    assert filled.batch_size * filled.gradient_accumulation_steps == batch_size * accumulation
    assert filled.batch_size >= batch_size
    assert CHECKPOINTING.index(policy_of(filled)) <= CHECKPOINTING.index(policy)

    def needed_bytes(settings_of: TrainingConfig) -> int:
        return predict_memory(model, settings_of, CONTEXT_BYTES, device_type="cuda").total

    if filled != training:
        assert needed_bytes(filled) <= room.available_bytes
    # Nothing else differs.
    assert dataclasses.replace(
        filled, batch_size=batch_size, gradient_accumulation_steps=accumulation,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_policy=training.gradient_checkpointing_policy,
    ) == training


@pytest.mark.parametrize(("scale", "gigabytes", "batch_size", "policy"), [
    (ModelScale.TINY, 67.6, 16, None),  # its whole step
    (ModelScale.TINY, 1.0, 4, None),  # does not fit even as it is: left for the refusal
    (ModelScale.LARGE, 67.6, 2, None),  # busy enough, and nothing is computed again
    (ModelScale.XL, 67.6, 1, CheckpointingPolicy.SELECTIVE),
    (ModelScale.FLAGSHIP, 67.6, 1, CheckpointingPolicy.FULL),
])
def test_an_h100_is_kept_busy_before_less_is_computed_again(
    scale: ModelScale, gigabytes: float, batch_size: int, policy: CheckpointingPolicy | None
) -> None:
    room = Room("cuda", int(gigabytes * 1e9), CONTEXT_BYTES)
    filled = fill(get_model_config(scale), training_of(scale), room)
    assert (filled.batch_size, policy_of(filled)) == (batch_size, policy)


def test_a_cpu_and_a_fixed_micro_batch_are_left_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "available_bytes", lambda _: 80_000_000_000)
    model, training = get_model_config(ModelScale.TINY), training_of(ModelScale.TINY)
    assert choose_micro_batch(model, training, torch.device("cpu")) == training
    fixed = dataclasses.replace(training, micro_batch=MicroBatch.FIXED)
    assert choose_micro_batch(model, fixed, CUDA) == fixed
    assert choose_micro_batch(model, training, CUDA).batch_size == 16


def test_processes_that_share_a_step_each_have_a_part_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "available_bytes", lambda _: 80_000_000_000)
    model, training = get_model_config(ModelScale.TINY), training_of(ModelScale.TINY)
    place = dataclasses.replace(plan_module.Place(), size=4)
    assert choose_micro_batch(model, training, CUDA, place).batch_size == 4


def test_a_run_that_is_cut_otherwise_is_the_same_run_and_its_folder_has_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_of(name: str) -> list[float]:
        config = load_config(overrides=list({
            **DEBUG_OVERRIDES, "training.max_steps": "6", "training.save_steps": "3",
            "training.batch_size": "2", "training.gradient_accumulation_steps": "4",
            "training.precision": "fp32", "training.logging_steps": "1",
            "training.experiment_name": name, "checkpoint_dir": str(tmp_path / "checkpoints"),
            "data.cache_dir": str(data_cache()),
        }.items()))
        result = ScaleRunner(config).run()
        history = MlflowClient().get_metric_history(result.run_id, "train/loss")
        return [metric.value for metric in history]

    with store(tmp_path):
        as_set = run_of("as-set")
        assert "micro-batches" not in capsys.readouterr().out
        room = Room("cuda", 10_000_000_000, CONTEXT_BYTES)
        monkeypatch.setattr(
            job, "choose_micro_batch", lambda model, training, *_: fill(model, training, room)
        )
        cut = run_of("cut")
        assert "training.batch_size=8 training.gradient_accumulation_steps=1" in (
            capsys.readouterr().out.replace("\n", " ")
        )
        saved = (tmp_path / "checkpoints" / "cut" / "config.yaml").read_text()
    assert len(as_set) > 1 and as_set[-1] < as_set[0]
    assert cut == pytest.approx(as_set, rel=1e-5)
    assert "batch_size: 2" in saved and "gradient_accumulation_steps: 4" in saved
