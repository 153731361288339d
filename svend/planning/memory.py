"""Peak memory of a training run, predicted from its shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

from svend.models.attention import QUERY_BLOCK
from svend.models.loss import CHUNK_ROWS, SLICE_ROWS
from svend.pipeline.config import CheckpointingPolicy, ModelConfig, Precision, TrainingConfig

FP32_BYTES = 4
HEAD_SIZE = 64
# Measured on CPU over hundreds of steps: what the allocator holds beyond the tensors.
FRAGMENTATION = 0.1


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak, in bytes, by what holds it."""

    process: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    snapshot: int = 0  # what is saved while training goes on; 0 where training waits

    @property
    def tensors(self) -> int:
        return (self.weights + self.gradients + self.optimizer + self.activations + self.head
                + self.snapshot)

    @property
    def total(self) -> int:
        return self.process + round((1 + FRAGMENTATION) * self.tensors)


def predict_memory(model: ModelConfig, training: TrainingConfig, process_bytes: int) -> MemoryPlan:
    """Predict the peak memory of training this model.

    `process_bytes` is what the process holds before the model exists (on CUDA: the context).
    fp32 weights and gradients and two AdamW moments are 16 bytes a parameter; lower precision
    adds a copy of the matrices in it. Activations count what each operation of a block keeps for
    its backward pass, uncompiled, which is the larger case; docs/experiments.md holds the
    prediction against the measurement.
    """
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    parameters = model.num_parameters()
    matrices = model.num_block_parameters() + model.vocab_size * model.hidden_size
    width = 4 if training.precision is Precision.FP32 else 2
    copies = 0 if training.precision is Precision.FP32 else width * matrices
    tokens = training.batch_size * length
    # One block of queries in attention's backward pass: two fp32 and four low-precision forms.
    scores = (training.batch_size * model.num_attention_heads * min(length, QUERY_BLOCK) * length
              * (2 * FP32_BYTES + 4 * width))
    return MemoryPlan(
        process=process_bytes,
        weights=FP32_BYTES * parameters + copies,
        gradients=FP32_BYTES * parameters,
        optimizer=2 * FP32_BYTES * parameters,
        activations=tokens * _activation_bytes_per_token(model, training, width) + scores,
        head=_head_bytes(model, tokens, width),
    )


def snapshot_bytes(model: ModelConfig) -> int:
    """Return the size of a copy of weights and AdamW state."""
    return 3 * FP32_BYTES * model.num_parameters()


def equivalent_model(model: ModelConfig, parameters: int) -> ModelConfig:
    """Return a model in the proportions of `model` that has as near as can be `parameters`."""

    def of_width(hidden_size: int) -> ModelConfig:
        heads = hidden_size // HEAD_SIZE
        return replace(
            model,
            hidden_size=hidden_size,
            num_hidden_layers=max(1, round(model.num_hidden_layers * hidden_size
                                           / model.hidden_size)),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=round(hidden_size * model.intermediate_size / model.hidden_size),
        )

    widths = range(HEAD_SIZE, 16384 + 1, HEAD_SIZE)
    return min(map(of_width, widths), key=lambda m: abs(m.num_parameters() - parameters))


def _activation_bytes_per_token(
    model: ModelConfig, training: TrainingConfig, width: int
) -> int:
    d, f = model.hidden_size, model.intermediate_size
    # Two norms keep three fp32 tensors each; attention keeps its input, query, output twice over,
    # and key and value at fewer heads; SwiGLU keeps four.
    norms = 2 * 3 * FP32_BYTES * d
    attention = 6 * width * d
    feed_forward = width * (d + 4 * f)
    block = norms + attention + feed_forward
    if not training.gradient_checkpointing:
        return model.num_hidden_layers * block
    kept = width * d
    if training.gradient_checkpointing_policy is CheckpointingPolicy.SELECTIVE:
        kv = model.num_key_value_heads * model.head_size
        kept += width * (4 * d + 2 * kv + 2 * f)
    return model.num_hidden_layers * kept + block


def _head_bytes(model: ModelConfig, tokens: int, width: int) -> int:
    """A chunk of logits, a slice of it in two fp32 forms, and the head's gradient.

    The gradient is there twice beside the parameter's own: the sum so far, and what is to be added.
    """
    logits = model.vocab_size * (
        min(tokens, CHUNK_ROWS) * width + min(tokens, SLICE_ROWS) * 2 * FP32_BYTES
    )
    return logits + (FP32_BYTES + width) * model.vocab_size * model.hidden_size
