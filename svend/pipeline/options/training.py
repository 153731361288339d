"""The hyperparameters and settings of a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svend.pipeline.groups import ModelScale, read_group
from svend.pipeline.options.choices import (
    CheckpointingPolicy,
    Compile,
    Device,
    FullDisk,
    MicroBatch,
    MomentPrecision,
    Optimizer,
    Parallel,
    Parametrisation,
    Precision,
    Schedule,
    WeightPrecision,
)
from svend.pipeline.options.data import DataConfig, default_data
from svend.pipeline.options.defaults import default, default_dict, default_enum, require
from svend.pipeline.schema import build, read_yaml, to_yaml


@dataclass(frozen=True)
class Branch:
    """Where the learning rate decays beside the run, to see what a shorter one would have reached.

    Optimizer steps: the branch leaves the run behind step `start` and is measured behind `end`.
    """

    start: int
    end: int


@dataclass(kw_only=True)
class TrainingConfig:
    """Hyperparameters and settings of one run."""

    experiment_name: str = default("training.experiment_name")
    model_scale: ModelScale = default_enum("training.model_scale", ModelScale)
    seed: int = default("training.seed")
    num_epochs: int = default("training.num_epochs")
    max_steps: int | None = default("training.max_steps")
    batch_size: int = default("training.batch_size")
    gradient_accumulation_steps: int = default("training.gradient_accumulation_steps")
    micro_batch: MicroBatch = default_enum("training.micro_batch", MicroBatch)
    learning_rate: float = default("training.learning_rate")
    optimizer: Optimizer = default_enum("training.optimizer", Optimizer)
    parametrisation: Parametrisation = default_enum("training.parametrisation", Parametrisation)
    base_width: int = default("training.base_width")
    base_depth: int = default("training.base_depth")
    base_head_size: int = default("training.base_head_size")
    init_std: float = default("training.init_std")
    schedule: Schedule = default_enum("training.schedule", Schedule)
    warmup_ratio: float = default("training.warmup_ratio")
    decay_ratio: float = default("training.decay_ratio")
    min_learning_rate_ratio: float = default("training.min_learning_rate_ratio")
    horizons: list[float] = default("training.horizons")
    weight_decay: float = default("training.weight_decay")
    adam_beta1: float = default("training.adam_beta1")
    adam_beta2: float = default("training.adam_beta2")
    adam_epsilon: float = default("training.adam_epsilon")
    max_grad_norm: float = default("training.max_grad_norm")
    skip_spike_deviations: float | None = default("training.skip_spike_deviations")
    divergence_patience: int = default("training.divergence_patience")
    precision: Precision = default_enum("training.precision", Precision)
    weight_precision: WeightPrecision = default_enum("training.weight_precision", WeightPrecision)
    moment_precision: MomentPrecision = default_enum("training.moment_precision", MomentPrecision)
    parallel: Parallel = default_enum("training.parallel", Parallel)
    shard_processes: int | None = default("training.shard_processes")
    compile: Compile = default_enum("training.compile", Compile)
    gradient_checkpointing: bool = default("training.gradient_checkpointing")
    gradient_checkpointing_policy: CheckpointingPolicy = default_enum(
        "training.gradient_checkpointing_policy", CheckpointingPolicy
    )
    float8: bool = default("training.float8")
    device: Device = default_enum("training.device", Device)
    save_steps: int = default("training.save_steps")
    save_total_limit: int = default("training.save_total_limit")
    on_full_disk: FullDisk = default_enum("training.on_full_disk", FullDisk)
    quick_gate_steps: int = default("training.quick_gate_steps")
    logging_steps: int = default("training.logging_steps")
    heldout_sequences: int = default("training.heldout_sequences")
    validation_gates: dict[str, float] = default_dict("training.validation_gates")
    profile: bool = default("training.profile")
    use_wandb: bool = default("training.use_wandb")
    wandb_project: str = default("training.wandb_project")
    data: DataConfig = field(default_factory=default_data)

    def apply_scale_defaults(self) -> None:
        """Set what `conf/scale/` says of training at this scale: batch size, learning rate, ..."""
        for name, value in _training_of(self.model_scale).items():
            setattr(self, name, value)

    def at_scale(self, scale: ModelScale) -> TrainingConfig:
        """Return a copy for another scale: its defaults, except for what was set by hand."""
        unset = TrainingConfig()
        of_scale = {
            name: value
            for name, value in _training_of(scale).items()
            if getattr(self, name) == getattr(unset, name)
        }
        return dataclasses.replace(self, model_scale=scale, **of_scale)

    @property
    def data_seed(self) -> int:
        """The seed by which documents are generated and held out."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def decay_begins(self) -> float:
        """The share of the steps after which the learning rate falls to its minimum at the end."""
        return 1 - self.decay_ratio if self.schedule is Schedule.WSD else 1.0

    def branches(self, total_steps: int) -> list[Branch]:
        """Return where the run decays beside itself, at each horizon, in order."""
        ends = [round(horizon * total_steps) for horizon in self.horizons]
        return [Branch(end - max(1, round(self.decay_ratio * end)), end) for end in ends]

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML; the folder is made if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(to_yaml(self), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TrainingConfig:
        """Read a configuration that `save` wrote. Raises ConfigError for what does not fit."""
        return build(cls, read_yaml(Path(path)), prefix="training.")

    def check(self) -> None:
        """Raise ConfigError for a value that no run can have."""
        positive = ("num_epochs", "batch_size", "gradient_accumulation_steps", "save_steps",
                    "save_total_limit", "quick_gate_steps", "logging_steps", "heldout_sequences",
                    "base_width", "base_depth", "base_head_size", "divergence_patience")
        for name in positive:
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "1 or more")
        steps = self.max_steps
        require(steps is None or steps >= 1, "training.max_steps", steps, "null, or at least 1")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "init_std"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"training.{name}", value, "above 0")
        shards = self.shard_processes
        require(shards is None or shards >= 2, "training.shard_processes", shards,
                "null, or at least 2")
        self._check_low_memory()
        deviations = self.skip_spike_deviations
        require(deviations is None or (math.isfinite(deviations) and deviations > 0),
                "training.skip_spike_deviations", deviations, "null, or above 0")
        decay = self.weight_decay
        require(math.isfinite(decay) and decay >= 0, "training.weight_decay", decay, "at least 0")
        require(0 <= self.seed < 2**63, "training.seed", self.seed, "at least 0 and below 2^63")
        require(
            self.schedule is not Schedule.WSD or self.warmup_ratio + self.decay_ratio <= 1,
            "training.decay_ratio",
            self.decay_ratio,
            "at most 1 together with training.warmup_ratio",
        )
        require(
            not self.horizons or self.schedule is Schedule.WSD, "training.horizons",
            self.horizons, "empty unless training.schedule is wsd, which can branch off",
        )
        earliest = self.warmup_ratio / (1 - self.decay_ratio) if self.decay_ratio < 1 else 1.0
        require(
            self.horizons == sorted(set(self.horizons))
            and all(earliest <= horizon < 1 for horizon in self.horizons),
            "training.horizons", self.horizons,
            f"shares of the run that rise, from {earliest:.3g}, where the warm-up is over before "
            "the decay begins, to below 1",
        )
        for name, threshold in self.validation_gates.items():
            key = f"training.validation_gates.{name}"
            require(not math.isnan(threshold), key, threshold, "a number")
        for name in ("warmup_ratio", "decay_ratio", "min_learning_rate_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"training.{name}", value, "between 0 and 1")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name}", value, "at least 0 and below 1")
        require(
            bool(self.experiment_name.strip()), "training.experiment_name", "''", "a name"
        )
        self.data.check()

    def _check_low_memory(self) -> None:
        """Raise ConfigError where weights or moments in fewer bits do not go with the rest."""
        weights_bf16 = self.weight_precision is WeightPrecision.BF16
        moments_fp32 = self.moment_precision is MomentPrecision.FP32
        require(
            self.optimizer is Optimizer.ADAMW or (moments_fp32 and not weights_bf16),
            "training.optimizer", self.optimizer.value,
            "adamw where training.weight_precision or training.moment_precision is not fp32",
        )
        require(
            not weights_bf16 or self.precision in (Precision.AUTO, Precision.BF16),
            "training.precision", self.precision.value,
            "auto or bf16 where training.weight_precision is bf16",
        )


def _training_of(scale: ModelScale) -> dict[str, Any]:
    """Return what `conf/scale/` says of training at a scale, other than which scale it is."""
    enums = {"weight_precision": WeightPrecision, "moment_precision": MomentPrecision}
    return {
        name: enums[name](value) if name in enums else value
        for name, value in read_group("scale", scale.value)["training"].items()
        if name != "model_scale"
    }
