"""What can be set, of which type, and what may be combined with what.

The dataclasses here are the schema. Their defaults stand in `conf/`, once: `conf/config.yaml` for
what is the same everywhere, `conf/scale/` for what is a property of a scale.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from svend.errors import ConfigError
from svend.pipeline.groups import ModelScale, default_tree, read_group
from svend.pipeline.schema import build, read_yaml, to_yaml


class Schedule(Enum):
    """How the learning rate moves over a run."""

    COSINE = "cosine"
    WSD = "wsd"
    CONSTANT = "constant"


class Optimizer(Enum):
    """What updates the weights."""

    ADAMW = "adamw"
    MUON = "muon"  # the blocks' matrices; AdamW the rest


class Parametrisation(Enum):
    """How init, learning rates and multipliers depend on width and depth."""

    STANDARD = "standard"
    COMPLETEP = "completep"  # what is best for a small model is best for a large one


class Precision(Enum):
    """The number format of the forward and backward pass; of the weights see WeightPrecision.

    AUTO is BF16 on a device that multiplies in it, else FP16 on CUDA and FP32 on a CPU.
    """

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Parallel(Enum):
    """How several processes share a run; AUTO is DDP where the model fits whole, else FSDP."""

    AUTO = "auto"
    DDP = "ddp"  # each holds the whole model
    FSDP = "fsdp"  # each holds a part of weights, gradients and moments


class WeightPrecision(Enum):
    """The number format that the weights are kept in between steps."""

    FP32 = "fp32"
    BF16 = "bf16"  # the matrices, rounded stochastically after each step


class MomentPrecision(Enum):
    """The number format that AdamW's moments are kept in between steps."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class CheckpointingPolicy(Enum):
    """What gradient checkpointing computes again in the backward pass."""

    FULL = "full"  # the whole block
    SELECTIVE = "selective"  # what lies between matrix products and attention


class FullDisk(Enum):
    """What a run does whose checkpoint does not fit on the disk."""

    STOP = "stop"  # after saying what is missing; the last checkpoint stays
    PRUNE = "prune"  # remove old checkpoints, but for the last valid and the best one


class Compile(Enum):
    """Whether blocks are compiled; AUTO compiles runs that are long enough to gain from it."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Device(Enum):
    """Where the model trains; AUTO is CUDA where there is a CUDA device."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class LongDocuments(Enum):
    """What happens to a document longer than a training sequence."""

    SPLIT = "split"
    DROP = "drop"


class LossOn(Enum):
    """Which tokens training learns to predict."""

    ALL = "all"
    ANSWERS = "answers"  # what the model says: answers, calls, and running text


class Exhausted(Enum):
    """What happens when a kind of the mix has no more documents."""

    STOP = "stop"  # the epoch ends
    REPEAT = "repeat"  # the kind begins anew, until every kind has been seen whole


class BrokenRows(Enum):
    """What happens to a row that cannot be read, is not in its source's schema, or is empty."""

    FAIL = "fail"
    DROP = "drop"  # and is counted, and named in the data report


class Duplicates(Enum):
    """Which repeated documents are left out of the train part."""

    KEEP = "keep"
    EXACT = "exact"
    NEAR = "near"  # also what shares most of its five-word sequences (MinHash)


class ToolScore(Enum):
    """Which score of the benchmark tool_accuracy the gates read under its name."""

    EXECUTION = "execution"  # problems answered right through a valid call
    STRUCTURE = "structure"  # calls as BFCL accepts them


class HealthAction(Enum):
    """What a run does when a look at its health shows a problem."""

    WARN = "warn"
    FAIL = "fail"  # after as many looks in a row as health.patience says


# What eval_benchmarks may name, each also with SAMPLE_SUFFIX behind it.
BENCHMARK_NAMES = ("accuracy", "tool_accuracy", "gsm8k", "math", "humaneval", "safety_accuracy",
                   "latency_p99", "perplexity")
SAMPLE_SUFFIX = "_sample"


