"""A run planned for a GPU that is not here: memory, time and settings, from data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from svend.errors import ConfigError
from svend.pipeline.config import ModelConfig, Precision, TrainingConfig
from svend.planning.flops import train_flops_per_token
from svend.planning.gpus import Gpu
from svend.planning.memory import MemoryPlan, predict_memory
from svend.planning.plan import CUDA_CONTEXT_BYTES
from svend.planning.search import (
    Combination,
    Room,
    computed_flops_per_token,
    cost_of,
    find_cheapest,
    find_nearest,
    fit,
)

# Hoffmann et al. 2022 (arXiv 2203.15556), table 3: tokens for each parameter of a model that is
# trained to the lowest loss for its FLOPs.
TOKENS_PER_PARAMETER = 20
# An assumption, not a measurement: what trained models report lies between 0.35 and 0.55.
ASSUMED_MFU = 0.4
OF_ONE_NODE = (1, 2, 4, 8)
GPU_COUNTS = (*OF_ONE_NODE, 16, 32, 64)


@dataclass(frozen=True)
class GpuPlan:
    """What a run takes on so many GPUs.

    mfu: the share of the GPUs' peak that a run without gradient checkpointing uses, assumed.
    shards: GPUs that share one copy of weights, gradients and optimizer state. memory_of_one: with
    the settings as they are, on a single GPU. within_guide: what to change for that to be within
    the memory that the scale is meant for, if anything does it.
    """

    model: ModelConfig
    training: TrainingConfig
    gpu: Gpu
    mfu: float
    gpus: int
    shards: int
    memory: MemoryPlan
    memory_of_one: MemoryPlan
    tokens: int
    tokens_from: str
    within_guide: str | None
    combinations: list[Combination]

    @property
    def fits(self) -> bool:
        """Whether a GPU holds what it is planned to hold."""
        return self.memory.total <= self.gpu.memory_bytes

    @property
    def over_guide_bytes(self) -> int:
        """How far one GPU's peak is above what the scale is meant for; below 0: it is within."""
        return self.memory_of_one.total - self.model.train_memory_gb * 10**9

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all GPUs."""
        training = self.training
        assert training.data.max_seq_length is not None  # set by PipelineConfig.resolve
        return (training.batch_size * training.gradient_accumulation_steps
                * training.data.max_seq_length)

    @property
    def flops_per_token(self) -> int:
        """Model FLOPs of a training step, per token; what is computed again is not counted."""
        assert self.training.data.max_seq_length is not None  # set by PipelineConfig.resolve
        return train_flops_per_token(self.model, self.training.data.max_seq_length)

    @property
    def peak_flops(self) -> float:
        """FLOPs per second that the GPU's data sheet promises in the precision computed in."""
        return self._peak_flops_of(self.training)

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step."""
        return self.seconds_of(self.training, self.gpus) * self.tokens_per_step / self.tokens

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU for all tokens."""
        return self.seconds_of(self.training, 1) / 3600

    def seconds_of(self, training: TrainingConfig, gpus: int) -> float:
        """Return the seconds of all tokens; what GPUs tell one another is not counted."""
        computed = computed_flops_per_token(self.model, training) * self.tokens
        return computed / (gpus * self.mfu * self._peak_flops_of(training))

    def _peak_flops_of(self, training: TrainingConfig) -> float:
        fp32 = training.precision is Precision.FP32
        return self.gpu.fp32_flops if fp32 else self.gpu.bf16_flops


def plan_on_gpus(
    model: ModelConfig,
    training: TrainingConfig,
    gpu: Gpu,
    *,
    gpus: int | None,
    mfu: float,
    tokens: int | None,
) -> GpuPlan:
    """Plan a run on GPUs; without a number of them, on the fewest on which its settings fit.

    Without a number of tokens the run's steps count, and without those TOKENS_PER_PARAMETER.
    Raises ConfigError for a number of GPUs that the sequences of a step cannot be shared by.
    """
    if training.precision is Precision.AUTO:
        training = replace(training, precision=Precision.BF16)
    room = Room("cuda", gpu.memory_bytes, CUDA_CONTEXT_BYTES)
    sequences = training.batch_size * training.gradient_accumulation_steps
    if gpus is not None and sequences % gpus:
        raise ConfigError(
            f"gpus = {gpus}: the {sequences} sequences of a step (training.batch_size times "
            f"training.gradient_accumulation_steps) cannot be shared by so many; choose a divisor"
        )
    shared, count, shards = _place(model, training, room, gpus)
    tokens, tokens_from = _count_tokens(model, training, tokens)
    memory = predict_memory(
        model, shared, CUDA_CONTEXT_BYTES, device_type="cuda", shards=shards
    )
    alone = predict_memory(model, training, CUDA_CONTEXT_BYTES, device_type="cuda")
    counts = (count,) if gpus is not None else sorted({*OF_ONE_NODE, count})
    combinations = sorted(
        (found for number in counts for found in find_cheapest(model, training, room, number)),
        key=cost_of,
    )
    guide = replace(room, available_bytes=model.train_memory_gb * 10**9)
    nearest = find_nearest(model, training, guide)
    within_guide = None if nearest is None else " ".join(nearest.changes)
    return GpuPlan(model, shared, gpu, mfu, count, shards, memory, alone, tokens, tokens_from,
                   within_guide, combinations)


def _place(
    model: ModelConfig, training: TrainingConfig, room: Room, gpus: int | None
) -> tuple[TrainingConfig, int, int]:
    """Return the settings as the GPUs share them, how many there are, and how many share a copy.

    Where nothing fits: on as many as were asked for, or one.
    """
    sequences = training.batch_size * training.gradient_accumulation_steps
    counts = (gpus,) if gpus is not None else GPU_COUNTS
    for count in counts:
        shared = _share(training, count)
        for shards in dict.fromkeys((1, count)):
            if sequences % count == 0 and fit(model, shared, room, count, shards):
                return shared, count, shards
    return _share(training, counts[0]), counts[0], 1


def _share(training: TrainingConfig, gpus: int) -> TrainingConfig:
    """Return the settings with a micro-batch that so many processes can have one each of."""
    sequences = training.batch_size * training.gradient_accumulation_steps
    batch_size = training.batch_size
    while batch_size > 1 and (sequences % batch_size or sequences // batch_size % gpus):
        batch_size -= 1
    return replace(training, batch_size=batch_size,
                   gradient_accumulation_steps=sequences // batch_size)


def _count_tokens(
    model: ModelConfig, training: TrainingConfig, tokens: int | None
) -> tuple[int, str]:
    if tokens is not None:
        return tokens, "as asked for"
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    if training.max_steps is not None:
        per_step = training.batch_size * training.gradient_accumulation_steps * length
        return training.max_steps * per_step, f"{training.max_steps:,} steps"
    return (TOKENS_PER_PARAMETER * model.num_parameters(),
            f"{TOKENS_PER_PARAMETER} a parameter; --tokens for another number")
