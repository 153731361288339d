"""Everything that decides a run, checked as a whole."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from svend.pipeline.options.choices import HealthAction
from svend.pipeline.options.defaults import default, default_enum, require
from svend.pipeline.options.evaluation import BENCHMARK_NAMES, SAMPLE_SUFFIX, EvaluationConfig
from svend.pipeline.options.gates import GatesConfig
from svend.pipeline.options.model import ModelConfig, get_model_config
from svend.pipeline.options.training import TrainingConfig


@dataclass(kw_only=True)
class CarryConfig:
    """Exponents by which a sweep's values follow batch and tokens (`hyperparameters.py`)."""

    learning_rate_by_batch: float = default("carry.learning_rate_by_batch")
    learning_rate_by_tokens: float = default("carry.learning_rate_by_tokens")
    weight_decay_by_batch: float = default("carry.weight_decay_by_batch")
    weight_decay_by_tokens: float = default("carry.weight_decay_by_tokens")

    def check(self) -> None:
        """Raise ConfigError for an exponent that no rule has."""
        for exponent in dataclasses.fields(self):
            value = getattr(self, exponent.name)
            require(math.isfinite(value) and abs(value) <= 2, f"carry.{exponent.name}", value,
                    "between -2 and 2")


@dataclass(kw_only=True)
class HealthConfig:
    """How often a run looks at its health, and what it calls a problem (docs/health.md)."""

    every_steps: int | None = default("health.every_steps")
    max_attention_logit: float | None = default("health.max_attention_logit")
    min_relative_update: float | None = default("health.min_relative_update")
    min_branch_share: float | None = default("health.min_branch_share")
    max_spikes: int | None = default("health.max_spikes")
    action: HealthAction = default_enum("health.action", HealthAction)
    patience: int = default("health.patience")

    def check(self) -> None:
        """Raise ConfigError for a threshold that no look can be held against."""
        every, logit, spikes = self.every_steps, self.max_attention_logit, self.max_spikes
        require(every is None or every >= 1, "health.every_steps", every, "null, or 1 or more")
        require(logit is None or (math.isfinite(logit) and logit > 0),
                "health.max_attention_logit", logit, "null, or above 0")
        for name in ("min_relative_update", "min_branch_share"):
            share = getattr(self, name)
            require(share is None or 0 < share < 1, f"health.{name}", share,
                    "null, or above 0 and below 1")
        require(spikes is None or spikes >= 0, "health.max_spikes", spikes, "null, or 0 or more")
        require(self.patience >= 1, "health.patience", self.patience, "1 or more")


@dataclass(kw_only=True)
class PipelineConfig:
    """Everything that decides a run. The resolved form is saved with it."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig | None = None
    gates: GatesConfig = field(default_factory=GatesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    carry: CarryConfig = field(default_factory=CarryConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    hparams: str | None = default("hparams")
    init_from: str | None = default("init_from")
    model_factory: str | None = default("model_factory")
    preset: str = default("preset")
    strict_validation: bool = default("strict_validation")
    eval_benchmarks: list[str] = default("eval_benchmarks")
    checkpoint_dir: str = default("checkpoint_dir")
    checkpoint_cache_dir: str | None = default("checkpoint_cache_dir")
    grace_seconds: float = default("grace_seconds")
    tracking_wait_seconds: float = default("tracking_wait_seconds")
    rank_timeout_seconds: float = default("rank_timeout_seconds")

    def resolve(self) -> PipelineConfig:
        """Return a copy in which nothing is left to be looked up, checked as a whole."""
        model = self.model or get_model_config(self.training.model_scale)
        data = self.training.data
        data = dataclasses.replace(
            data,
            max_seq_length=(
                model.max_position_embeddings if data.max_seq_length is None
                else data.max_seq_length
            ),
            num_samples=(
                model.recommended_samples if data.num_samples is None else data.num_samples
            ),
        )
        training = dataclasses.replace(self.training, data=data)
        resolved = dataclasses.replace(self, model=model, training=training)
        model.check()
        training.check()
        self.gates.check()
        self.evaluation.check()
        self.carry.check()
        self.health.check()
        require(self.grace_seconds > 0, "grace_seconds", self.grace_seconds, "above 0")
        require(self.tracking_wait_seconds >= 0, "tracking_wait_seconds",
                self.tracking_wait_seconds, "0 or more")
        require(self.rank_timeout_seconds > 0, "rank_timeout_seconds",
                self.rank_timeout_seconds, "above 0")
        for name in self.eval_benchmarks:
            require(name.removesuffix(SAMPLE_SUFFIX) in BENCHMARK_NAMES, "eval_benchmarks", name,
                    f"one of {', '.join(BENCHMARK_NAMES)}")
        of_scale = get_model_config(training.model_scale)
        require(
            model == of_scale or model.name != of_scale.name,
            "model.name",
            model.name,
            "a name of its own: the model differs from the scale's, whose registry it would enter",
        )
        require(
            (data.max_seq_length or 0) <= model.max_position_embeddings,
            "training.data.max_seq_length",
            data.max_seq_length,
            f"at most the context of {model.name}, {model.max_position_embeddings}",
        )
        return resolved