def _default(key: str) -> Any:
    """A dataclass field whose default is what `conf/` says at `key`."""

    def look_up() -> Any:
        value: Any = default_tree()
        for part in key.split("."):
            value = value[part]
        return list(value) if isinstance(value, list) else value

    return field(default_factory=look_up)


def _default_enum(key: str, enum: type[Enum]) -> Any:
    factory = _default(key).default_factory
    return field(default_factory=lambda: enum(factory()))


def _default_dict(key: str) -> Any:
    factory = _default(key).default_factory
    return field(default_factory=lambda: dict(factory()))


@dataclass(kw_only=True)
class ModelConfig:
    """The architecture of a scale, and what the scale wants of data and memory."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    train_memory_gb: int
    recommended_samples: int
    rms_norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def num_block_parameters(self) -> int:
        """Parameters of the transformer blocks, the part whose cost grows with depth."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_size
        attention = 2 * d * d + 2 * d * kv
        feed_forward = 3 * d * self.intermediate_size
        norms = 2 * d
        return self.num_hidden_layers * (attention + feed_forward + norms)

    def num_matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with: blocks and head. The N of scaling laws."""
        return self.num_block_parameters() + self.vocab_size * self.hidden_size

    def num_parameters(self) -> int:
        """Parameters of the whole model: embedding, blocks, final norm, untied head."""
        embedding_and_head = 2 * self.vocab_size * self.hidden_size
        return embedding_and_head + self.num_block_parameters() + self.hidden_size

    def check(self) -> None:
        """Raise ConfigError for a shape that no transformer has, or a name no registry takes."""
        _require(bool(self.name.strip()) and not set(self.name) & set("/:@"), "model.name",
                 repr(self.name), "a name without /, : and @, for the registry")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                     "num_key_value_heads", "intermediate_size", "max_position_embeddings"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        _require(
            self.hidden_size % self.num_attention_heads == 0 and self.head_size % 2 == 0,
            "model.hidden_size",
            self.hidden_size,
            f"an even multiple of model.num_attention_heads ({self.num_attention_heads})",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of model.num_attention_heads ({self.num_attention_heads})",
        )
        theta = self.rope_theta
        _require(math.isfinite(theta) and theta > 0, "model.rope_theta", theta, "above 0")
        eps = self.rms_norm_eps
        _require(math.isfinite(eps) and eps > 0, "model.rms_norm_eps", eps, "above 0")
        _require(self.recommended_samples >= 1, "model.recommended_samples",
                 self.recommended_samples, "at least 1")


@dataclass(kw_only=True)
class OwnSource:
    """A data set of the user's: its kind, its place, and the function that reads a record."""

    name: str
    kind: str
    to_document: str
    path: str | None = None
    repository: str | None = None
    subset: str | None = None
    revision: str = "main"
    heldout_split: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Which documents a run sees, in which proportions, and how long its sequences are."""

    recipe: str = "custom"
    purpose: str = "own sources"
    sources: list[str] = _default("training.data.sources")
    mix_ratios: dict[str, float] = _default_dict("training.data.mix_ratios")
    max_seq_length: int | None = _default("training.data.max_seq_length")
    num_samples: int | None = _default("training.data.num_samples")
    seed: int | None = _default("training.data.seed")
    path: str | None = _default("training.data.path")
    heldout_path: str | None = _default("training.data.heldout_path")
    heldout_fraction: float = _default("training.data.heldout_fraction")
    tokenizer: str = _default("training.data.tokenizer")
    long_documents: LongDocuments = _default_enum("training.data.long_documents", LongDocuments)
    loss_on: LossOn = _default_enum("training.data.loss_on", LossOn)
    exhausted: Exhausted = _default_enum("training.data.exhausted", Exhausted)
    broken_rows: BrokenRows = _default_enum("training.data.broken_rows", BrokenRows)
    duplicates: Duplicates = _default_enum("training.data.duplicates", Duplicates)
    leak_words: int = _default("training.data.leak_words")
    evaluation_sets: list[str] = _default("training.data.evaluation_sets")
    own_sources: list[OwnSource] = field(default_factory=list)
    revisions: dict[str, str] = _default_dict("training.data.revisions")
    processes: int | None = _default("training.data.processes")
    cache_dir: str = _default("training.data.cache_dir")

    def check(self) -> None:
        """Raise ConfigError for a mix that cannot be made."""
        where = "training.data"
        _require(bool(self.sources), f"{where}.sources", self.sources, "at least one source")
        ratios = self.mix_ratios
        _require(
            bool(ratios)
            and all(math.isfinite(r) and r >= 0 for r in ratios.values())
            and math.isclose(sum(ratios.values()), 1.0, abs_tol=1e-6),
            f"{where}.mix_ratios",
            ratios,
            "ratios of at least 0 that sum to 1",
        )
        length = self.max_seq_length
        _require(length is None or length >= 8, f"{where}.max_seq_length", length, "at least 8")
        samples = self.num_samples
        _require(samples is None or samples >= 1, f"{where}.num_samples", samples, "at least 1")
        fraction = self.heldout_fraction
        _require(0 < fraction < 1, f"{where}.heldout_fraction", fraction, "between 0 and 1")
        seed = self.seed
        _require(seed is None or 0 <= seed < 2**63, f"{where}.seed", seed,
                 "null, or at least 0 and below 2^63")
        _require(self.leak_words >= 0, f"{where}.leak_words", self.leak_words, "at least 0")
        processes = self.processes
        _require(processes is None or processes >= 1, f"{where}.processes", processes,
                 "null, or at least 1")


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

    experiment_name: str = _default("training.experiment_name")
    model_scale: ModelScale = _default_enum("training.model_scale", ModelScale)
    seed: int = _default("training.seed")
    num_epochs: int = _default("training.num_epochs")
    max_steps: int | None = _default("training.max_steps")
    batch_size: int = _default("training.batch_size")
    gradient_accumulation_steps: int = _default("training.gradient_accumulation_steps")
    learning_rate: float = _default("training.learning_rate")
    optimizer: Optimizer = _default_enum("training.optimizer", Optimizer)
    parametrisation: Parametrisation = _default_enum("training.parametrisation", Parametrisation)
    base_width: int = _default("training.base_width")
    base_depth: int = _default("training.base_depth")
    base_head_size: int = _default("training.base_head_size")
    schedule: Schedule = _default_enum("training.schedule", Schedule)
    warmup_ratio: float = _default("training.warmup_ratio")
    decay_ratio: float = _default("training.decay_ratio")
    min_learning_rate_ratio: float = _default("training.min_learning_rate_ratio")
    horizons: list[float] = _default("training.horizons")
    weight_decay: float = _default("training.weight_decay")
    adam_beta1: float = _default("training.adam_beta1")
    adam_beta2: float = _default("training.adam_beta2")
    adam_epsilon: float = _default("training.adam_epsilon")
    max_grad_norm: float = _default("training.max_grad_norm")
    skip_spike_deviations: float | None = _default("training.skip_spike_deviations")
    divergence_patience: int = _default("training.divergence_patience")
    precision: Precision = _default_enum("training.precision", Precision)
    weight_precision: WeightPrecision = _default_enum("training.weight_precision", WeightPrecision)
    moment_precision: MomentPrecision = _default_enum("training.moment_precision", MomentPrecision)
    parallel: Parallel = _default_enum("training.parallel", Parallel)
    shard_processes: int | None = _default("training.shard_processes")
    compile: Compile = _default_enum("training.compile", Compile)
    gradient_checkpointing: bool = _default("training.gradient_checkpointing")
    gradient_checkpointing_policy: CheckpointingPolicy = _default_enum(
        "training.gradient_checkpointing_policy", CheckpointingPolicy
    )
    float8: bool = _default("training.float8")
    device: Device = _default_enum("training.device", Device)
    save_steps: int = _default("training.save_steps")
    save_total_limit: int = _default("training.save_total_limit")
    on_full_disk: FullDisk = _default_enum("training.on_full_disk", FullDisk)
    quick_gate_steps: int = _default("training.quick_gate_steps")
    logging_steps: int = _default("training.logging_steps")
    heldout_sequences: int = _default("training.heldout_sequences")
    validation_gates: dict[str, float] = _default_dict("training.validation_gates")
    profile: bool = _default("training.profile")
    use_wandb: bool = _default("training.use_wandb")
    wandb_project: str = _default("training.wandb_project")
    data: DataConfig = field(default_factory=lambda: _default_data())

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
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "1 or more")
        steps = self.max_steps
        _require(steps is None or steps >= 1, "training.max_steps", steps, "null, or at least 1")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"training.{name}", value, "above 0")
        shards = self.shard_processes
        _require(shards is None or shards >= 2, "training.shard_processes", shards,
                 "null, or at least 2")
        self._check_low_memory()
        deviations = self.skip_spike_deviations
        _require(deviations is None or (math.isfinite(deviations) and deviations > 0),
                 "training.skip_spike_deviations", deviations, "null, or above 0")
        decay = self.weight_decay
        _require(math.isfinite(decay) and decay >= 0, "training.weight_decay", decay, "at least 0")
        _require(0 <= self.seed < 2**63, "training.seed", self.seed, "at least 0 and below 2^63")
        _require(
            self.schedule is not Schedule.WSD or self.warmup_ratio + self.decay_ratio <= 1,
            "training.decay_ratio",
            self.decay_ratio,
            "at most 1 together with training.warmup_ratio",
        )
        _require(
            not self.horizons or self.schedule is Schedule.WSD, "training.horizons",
            self.horizons, "empty unless training.schedule is wsd, which can branch off",
        )
        earliest = self.warmup_ratio / (1 - self.decay_ratio) if self.decay_ratio < 1 else 1.0
        _require(
            self.horizons == sorted(set(self.horizons))
            and all(earliest <= horizon < 1 for horizon in self.horizons),
            "training.horizons", self.horizons,
            f"shares of the run that rise, from {earliest:.3g}, where the warm-up is over before "
            "the decay begins, to below 1",
        )
        for name, threshold in self.validation_gates.items():
            key = f"training.validation_gates.{name}"
            _require(not math.isnan(threshold), key, threshold, "a number")
        for name in ("warmup_ratio", "decay_ratio", "min_learning_rate_ratio"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"training.{name}", value, "between 0 and 1")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"training.{name}", value, "at least 0 and below 1")
        _require(
            bool(self.experiment_name.strip()), "training.experiment_name", "''", "a name"
        )
        self.data.check()

    def _check_low_memory(self) -> None:
        """Raise ConfigError where weights or moments in fewer bits do not go with the rest."""
        weights_bf16 = self.weight_precision is WeightPrecision.BF16
        moments_fp32 = self.moment_precision is MomentPrecision.FP32
        _require(
            self.optimizer is Optimizer.ADAMW or (moments_fp32 and not weights_bf16),
            "training.optimizer", self.optimizer.value,
            "adamw where training.weight_precision or training.moment_precision is not fp32",
        )
        _require(
            not weights_bf16 or self.precision in (Precision.AUTO, Precision.BF16),
            "training.precision", self.precision.value,
            "auto or bf16 where training.weight_precision is bf16",
        )


@dataclass(kw_only=True)
class ValidationGate:
    """One condition: it passes when `metric_name comparison threshold` holds."""

    name: str
    metric_name: str
    threshold: float
    comparison: str = "<"
    required: bool = True
    description: str = ""

    def __post_init__(self) -> None:
        if self.comparison not in ("<", "<=", ">", ">=", "=="):
            raise ConfigError(
                f"gate '{self.name}': comparison '{self.comparison}' is not one of <, <=, >, >=, =="
            )
        if isinstance(self.threshold, float) and math.isnan(self.threshold):
            raise ConfigError(f"gate '{self.name}': threshold = nan: must be a number")


def _default_gates(level: str) -> Any:
    return field(
        default_factory=lambda: [ValidationGate(**gate) for gate in default_tree()["gates"][level]]
    )


@dataclass(kw_only=True)
class GatesConfig:
    """The gates of the four levels.

    confidence: None decides by the measured value, as the guide does; a number such as 0.95 by the
    bound of an interval of that one-sided confidence.
    """

    confidence: float | None = _default("gates.confidence")
    quick: list[ValidationGate] = _default_gates("quick")
    standard: list[ValidationGate] = _default_gates("standard")
    full: list[ValidationGate] = _default_gates("full")
    production: list[ValidationGate] = _default_gates("production")

    def check(self) -> None:
        """Raise ConfigError for a confidence that no interval has."""
        confidence = self.confidence
        _require(confidence is None or 0.5 < confidence < 1, "gates.confidence", confidence,
                 "null, or above 0.5 and below 1")


@dataclass(kw_only=True)
class EvaluationConfig:
    """How benchmarks are measured, and for how long."""

    every_steps: int | None = _default("evaluation.every_steps")
    budget_seconds: float = _default("evaluation.budget_seconds")
    problems: int | None = _default("evaluation.problems")
    samples_per_problem: int = _default("evaluation.samples_per_problem")
    batch_size: int = _default("evaluation.batch_size")
    max_new_tokens: int | None = _default("evaluation.max_new_tokens")
    temperature: float = _default("evaluation.temperature")
    top_k: int | None = _default("evaluation.top_k")
    top_p: float = _default("evaluation.top_p")
    seed: int = _default("evaluation.seed")
    int8: bool = _default("evaluation.int8")
    paths: dict[str, str] = _default_dict("evaluation.paths")
    tool_score: ToolScore = _default_enum("evaluation.tool_score", ToolScore)
    latency_batch: int = _default("evaluation.latency_batch")
    latency_prompt_tokens: int = _default("evaluation.latency_prompt_tokens")
    latency_new_tokens: int = _default("evaluation.latency_new_tokens")
    latency_answers: int = _default("evaluation.latency_answers")

    def check(self) -> None:
        """Raise ConfigError for a setting that no evaluation can have."""
        for name in ("samples_per_problem", "batch_size", "latency_batch", "latency_prompt_tokens",
                     "latency_new_tokens", "latency_answers"):
            _require(getattr(self, name) >= 1, f"evaluation.{name}", getattr(self, name),
                     "1 or more")
        for name in ("every_steps", "problems", "max_new_tokens", "top_k"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"evaluation.{name}", value, "null, or 1 or more")
        budget, temperature = self.budget_seconds, self.temperature
        _require(math.isfinite(budget) and budget > 0, "evaluation.budget_seconds", budget,
                 "above 0")
        _require(math.isfinite(temperature) and temperature >= 0, "evaluation.temperature",
                 temperature, "at least 0")
        _require(0 < self.top_p <= 1, "evaluation.top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.seed < 2**32, "evaluation.seed", self.seed,
                 "at least 0 and below 2^32")
        _require(self.samples_per_problem == 1 or temperature > 0,
                 "evaluation.samples_per_problem", self.samples_per_problem,
                 "1 where evaluation.temperature is 0: they would all be the same")
        for name in self.paths:
            _require(name in BENCHMARK_NAMES, f"evaluation.paths.{name}", self.paths[name],
                     f"for one of {', '.join(BENCHMARK_NAMES)}")


@dataclass(kw_only=True)
class CarryConfig:
    """Exponents by which a sweep's values follow batch and tokens (`hyperparameters.py`)."""

    learning_rate_by_batch: float = _default("carry.learning_rate_by_batch")
    learning_rate_by_tokens: float = _default("carry.learning_rate_by_tokens")
    weight_decay_by_batch: float = _default("carry.weight_decay_by_batch")
    weight_decay_by_tokens: float = _default("carry.weight_decay_by_tokens")

    def check(self) -> None:
        """Raise ConfigError for an exponent that no rule has."""
        for exponent in dataclasses.fields(self):
            value = getattr(self, exponent.name)
            _require(math.isfinite(value) and abs(value) <= 2, f"carry.{exponent.name}", value,
                     "between -2 and 2")


