"""The plan of a run: what it will train, on what, for how long, in how much memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch

from svend.device import available_bytes, can_compile, peak_bytes
from svend.errors import ConfigError, ResourceError, one_line
from svend.pipeline.config import (
    Compile,
    MicroBatch,
    ModelConfig,
    Parallel,
    TrainingConfig,
)
from svend.planning.flops import forward_flops_per_token, train_flops_per_token
from svend.planning.memory import MemoryPlan, predict_memory, snapshot_bytes
from svend.planning.probe import measure_matmul_peak, measure_micro_batch_seconds
from svend.planning.search import Room, fill, find_nearest
from svend.ranks import Place

CUDA_CONTEXT_BYTES = 500_000_000
# What the first step on a CPU loads: the growth of a process that trains 0.1M parameters.
CPU_LATE_CODE_BYTES = 95_000_000
# Of what was held when memory ran out: what is suggested then is to fit into so much.
SUGGESTED_SHARE = 0.9
# How torch names what fails where a CPU has no more memory.
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
# Of a GPU's memory: what settings may fill that nobody chose. The plan was 3% off at most there.
FILLED_SHARE = 0.8
# What compiling costs before step 1 and leaves of a step's time, with an empty cache: on a CPU 20 s
# and 0.66 to 0.72 (docs/performance.md); on an H100 6 to 11 s and 0.69 (docs/experiments.md).
COMPILE_SECONDS = {"cpu": 20.0, "cuda": 15.0}
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
        """Tokens of the whole run, padding included."""
        return self.total_steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Model FLOPs of the whole run."""
        return float(self.tokens) * self.flops_per_token


@dataclass(frozen=True)
class RunPlan(RunSize):
    """Figures of a run before step 1. Times are predicted from measurements on this machine.

    peak_flops: FLOPs per second of a large matrix product. seconds: of the whole run, its held-out
    losses included, benchmarks not.
    """

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
    model: ModelConfig, training: TrainingConfig, device: torch.device, shards: int = 1
) -> MemoryPlan:
    """Predict the peak memory of a run's process on a device, whether or not it fits.

    shards: among how many processes the weights are divided.
    """
    return predict_memory(
        model, training, _held_bytes(device), device_type=device.type, shards=shards
    )


def decide_shards(
    model: ModelConfig, training: TrainingConfig, device: torch.device, place: Place
) -> int:
    """Return among how many processes the weights are divided: 1 where each has them whole.

    One process has them whole, whatever is set: a run of many can go on alone. Raises ConfigError
    where training.shard_processes does not divide the processes.
    """
    shards = training.shard_processes or place.size
    if place.size == 1 or training.parallel is Parallel.DDP:
        return 1
    if place.size % shards:
        raise ConfigError(
            f"training.shard_processes = {shards}: must divide the {place.size} processes of the "
            "run"
        )
    if training.parallel is Parallel.FSDP:
        return shards
    whole = predict_memory_on(model, training, device)
    return 1 if whole.total <= _share_of_memory(device, place) else shards


def choose_micro_batch(
    model: ModelConfig,
    training: TrainingConfig,
    device: torch.device,
    place: Place = Place(),  # noqa: B008 - nothing in it changes
    shards: int = 1,
) -> TrainingConfig:
    """Return the settings as a run on the device takes them: what `training.micro_batch` lets it.

    The same step, in larger micro-batches and with less computed again, where a GPU has the memory.
    """
    if training.micro_batch is MicroBatch.FIXED or device.type == "cpu":
        return training
    room = Room(
        device.type, round(FILLED_SHARE * available_bytes(device)), _held_bytes(device)
    )
    return fill(model, training, room, place.size, shards)


def check_memory(
    model: ModelConfig,
    training: TrainingConfig,
    device: torch.device,
    place: Place = Place(),  # noqa: B008 - nothing in it changes
    shards: int = 1,
) -> tuple[MemoryPlan, int]:
    """Predict the peak memory; raise ResourceError, with what to change, if it cannot fit.

    On CPU the copy that is saved while training goes on is counted where there is room for it.
    place: of this process among those of the run, which share the memory of a machine's CPU.
    """
    memory = predict_memory_on(model, training, device, shards)
    available = _share_of_memory(device, place)
    if memory.total > available:
        room = Room(device.type, available, memory.process)
        raise ResourceError(
            f"{model.name} needs about {memory.total / 1e9:.1f} GB to train "
            f"({describe_parts(memory)}), and {available / 1e9:.1f} GB are available on "
            f"{device.type}; {suggest(model, training, room)}"
        )
    if device.type == "cpu":
        with_snapshot = replace(memory, snapshot=snapshot_bytes(model, training) // shards)
        memory = with_snapshot if with_snapshot.total <= available else memory
    return memory, available


def explain_out_of_memory(
    model: ModelConfig,
    training: TrainingConfig,
    device: torch.device,
    plan: RunPlan | None,
    error: BaseException,
) -> str:
    """Return in one line what was held when memory ran out, what was planned, and what to change.

    plan: None where memory ran out before there was one.
    """
    memory = predict_memory_on(model, training, device) if plan is None else plan.memory
    available = available_bytes(device) if plan is None else plan.available_bytes
    peak = peak_bytes(device)
    # What was held was too much, whatever was planned: the suggestion is to leave room.
    room = Room(device.type, round(SUGGESTED_SHARE * min(memory.total, peak, available)),
                memory.process)
    return (
        f"out of memory on {device.type} ({one_line(error)[:160]}): {peak / 1e9:.1f} GB were held "
        f"at most, planned were {memory.total / 1e9:.1f} GB ({describe_parts(memory)}) of "
        f"{available / 1e9:.1f} GB; {suggest(model, training, room)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that an allocation failed: on CUDA, on CPU, or Python's own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def suggest(model: ModelConfig, training: TrainingConfig, room: Room) -> str:
    """Return what to change for the run to fit: the fewest settings, or the machine."""
    nearest = find_nearest(model, training, room)
    if nearest is None:
        return (
            "no settings make it fit into one process; choose a smaller scale, more processes "
            "(training.parallel=fsdp) or a machine with more memory"
        )
    changes = " ".join(nearest.changes)
    return f"the nearest that fits, in {nearest.memory.total / 1e9:.1f} GB: {changes}"


def describe_parts(memory: MemoryPlan) -> str:
    """Return what holds the memory, in GB, as one line."""
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.parts().items())


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
            device.type == "cuda"
            and snapshot_bytes(model, training) <= psutil.virtual_memory().available
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


def _share_of_memory(device: torch.device, place: Place) -> int:
    """Return what a process can have of a device, or of the memory that several share."""
    return available_bytes(device) // (1 if device.type == "cuda" else place.local_size)


def _held_bytes(device: torch.device) -> int:
    """Return what a process holds before the model is there."""
    if device.type != "cpu":
        return CUDA_CONTEXT_BYTES
    return int(psutil.Process().memory_info().rss) + CPU_LATE_CODE_BYTES
