"""The plan of a run: what it will train, on what, for how long, in how much memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch

from svend.device import available_bytes, can_compile
from svend.errors import ResourceError
from svend.pipeline.config import Compile, ModelConfig, TrainingConfig
from svend.planning.flops import forward_flops_per_token, train_flops_per_token
from svend.planning.memory import MemoryPlan, predict_memory, snapshot_bytes
from svend.planning.probe import measure_matmul_peak, measure_micro_batch_seconds

CUDA_CONTEXT_BYTES = 500_000_000
# What compiling costs before step 1 and leaves of a step's time. On CPU 20 s with an empty cache
# and 0.66 to 0.72 (docs/performance.md); on CUDA not measured: a run of minutes is to earn it back.
COMPILE_SECONDS = {"cpu": 20.0, "cuda": 60.0}
COMPILED_SHARE = {"cpu": 0.7, "cuda": 0.7}


@dataclass(frozen=True)
class RunSize:
    """What a run is to do, whatever the machine."""

    parameters: int
    total_steps: int
    tokens_per_step: int
    flops_per_token: int

    @property
    def tokens(self) -> int:
        return self.total_steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        return float(self.tokens) * self.flops_per_token


@dataclass(frozen=True)
class RunPlan(RunSize):
    """Figures of a run before step 1. Times are predicted from measurements on this machine."""

    peak_flops: float
    memory: MemoryPlan
    available_bytes: int
    seconds: float
    compile: bool
    saves_in_background: bool


def size_run(training: TrainingConfig, model: ModelConfig, total_steps: int) -> RunSize:
    """Return what a run of so many steps is to do."""
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    return RunSize(
        parameters=model.num_parameters(),
        total_steps=total_steps,
        tokens_per_step=training.gradient_accumulation_steps * training.batch_size * length,
        flops_per_token=train_flops_per_token(model, length),
    )


def predict_memory_on(
    model: ModelConfig, training: TrainingConfig, device: torch.device
) -> MemoryPlan:
    """Predict the peak memory of a run on a device, whether or not it fits."""
    return predict_memory(model, training, _held_bytes(device))


def check_memory(
    model: ModelConfig, training: TrainingConfig, device: torch.device
) -> tuple[MemoryPlan, int]:
    """Predict the peak memory; raise ResourceError, with what to change, if it cannot fit.

    On CPU the copy that is saved while training goes on is counted where there is room for it.
    """
    held = _held_bytes(device)
    memory = predict_memory_on(model, training, device)
    available = available_bytes(device)
    if memory.total > available:
        leanest = replace(training, batch_size=1, gradient_checkpointing=True)
        remedy = (
            "lower training.batch_size, or set training.gradient_checkpointing=true"
            if predict_memory(model, leanest, held).total <= available
            else "choose a smaller scale or a machine with more memory"
        )
        raise ResourceError(
            f"{model.name} needs about {memory.total / 1e9:.1f} GB to train "
            f"(weights, gradients and AdamW state {_state_bytes(memory) / 1e9:.1f} GB), and "
            f"{available / 1e9:.1f} GB are available on {device.type}; {remedy}"
        )
    if device.type == "cpu":
        with_snapshot = replace(memory, snapshot=snapshot_bytes(model))
        memory = with_snapshot if with_snapshot.total <= available else memory
    return memory, available


def plan_run(
    training: TrainingConfig,
    model: ModelConfig,
    total_steps: int,
    memory: tuple[MemoryPlan, int],
    device: torch.device,
    compiled: bool | None = None,
) -> RunPlan:
    """Measure this machine for a second or two and return the plan of the run.

    `compiled` is what an earlier part of the run decided: a resumed run computes as it did.
    """
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    peak_flops = measure_matmul_peak(training.precision, device)
    micro_seconds, update_seconds = measure_micro_batch_seconds(model, training, device)
    accumulation = training.gradient_accumulation_steps
    steps = total_steps + sum(b.end - b.start for b in training.branches(total_steps))
    seconds = steps * (accumulation * micro_seconds + update_seconds)
    evaluations = -(-total_steps // training.save_steps)
    forward_share = forward_flops_per_token(model, length) / train_flops_per_token(model, length)
    sequence_seconds = micro_seconds / training.batch_size * forward_share
    seconds += evaluations * training.heldout_sequences * sequence_seconds
    compiled_seconds = COMPILE_SECONDS[device.type] + COMPILED_SHARE[device.type] * seconds
    compile_blocks = compiled
    if compile_blocks is None:
        compile_blocks = _decide_compile(training, compiled_seconds < seconds, device)
    return RunPlan(
        **vars(size_run(training, model, total_steps)),
        peak_flops=peak_flops,
        memory=memory[0],
        available_bytes=memory[1],
        seconds=compiled_seconds if compile_blocks else seconds,
        compile=compile_blocks,
        saves_in_background=memory[0].snapshot > 0 or (
            device.type == "cuda" and snapshot_bytes(model) <= psutil.virtual_memory().available
        ),
    )


def _decide_compile(training: TrainingConfig, earns: bool, device: torch.device) -> bool:
    compilable = can_compile(device)
    if training.compile is Compile.ON and not compilable:
        raise ResourceError(
            "training.compile = on: no compiler or no Python.h found; install g++ and Python's "
            "headers, or set training.compile=off"
        )
    if training.compile is Compile.AUTO:
        return compilable and earns
    return training.compile is Compile.ON


def _held_bytes(device: torch.device) -> int:
    """Return what a process holds before the model is there."""
    on_cpu = device.type == "cpu"
    return int(psutil.Process().memory_info().rss) if on_cpu else CUDA_CONTEXT_BYTES


def _state_bytes(memory: MemoryPlan) -> int:
    return memory.weights + memory.gradients + memory.optimizer
