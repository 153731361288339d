"""The shape of a transformer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from svend.pipeline.config import ModelConfig, Parametrisation, TrainingConfig


def feed_forward_width(hidden_size: int) -> int:
    """Return the width that SwiGLU has by default: 8/3, rounded up to a multiple of 64."""
    return -(-hidden_size * 8 // 3 // 64) * 64


@dataclass(frozen=True)
class BaseShape:
    """The shape at which CompleteP scales nothing; its feed-forward width is the default one."""

    width: int
    depth: int
    head_size: int

    @classmethod
    def of(cls, training: TrainingConfig) -> BaseShape | None:
        """Return the base that the configuration names; None for the standard parametrisation."""
        if training.parametrisation is Parametrisation.STANDARD:
            return None
        return cls(training.base_width, training.base_depth, training.base_head_size)


@dataclass(kw_only=True)
class TransformerConfig:
    """A decoder-only transformer of the Llama family.

    What is left at None follows from the hidden size: heads of 64, a quarter as many key/value
    heads where that divides, a feed-forward width of 8/3 rounded up to a multiple of 64.
    `tool_calling` says that the model is meant to be offered tools; it changes no weight. With a
    `base` the model is parametrised by CompleteP (`parametrisation.py`), else in the standard way.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int = 32768
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    tool_calling: bool = False
    base: BaseShape | None = None

    def __post_init__(self) -> None:
        self.heads = self.num_attention_heads or max(1, self.hidden_size // 64)
        quarter = self.heads // 4 if self.heads % 4 == 0 else self.heads
        self.kv_heads = self.num_key_value_heads or quarter
        self.ffn_size = self.intermediate_size or feed_forward_width(self.hidden_size)
        self.head_size = self.hidden_size // self.heads

    @classmethod
    def from_model_config(
        cls, model: ModelConfig, base: BaseShape | None = None
    ) -> TransformerConfig:
        """Return the transformer that `conf/scale/` describes, parametrised by CompleteP or not."""
        return cls(
            name=model.name,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
            rope_theta=model.rope_theta,
            rms_norm_eps=model.rms_norm_eps,
            base=base,
        )

    @classmethod
    def of_run(cls, model: ModelConfig, training: TrainingConfig) -> TransformerConfig:
        """Return the transformer that a run trains: parametrised and initialised as it says."""
        shape = cls.from_model_config(model, BaseShape.of(training))
        return replace(shape, initializer_range=training.init_std)

    def to_model_config(self, scale: ModelConfig) -> ModelConfig:
        """Return this transformer as `conf/scale/` would describe it, else like `scale`."""
        return replace(
            scale,
            name=self.name,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.ffn_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
        )
