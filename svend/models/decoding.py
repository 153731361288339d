"""The transformer's forward pass with a key/value cache, from weights laid out for it once.

Shape suffixes: N rows, one token each; L lanes; D hidden, H query heads, K key/value heads, G query
heads per key/value head, S head size, F feed-forward width, O a product's outputs, I its inputs,
C cached positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from svend.device import DTYPES, multiplies_in_bf16
from svend.models.transformer import Block, ReasoningTransformer, rotary_tables, rotate
from svend.pipeline.config import Precision

# Lengths of the cache that attention reads are rounded up to this.
LENGTH_STEP = 64
INT8_LARGEST = 127.0

# A linear layer's product with rows of inputs, (N, inputs) to (N, outputs).
Product = Callable[[Tensor], Tensor]


class Weights:
    """A matrix of a linear layer, laid out for products with few rows."""

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype, compute: torch.dtype) -> None:
        self._weight_OI = weight_OI.detach().to(dtype).to(compute)
        # On a CPU the transposed product is the faster one, but for a single row.
        self._transposed = weight_OI.device.type == "cpu" and compute is torch.float32

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self._transposed and x_NI.shape[0] > 1:
            return (self._weight_OI @ x_NI.T).T
        return F.linear(x_NI, self._weight_OI)


class Int8Weights:
    """A matrix in 8-bit integers with a scale for each output, rounded to the nearest."""

    def __init__(self, weight_OI: Tensor, compute: torch.dtype) -> None:
        weight_OI = weight_OI.detach().float()
        scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / INT8_LARGEST
        self._weight_OI = (weight_OI / scale_O1).round().to(torch.int8)
        self._scale_O = scale_O1.squeeze(1).to(compute)

    def __call__(self, x_NI: Tensor) -> Tensor:
        out_NO: Tensor = torch.ops.aten._weight_int8pack_mm(
            x_NI.contiguous(), self._weight_OI, self._scale_O
        )
        return out_NO


@dataclass(frozen=True)
class BlockWeights:
    """One block's matrices, those with the same input as one."""

    attention_norm_D: Tensor
    qkv: Product
    out: Product
    feed_forward_norm_D: Tensor
    gate_up: Product
    down: Product