@dataclass(kw_only=True)
class HealthConfig:
    """How often a run looks at its health, and what it calls a problem (docs/health.md)."""

    every_steps: int | None = _default("health.every_steps")
    max_attention_logit: float | None = _default("health.max_attention_logit")
    min_relative_update: float | None = _default("health.min_relative_update")
    min_branch_share: float | None = _default("health.min_branch_share")
    max_spikes: int | None = _default("health.max_spikes")
    action: HealthAction = _default_enum("health.action", HealthAction)
    patience: int = _default("health.patience")

    def check(self) -> None:
        """Raise ConfigError for a threshold that no look can be held against."""
        every, logit, spikes = self.every_steps, self.max_attention_logit, self.max_spikes
        _require(every is None or every >= 1, "health.every_steps", every, "null, or 1 or more")
        _require(logit is None or (math.isfinite(logit) and logit > 0),
                 "health.max_attention_logit", logit, "null, or above 0")
        for name in ("min_relative_update", "min_branch_share"):
            share = getattr(self, name)
            _require(share is None or 0 < share < 1, f"health.{name}", share,
                     "null, or above 0 and below 1")
        _require(spikes is None or spikes >= 0, "health.max_spikes", spikes, "null, or 0 or more")
        _require(self.patience >= 1, "health.patience", self.patience, "1 or more")


