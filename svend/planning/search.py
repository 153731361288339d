"""Settings under which a run fits into memory, and which of them cost least."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from svend.pipeline.config import (
    CheckpointingPolicy,
    ModelConfig,
    MomentPrecision,
    TrainingConfig,
    WeightPrecision,
)
from svend.planning.flops import forward_flops_per_token, train_flops_per_token
from svend.planning.memory import MOMENT_BYTES, MemoryPlan, predict_memory

# From the most precise to the least: by the bytes that are kept of a weight.
RECIPES = sorted(
    itertools.product(WeightPrecision, MomentPrecision),
    key=lambda recipe: (recipe[0] is WeightPrecision.BF16, -MOMENT_BYTES[recipe[1]]),
)
CHECKPOINTING: tuple[CheckpointingPolicy | None, ...] = (
    None, CheckpointingPolicy.SELECTIVE, CheckpointingPolicy.FULL,
)


# FLOPs of a block's pass from where on a GPU computes longer than it takes to be told: launching
# a block's kernels took 3 ms forward and backward (H100, docs/experiments.md).
BUSY_FLOPS = 1e12


@dataclass(frozen=True)
class Room:
    """The memory that a process has on a device, and what it holds before the model exists."""

    device_type: str
    available_bytes: int
    process_bytes: int


@dataclass(frozen=True)
class Combination:
    """Settings that fit, on so many devices, of which so many share one copy of the weights."""

    training: TrainingConfig
    devices: int
    shards: int
    memory: MemoryPlan
    computed_flops_per_token: float
    changes: tuple[str, ...]

    @property
    def precision_lost(self) -> int:
        """The place of its recipe among RECIPES, the most precise first."""
        return RECIPES.index((self.training.weight_precision, self.training.moment_precision))


def computed_flops_per_token(model: ModelConfig, training: TrainingConfig) -> float:
    """Return FLOPs of a step per token, what gradient checkpointing computes again included.

    FULL runs the blocks forward once more; SELECTIVE computes no matrix product again, and what it
    does, between them, is not counted: on a GPU it waits for memory, not for arithmetic.
    """
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    flops = float(train_flops_per_token(model, length))
    full = training.gradient_checkpointing_policy is CheckpointingPolicy.FULL
    if training.gradient_checkpointing and full:
        flops += forward_flops_per_token(model, length) - 2 * model.vocab_size * model.hidden_size
    return flops


def fit(
    model: ModelConfig, training: TrainingConfig, room: Room, devices: int = 1, shards: int = 1,
    changes: tuple[str, ...] = (),
) -> Combination | None:
    """Return the settings with their figures, or None if they do not fit.

    What several share one copy of is kept in fp32: weights in bf16 are for one device.
    """
    if shards > 1 and training.weight_precision is not WeightPrecision.FP32:
        return None
    memory = predict_memory(
        model, training, room.process_bytes, device_type=room.device_type, shards=shards
    )
    if memory.total > room.available_bytes:
        return None
    flops = computed_flops_per_token(model, training)
    return Combination(training, devices, shards, memory, flops, changes)


def find_cheapest(
    model: ModelConfig, training: TrainingConfig, room: Room, devices: int
) -> list[Combination]:
    """Return of each recipe and each sharding the cheapest combination that fits, in order.

    Cheapest: with the fewest FLOPs computed; then the largest micro-batch. In order: of FLOPs, then
    of precision lost. On several devices each holds the whole model, or all share one copy.
    """
    found: dict[tuple[int, int], Combination] = {}
    for shards in {1, devices}:
        for changed, changes in _variants(training, devices):
            combination = fit(model, changed, room, devices, shards, changes)
            if combination is None:
                continue
            key = (shards, combination.precision_lost)
            if key not in found or cost_of(combination) < cost_of(found[key]):
                found[key] = combination
    return sorted(found.values(), key=cost_of)


def fill(
    model: ModelConfig, training: TrainingConfig, room: Room, devices: int = 1, shards: int = 1
) -> TrainingConfig:
    """Return the settings with the micro-batch and recomputation that are fastest in the room.

    The step and the precisions stay. Of what fits: micro-batches that keep a GPU busy, then the
    least computed again, then the largest micro-batch; as they are where nothing else fits, and
    never a smaller micro-batch or more computed again than is set.
    """
    recipe = (training.weight_precision, training.moment_precision)
    set_policy = _policy_of(training)
    found = [
        combination for changed, changes in _variants(training, devices)
        if (changed.weight_precision, changed.moment_precision) == recipe
        and changed.batch_size >= training.batch_size
        and CHECKPOINTING.index(_policy_of(changed)) <= CHECKPOINTING.index(set_policy)
        and (combination := fit(model, changed, room, devices, shards, changes)) is not None
    ]

    def order(combination: Combination) -> tuple[float, float, int, int]:
        changed = combination.training
        return (
            -min(BUSY_FLOPS, _block_flops(model, changed)), combination.computed_flops_per_token,
            CHECKPOINTING.index(_policy_of(changed)), -changed.batch_size,
        )

    return min(found, key=order).training if found else training


def find_nearest(
    model: ModelConfig, training: TrainingConfig, room: Room
) -> Combination | None:
    """Return what fits on one device with the fewest changes, or None.

    Of as few changes: the one that loses the least precision, then the cheapest.
    """
    found = [
        combination for changed, changes in _variants(training, 1)
        if (combination := fit(model, changed, room, changes=changes)) is not None
    ]
    return min(found, key=_distance, default=None)


def cost_of(combination: Combination) -> tuple[float, int, int, int, int]:
    """Return what combinations are ordered by: FLOPs, then precision, then devices, then batch."""
    return (combination.computed_flops_per_token, combination.precision_lost, combination.devices,
            combination.shards, -combination.training.batch_size)


def _policy_of(training: TrainingConfig) -> CheckpointingPolicy | None:
    checkpointing = training.gradient_checkpointing
    return training.gradient_checkpointing_policy if checkpointing else None


def _block_flops(model: ModelConfig, training: TrainingConfig) -> float:
    """Return the FLOPs of one block on one micro-batch, forward and backward."""
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    head_flops = 6 * model.vocab_size * model.hidden_size
    blocks_flops = train_flops_per_token(model, length) - head_flops
    return training.batch_size * length * blocks_flops / model.num_hidden_layers


def _distance(combination: Combination) -> tuple[int, int, float, int]:
    return (len(combination.changes), combination.precision_lost,
            combination.computed_flops_per_token, -combination.training.batch_size)


def _variants(
    training: TrainingConfig, devices: int
) -> Iterator[tuple[TrainingConfig, tuple[str, ...]]]:
    """Yield every variant of the settings with the same step, and what is changed in it."""
    sequences = training.batch_size * training.gradient_accumulation_steps
    batches = [
        size for size in range(1, sequences + 1)
        if sequences % size == 0 and (sequences // size) % devices == 0
    ]
    for (weights, moments), policy, batch_size in itertools.product(
        RECIPES, CHECKPOINTING, batches
    ):
        changed = replace(
            training, weight_precision=weights, moment_precision=moments, batch_size=batch_size,
            gradient_accumulation_steps=sequences // batch_size,
            gradient_checkpointing=policy is not None,
            gradient_checkpointing_policy=policy or training.gradient_checkpointing_policy,
        )
        yield changed, tuple(differences(training, changed))


def differences(old: TrainingConfig, new: TrainingConfig) -> Iterator[str]:
    """Yield what is to be set to come from the old settings to the new, as one types it."""
    if new.batch_size != old.batch_size:
        yield (f"training.batch_size={new.batch_size} "
               f"training.gradient_accumulation_steps={new.gradient_accumulation_steps}")
    policy = new.gradient_checkpointing_policy
    other_policy = new.gradient_checkpointing and policy is not old.gradient_checkpointing_policy
    if new.gradient_checkpointing != old.gradient_checkpointing or other_policy:
        wanted = f"training.gradient_checkpointing={str(new.gradient_checkpointing).lower()}"
        yield wanted + (f" training.gradient_checkpointing_policy={policy.value}"
                        if other_policy else "")
    if new.weight_precision is not old.weight_precision:
        yield f"training.weight_precision={new.weight_precision.value}"
    if new.moment_precision is not old.moment_precision:
        yield f"training.moment_precision={new.moment_precision.value}"
