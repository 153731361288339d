"""Peak memory of a training run, predicted from its shape.

Each term is a tensor that a step really holds, at the moment when most is held. Written out for
the uncompiled model, which is the larger case; `svend bench memory` holds the sum against what
PyTorch's tracker counts and what a process takes. Symbols: d hidden size, f feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from svend.models.attention import QUERY_BLOCK
from svend.models.loss import CHUNK_ROWS, SLICE_ROWS
from svend.pipeline.config import (
    CheckpointingPolicy,
    ModelConfig,
    MomentPrecision,
    Optimizer,
    Precision,
    TrainingConfig,
    WeightPrecision,
)

FP32_BYTES = 4
HEAD_SIZE = 64
# Of AdamW's two moments together, per weight of a matrix; a scale in fp32 per block of them.
MOMENT_BYTES = {
    MomentPrecision.FP32: 8.0,
    MomentPrecision.BF16: 4.0,
    MomentPrecision.INT8: 2 * (1 + FP32_BYTES / 256),
    MomentPrecision.INT4: 2 * (0.5 + FP32_BYTES / 128),
}
# What the allocator holds beyond the tensors. On CPU up to 0.29 over two steps, with 2% of the peak
# between runs of the same settings (docs/scaling.md); on CUDA assumed.
ALLOCATOR_SHARE = {"cpu": 0.35, "cuda": 0.03}


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak, in bytes, by what holds it at that moment.

    logits: the head's, the gradients made beside them, and what these are summed in. buffers:
    copies of weights in the precision computed in (or gathered from other processes), what one
    block's backward pass works with, and tables. snapshot: what is saved while training goes on;
    0 where training waits. overhead: what the allocator holds beyond the tensors.
    """

    process: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    snapshot: int = 0
    allocator_share: float = 0.0

    @property
    def tensors(self) -> int:
        """Bytes in tensors."""
        return (self.weights + self.gradients + self.optimizer + self.activations + self.logits
                + self.buffers + self.snapshot)

    @property
    def overhead(self) -> int:
        """Bytes that the allocator holds beyond the tensors."""
        return round(self.allocator_share * self.tensors)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.process + self.tensors + self.overhead

    def parts(self) -> dict[str, int]:
        """Return the parts that are there, by name; they sum to the total."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers",
                 "snapshot", "overhead", "process")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def predict_memory(
    model: ModelConfig,
    training: TrainingConfig,
    process_bytes: int,
    *,
    device_type: str = "cpu",
    shards: int = 1,
    kernel_bytes: bool = True,
) -> MemoryPlan:
    """Predict the peak memory of training this model in one process.

    process_bytes: what the process holds before the model exists (on CUDA: the context). shards:
    processes that share one copy of weights, gradients and optimizer state (fully sharded).
    kernel_bytes: count what attention's kernel takes inside, which a tracker of tensors cannot see.
    """
    shape = _Shape(model, training, device_type, shards, kernel_bytes)
    # At the end of the forward pass, in the loss's backward pass, in that of the last block, and,
    # where a step is one micro-batch, of the first, when gradients are there and activations gone.
    whole, none = _gradient_bytes(shape), 0
    before = whole if training.gradient_accumulation_steps > 1 or shards > 1 else none
    kept, one_layer = shape.activation_bytes(), shape.kept_block_bytes()
    forward, backward = shape.copies_in_forward(), shape.copies_in_backward()
    moments = [
        (before, kept, shape.loss_forward_bytes(), forward),
        (before, kept, 0, forward + shape.block_forward_bytes()),
        (before, kept, shape.loss_backward_bytes(), backward),
        (before, kept, 0, backward + shape.block_backward_bytes()),
        (whole, one_layer, 0, shape.copies_of_block() + shape.block_backward_bytes()),
    ]
    gradients, activations, logits, buffers = max(moments, key=sum)
    return MemoryPlan(
        process=process_bytes,
        weights=_weight_bytes(shape),
        gradients=gradients,
        optimizer=_optimizer_bytes(shape),
        activations=activations,
        logits=logits,
        buffers=buffers + shape.table_bytes(),
        allocator_share=ALLOCATOR_SHARE[device_type],
    )


def snapshot_bytes(model: ModelConfig, training: TrainingConfig) -> int:
    """Return the size of a copy of weights and optimizer state."""
    shape = _Shape(model, training, "cpu")
    return _weight_bytes(shape) + _optimizer_bytes(shape)


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


class _Shape:
    """The sizes that the terms are written in, and the terms of the forward and backward pass."""

    def __init__(
        self, model: ModelConfig, training: TrainingConfig, device_type: str, shards: int = 1,
        kernel_bytes: bool = True,
    ) -> None:
        length = training.data.max_seq_length
        assert length is not None  # set by PipelineConfig.resolve
        self.model, self.training, self.shards = model, training, shards
        self.on_cpu, self.kernel_bytes = device_type == "cpu", kernel_bytes
        self.length, self.tokens = length, training.batch_size * length
        self.d, self.f = model.hidden_size, model.intermediate_size
        self.heads, self.layers = model.num_attention_heads, model.num_hidden_layers
        self.kv = model.num_key_value_heads * model.head_size
        self.vectors = (2 * self.layers + 1) * self.d
        self.matrices = model.num_parameters() - self.vectors
        self.head = model.vocab_size * self.d
        self.block_matrices = (self.matrices - 2 * self.head) // self.layers
        self.width = FP32_BYTES if training.precision is Precision.FP32 else 2
        self.stored = (
            FP32_BYTES if training.weight_precision is WeightPrecision.FP32 else self.width
        )
        self.policy = (
            training.gradient_checkpointing_policy if training.gradient_checkpointing else None
        )

    def activation_bytes(self) -> int:
        """All blocks' and the final norm's, with the gradient of what the head was given."""
        end = self._norm_bytes() + self.width * self.d
        return self.layers * self.kept_block_bytes() + self.tokens * end

    def kept_block_bytes(self) -> int:
        """What a block keeps from the forward pass for the backward pass."""
        if self.policy is None:
            return self._block_bytes()
        kept = self.width * self.d  # its input
        if self.policy is CheckpointingPolicy.SELECTIVE:
            # What seven matrix products and attention give, and attention's normalisers.
            kept += self.width * (4 * self.d + 2 * self.kv + 2 * self.f) + FP32_BYTES * self.heads
        return self.tokens * kept

    def _block_bytes(self) -> int:
        # Attention: query, key, value, output with its normalisers; on CPU the output once more,
        # for the operator gives it by head. SwiGLU: gate, its silu, up, and their product.
        outputs = 2 if self.on_cpu else 1
        attention = (self.width * ((1 + outputs) * self.d + 2 * self.kv)
                     + FP32_BYTES * self.heads)
        feed_forward = self.width * 4 * self.f
        return self.tokens * (2 * self._norm_bytes() + attention + feed_forward)

    def _norm_bytes(self) -> int:
        """A token's input and its normalised form in fp32, and the output."""
        return (2 * FP32_BYTES + self.width) * self.d

    def _casts(self) -> bool:
        """Whether autocast makes copies of the weights; gathered weights are cast on the way."""
        return self.width < self.stored and self.shards == 1

    def copies_of_block(self) -> int:
        """A block's matrices, in the precision computed in; gathered, the next block's too."""
        if self.shards > 1:
            root = self.width * 2 * self.head
            return root + 2 * self.width * self.block_matrices
        return self.width * self.block_matrices if self._casts() else 0

    def copies_in_forward(self) -> int:
        """Autocast keeps every copy until it ends, which is behind the loss."""
        if self.shards > 1 or not self._casts():
            return self.copies_of_block()
        return self.width * (self.layers * self.block_matrices + self.head)

    def copies_in_backward(self) -> int:
        """The graph keeps the copies, but where a block is computed again."""
        if self.shards > 1 or not self._casts() or self.policy is not None:
            return self.copies_of_block()
        return self.width * self.layers * self.block_matrices

    def loss_forward_bytes(self) -> int:
        """A chunk of logits, and gradients.

        The head's gradient is a product for each chunk, and from the third on a sum in fp32.
        """
        chunks = -(-self.tokens // CHUNK_ROWS)
        rows, vocabulary = min(self.tokens, CHUNK_ROWS), self.model.vocab_size
        logits, product = rows * vocabulary * self.width, self.head * self.width
        wide = self.head * FP32_BYTES
        held = {1: 0, 2: product, 3: 2 * product}.get(chunks, wide + product)
        slices = 2 * min(rows, SLICE_ROWS) * vocabulary * FP32_BYTES
        summing = 0
        if chunks > 2:
            summing = 3 * product + (wide if self.width < FP32_BYTES else 0)
        # The head's input, beside the gradient of it.
        return self.tokens * self.width * self.d + max(
            logits + held + product,
            logits + held + slices,
            logits + summing,
        )

    def loss_backward_bytes(self) -> int:
        """The head's gradient summed, turned, and brought to the order of the weights, in fp32."""
        chunks = -(-self.tokens // CHUNK_ROWS)
        saved = {1: self.width, 2: 2 * self.width}.get(chunks, FP32_BYTES + self.width)
        return self.head * (saved + 3 * FP32_BYTES)

    def block_forward_bytes(self) -> int:
        """What the last block works with in the forward pass, where it is computed again later.

        Up and its product with the silu of gate, and that; the stream and its normalised form.
        """
        if self.policy is None:
            return 0
        kept_too = self.f if self.policy is CheckpointingPolicy.SELECTIVE else 0
        return self.tokens * self.width * (3 * self.f - kept_too + 2 * self.d)

    def block_backward_bytes(self) -> int:
        """A block computed again, and the larger of what its two parts work with."""
        recomputed = self._block_bytes() - self.kept_block_bytes()
        feed_forward = self.tokens * self.width * (2 * self.f + 2 * self.d)
        feed_forward += self.d * self.f * self._weight_gradient_bytes()
        # By then the feed-forward part's activations are gone.
        gone = self.tokens * (self.width * 4 * self.f + self._norm_bytes())
        gradient = recomputed + max(feed_forward, self._attention_backward_bytes() - gone)
        if self.shards > 1:
            # The block's gradient whole, as it is and in fp32 to be summed; and the head's.
            gradient += (self.width + FP32_BYTES) * self.block_matrices + self.width * self.head
        return gradient

    def _weight_gradient_bytes(self) -> int:
        """Of a matrix's gradient: as computed, and in fp32 where the weights are."""
        return self.width + (FP32_BYTES if self._casts() else 0)

    def _attention_backward_bytes(self) -> int:
        """Gradients of query, key and value, and what the kernel works with."""
        gradients = self.tokens * self.width * (2 * self.d + 2 * self.kv)
        if not self.kernel_bytes:
            return gradients
        if not self.on_cpu:
            # FlashAttention 2: the query's gradient in fp32, key's and value's for every head.
            return gradients + self.tokens * (FP32_BYTES + 2 * self.width) * self.d
        # A block of queries against the row: two forms in fp32, four in the precision computed in.
        scores = self.training.batch_size * self.heads * min(self.length, QUERY_BLOCK) * self.length
        return (gradients + self.tokens * 2 * FP32_BYTES * self.kv
                + scores * (2 * FP32_BYTES + 4 * self.width))

    def table_bytes(self) -> int:
        """Rotary tables, and the ids, labels, documents and starts of the batch."""
        return self.tokens * (2 * self.width * self.model.head_size + 4 * 8)


def _weight_bytes(shape: _Shape) -> int:
    return (shape.stored * shape.matrices + FP32_BYTES * shape.vectors) // shape.shards


def _gradient_bytes(shape: _Shape) -> int:
    """A gradient is kept as its weight is."""
    return _weight_bytes(shape)


def _optimizer_bytes(shape: _Shape) -> int:
    """AdamW's moments, or of the blocks' matrices Muon's one."""
    moments = MOMENT_BYTES[shape.training.moment_precision]
    of_matrices = moments * shape.matrices
    if shape.training.optimizer is Optimizer.MUON:
        between = shape.matrices - 2 * shape.head
        of_matrices = FP32_BYTES * between + moments * 2 * shape.head
    return round(of_matrices + 2 * FP32_BYTES * shape.vectors) // shape.shards