@dataclass(kw_only=True)
class PipelineConfig:
    """Everything that decides a run. The resolved form is saved with it."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig | None = None
    gates: GatesConfig = field(default_factory=GatesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    carry: CarryConfig = field(default_factory=CarryConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    hparams: str | None = _default("hparams")
    init_from: str | None = _default("init_from")
    model_factory: str | None = _default("model_factory")
    preset: str = _default("preset")
    strict_validation: bool = _default("strict_validation")
    eval_benchmarks: list[str] = _default("eval_benchmarks")
    checkpoint_dir: str = _default("checkpoint_dir")
    checkpoint_cache_dir: str | None = _default("checkpoint_cache_dir")
    grace_seconds: float = _default("grace_seconds")
    tracking_wait_seconds: float = _default("tracking_wait_seconds")
    rank_timeout_seconds: float = _default("rank_timeout_seconds")

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
        _require(self.grace_seconds > 0, "grace_seconds", self.grace_seconds, "above 0")
        _require(self.tracking_wait_seconds >= 0, "tracking_wait_seconds",
                 self.tracking_wait_seconds, "0 or more")
        _require(self.rank_timeout_seconds > 0, "rank_timeout_seconds",
                 self.rank_timeout_seconds, "above 0")
        for name in self.eval_benchmarks:
            _require(name.removesuffix(SAMPLE_SUFFIX) in BENCHMARK_NAMES, "eval_benchmarks", name,
                     f"one of {', '.join(BENCHMARK_NAMES)}")
        of_scale = get_model_config(training.model_scale)
        _require(
            model == of_scale or model.name != of_scale.name,
            "model.name",
            model.name,
            "a name of its own: the model differs from the scale's, whose registry it would enter",
        )
        _require(
            (data.max_seq_length or 0) <= model.max_position_embeddings,
            "training.data.max_seq_length",
            data.max_seq_length,
            f"at most the context of {model.name}, {model.max_position_embeddings}",
        )
        return resolved


def get_model_config(scale: ModelScale) -> ModelConfig:
    """Return the architecture of a scale, from `conf/scale/`."""
    return ModelConfig(**read_group("scale", scale.value)["model"])


def _training_of(scale: ModelScale) -> dict[str, Any]:
    """Return what `conf/scale/` says of training at a scale, other than which scale it is."""
    enums = {"weight_precision": WeightPrecision, "moment_precision": MomentPrecision}
    return {
        name: enums[name](value) if name in enums else value
        for name, value in read_group("scale", scale.value)["training"].items()
        if name != "model_scale"
    }


def _default_data() -> DataConfig:
    data = default_tree()["training"]["data"]
    return DataConfig(recipe=data["recipe"], purpose=data["purpose"])


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value}: must be {allowed}")
