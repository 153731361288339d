"""The architecture of a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from svend.pipeline.groups import ModelScale, read_group
from svend.pipeline.options.defaults import require

# What MLflow refuses in the name of a model or of a checkpoint, and @, which parts name and alias.
REFUSED_IN_NAMES = "/:.%\"'@"
LONGEST_NAME = 200  # its column in MLflow's database takes 256, with the step behind it


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
        name = self.name
        require(
            bool(name.strip()) and name.isprintable() and len(name) <= LONGEST_NAME
            and not set(name) & set(REFUSED_IN_NAMES),
            "model.name", repr(name[:LONGEST_NAME]),
            f"a name of up to {LONGEST_NAME} characters without {' '.join(REFUSED_IN_NAMES)}, "
            "which the registry takes",
        )
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                     "num_key_value_heads", "intermediate_size", "max_position_embeddings"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        require(
            self.hidden_size % self.num_attention_heads == 0 and self.head_size % 2 == 0,
            "model.hidden_size",
            self.hidden_size,
            f"an even multiple of model.num_attention_heads ({self.num_attention_heads})",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of model.num_attention_heads ({self.num_attention_heads})",
        )
        theta = self.rope_theta
        require(math.isfinite(theta) and theta > 0, "model.rope_theta", theta, "above 0")
        eps = self.rms_norm_eps
        require(math.isfinite(eps) and eps > 0, "model.rms_norm_eps", eps, "above 0")
        require(self.recommended_samples >= 1, "model.recommended_samples",
                self.recommended_samples, "at least 1")


def get_model_config(scale: ModelScale) -> ModelConfig:
    """Return the architecture of a scale, from `conf/scale/`."""
    return ModelConfig(**read_group("scale", scale.value)["model"])