class CachedTransformer:
    """The weights of a model as they are now, and a cache of keys and values for some lanes.

    With `precision` bf16 on a CPU that has no products in bf16, weights are rounded to bf16 and
    multiplied in fp32: never less exact than bf16, and many times faster.
    """

    def __init__(
        self, model: ReasoningTransformer, lanes: int, max_length: int, precision: Precision,
        int8: bool,
    ) -> None:
        config, device = model.config, model.head.weight.device
        self.config, self.device = config, device
        stored = DTYPES[precision]
        native = device.type == "cuda" or stored is torch.float32 or multiplies_in_bf16()
        compute = stored if native else torch.float32
        self.dtype = compute

        def lay_out(*matrices: Tensor) -> Product:
            weight_OI = torch.cat([matrix.detach() for matrix in matrices])
            return Int8Weights(weight_OI, compute) if int8 else Weights(weight_OI, stored, compute)

        self._embedding_VD = model.embedding.weight.detach().to(stored).to(compute)
        self._blocks = [_lay_out_block(block, lay_out) for block in model.blocks]
        self._final_norm_D = model.final_norm.weight.detach().float()
        self._head = lay_out(model.head.weight)
        self.max_length = -(-max_length // LENGTH_STEP) * LENGTH_STEP
        shape = (config.num_hidden_layers, lanes, config.kv_heads, self.max_length,
                 config.head_size)
        self._keys = torch.zeros(shape, dtype=compute, device=device)
        self._values = torch.zeros(shape, dtype=compute, device=device)

    def extend(self, lane: int, start: int, tokens: list[int]) -> Tensor:
        """Put tokens of one lane into the cache from a position on; return the last hidden state.

        Returns (1, D), normed. The shape of every product depends on this lane alone.
        """
        return self.extend_all(lane, start, tokens)[-1:]

    def extend_all(self, lane: int, start: int, tokens: list[int]) -> Tensor:
        """Do as `extend`, and return the normed hidden state of each token, (N, D)."""
        count, end = len(tokens), start + len(tokens)
        positions_N = torch.arange(start, end, device=self.device)
        key_C = torch.arange(end, device=self.device)
        mask_NC = torch.where(key_C <= positions_N[:, None], 0.0, -torch.inf).to(self.dtype)
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_size

        def attend(layer: int, q_NHS: Tensor, k_NKS: Tensor, v_NKS: Tensor) -> Tensor:
            keys_KCS = self._keys[layer, lane]
            values_KCS = self._values[layer, lane]
            keys_KCS[:, start:end] = k_NKS.transpose(0, 1)
            values_KCS[:, start:end] = v_NKS.transpose(0, 1)
            out_HNS = F.scaled_dot_product_attention(
                q_NHS.transpose(0, 1)[None],
                keys_KCS[None, :, :end].repeat_interleave(heads // kv_heads, dim=1),
                values_KCS[None, :, :end].repeat_interleave(heads // kv_heads, dim=1),
                attn_mask=mask_NC,
            )[0]
            return out_HNS.transpose(0, 1).reshape(count, heads * size)

        return self._forward(torch.tensor(tokens, device=self.device), positions_N, attend)

    def step(self, lanes: slice, tokens: list[int], lengths: list[int], longest: int) -> Tensor:
        """Put one token of each of some neighbouring lanes into the cache; return hidden states.

        lengths: how many tokens each lane has cached. longest: how much of the cache attention
        reads, at least the greatest length plus one. Returns (N, D), normed.
        """
        count = len(tokens)
        positions_N = torch.tensor(lengths, device=self.device)
        kept = min(self.max_length, -(-longest // LENGTH_STEP) * LENGTH_STEP)
        key_C = torch.arange(kept, device=self.device)
        mask_N11C = torch.where(
            key_C <= positions_N[:, None], 0.0, -torch.inf
        ).to(self.dtype)[:, None, None]
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_size
        rows_N = torch.arange(count, device=self.device)

        def attend(layer: int, q_NHS: Tensor, k_NKS: Tensor, v_NKS: Tensor) -> Tensor:
            keys_NKCS, values_NKCS = self._keys[layer, lanes], self._values[layer, lanes]
            keys_NKCS[rows_N, :, positions_N] = k_NKS
            values_NKCS[rows_N, :, positions_N] = v_NKS
            # The query heads of a group are queries of one key/value head: nothing is repeated.
            out_NKGS = F.scaled_dot_product_attention(
                q_NHS.reshape(count, kv_heads, heads // kv_heads, size),
                keys_NKCS[:, :, :kept], values_NKCS[:, :, :kept],
                attn_mask=mask_N11C.expand(-1, 1, heads // kv_heads, -1),
            )
            return out_NKGS.reshape(count, heads * size)

        return self._forward(torch.tensor(tokens, device=self.device), positions_N, attend)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the logits of hidden states, (N, V)."""
        return self._head(x_ND)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy what a lane has cached to another."""
        for cache in (self._keys, self._values):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    def _forward(
        self, tokens_N: Tensor, positions_N: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_size
        x_ND = self._embedding_VD[tokens_N]
        tables = rotary_tables(positions_N[None], size, self.config.rope_theta)
        # As (positions, 1, head size): the heads of a row turn by the same angle.
        cos_N1S, sin_N1S = (table[0].transpose(0, 1).to(self.dtype) for table in tables)
        for layer, block in enumerate(self._blocks):
            qkv_NO = block.qkv(self._norm(x_ND, block.attention_norm_D))
            split = [heads * size, kv_heads * size, kv_heads * size]
            q_NO, k_NO, v_NO = torch.split(qkv_NO, split, dim=1)
            attended_NO = attend(
                layer,
                rotate(q_NO.reshape(-1, heads, size), cos_N1S, sin_N1S),
                rotate(k_NO.reshape(-1, kv_heads, size), cos_N1S, sin_N1S),
                v_NO.reshape(-1, kv_heads, size),
            )
            x_ND = x_ND + block.out(attended_NO)
            gate_NF, up_NF = block.gate_up(
                self._norm(x_ND, block.feed_forward_norm_D)
            ).chunk(2, dim=1)
            x_ND = x_ND + block.down(F.silu(gate_NF) * up_NF)
        return self._norm(x_ND, self._final_norm_D)

    def _norm(self, x_ND: Tensor, weight_D: Tensor) -> Tensor:
        normed_ND = F.rms_norm(x_ND.float(), weight_D.shape, weight_D, self.config.rms_norm_eps)
        return normed_ND.to(self.dtype)


def _lay_out_block(block: torch.nn.Module, lay_out: Callable[..., Product]) -> BlockWeights:
    assert isinstance(block, Block)
    attention, feed_forward = block.attention, block.feed_forward
    return BlockWeights(
        attention_norm_D=block.attention_norm.weight.detach().float(),
        qkv=lay_out(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
        out=lay_out(attention.o_proj.weight),
        feed_forward_norm_D=block.feed_forward_norm.weight.detach().float(),
        gate_up=lay_out(feed_forward.gate_proj.weight, feed_forward.up_proj.weight),
        down=lay_out(feed_forward.down_proj.weight),
    )
