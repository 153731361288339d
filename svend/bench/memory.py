"""Predicted peak memory beside what a process takes, for combinations of settings on CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from svend.bench.memory_check import MemoryCheck
from svend.device import multiplies_in_bf16
from svend.errors import UserError, one_line
from svend.pipeline.config import (
    CheckpointingPolicy,
    DataConfig,
    ModelScale,
    MomentPrecision,
    Precision,
    TrainingConfig,
    WeightPrecision,
    get_model_config,
)
from svend.planning.memory import predict_memory
from svend.planning.plan import CPU_LATE_CODE_BYTES

ROOT = Path(__file__).parents[2]


class Freed(StrEnum):
    """What malloc does with a large tensor's memory once it is freed: keeps it, as in a run."""

    RETURNED = "returned"
    KEPT = "kept"


@dataclass(frozen=True)
class Combination:
    """Settings of a run whose peak is measured; checkpointing: none, or a policy."""

    scale: str
    batch_size: int
    length: int
    precision: str = "fp32"
    weights: str = "fp32"
    moments: str = "fp32"
    checkpointing: str = "none"
    micro_batches: int = 2

    def training(self) -> TrainingConfig:
        checkpointed = self.checkpointing != "none"
        return TrainingConfig(
            model_scale=ModelScale(self.scale), batch_size=self.batch_size,
            gradient_accumulation_steps=self.micro_batches, precision=Precision(self.precision),
            weight_precision=WeightPrecision(self.weights),
            moment_precision=MomentPrecision(self.moments),
            gradient_checkpointing=checkpointed,
            gradient_checkpointing_policy=CheckpointingPolicy(
                self.checkpointing if checkpointed else "full"
            ),
            data=DataConfig(sources=["text"], mix_ratios={"general": 1.0},
                            max_seq_length=self.length, num_samples=1),
        )

    def __str__(self) -> str:
        return (f"{self.scale} {self.batch_size}x{self.length} {self.precision}, weights "
                f"{self.weights}, moments {self.moments}, checkpointing {self.checkpointing}, "
                f"{self.micro_batches} a step")


# Short ones: a process takes a minute.
COMBINATIONS = (
    Combination("tiny", 1, 512),
    Combination("tiny", 1, 1024, micro_batches=1),
    Combination("tiny", 2, 512, checkpointing="selective"),
    Combination("tiny", 4, 512, checkpointing="full", micro_batches=1),
    Combination("tiny", 1, 512, moments="bf16"),
    Combination("tiny", 1, 64, precision="bf16"),
    Combination("tiny", 1, 64, precision="bf16", weights="bf16", moments="int8"),
    Combination("small", 1, 512),
    Combination("small", 2, 512, checkpointing="full", micro_batches=1),
    Combination("small", 1, 1024, checkpointing="selective", micro_batches=1),
)


def measure_peaks(report: Callable[[str], None]) -> Iterator[tuple[MemoryCheck, MemoryCheck]]:
    """Train two steps with each combination, and once more as a run's process keeps its memory.

    Yields predicted and measured peak of the first, planned and measured peak of the second.
    """
    for combination in COMBINATIONS:
        if combination.precision == "bf16" and not multiplies_in_bf16():
            report(f"{combination}: left out, for this CPU has no products in bf16")
            continue
        with ThreadPoolExecutor() as at_once:
            tensors, run = at_once.map(partial(measure_peak, combination), Freed)
        report(f"{combination}: {tensors.real_bytes / 1e9:.3f} GB, in a run "
               f"{run.real_bytes / 1e9:.3f} GB")
        yield tensors, run


def measure_peak(combination: Combination, freed: Freed) -> MemoryCheck:
    """Return the peak, predicted and measured in a process of its own.

    Where freed memory is returned, the prediction is without the allocator's share. Raises
    UserError if the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "svend.bench.memory_worker", json.dumps(asdict(combination)), freed],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )
    if done.returncode != 0:
        told = done.stderr.strip().splitlines()
        reason = told[-1] if told else f"exit code {done.returncode}"
        raise UserError(f"bench memory: {combination} ended: {one_line(reason)[:300]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    model, training = get_model_config(ModelScale(combination.scale)), combination.training()
    plan = predict_memory(model, training, measured["process_bytes"] + CPU_LATE_CODE_BYTES)
    predicted = plan.total if freed is Freed.KEPT else plan.process + plan.tensors
    return MemoryCheck(model.name, training, predicted, measured["peak_bytes"])
