"""The decoder-only transformer that every scale is an instance of.

It is of the Llama family: RMSNorm before each block, rotary positions, SwiGLU, grouped-query
attention, no biases, an untied head.

Shape suffixes: B batch, T positions, D hidden, H query heads, K key/value heads, S head size,
F feed-forward width, V vocabulary, N batch and positions as one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from svend.models.attention import Layout, attend, lay_out_documents
from svend.models.config import TransformerConfig
from svend.models.loss import summed_linear_cross_entropy
from svend.models.parametrisation import ScalingRules, group_of, scaling_rules
from svend.models.shards import part_of
from svend.pipeline.config import CheckpointingPolicy


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019), computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def compile_whole(self) -> None:
        """Compile what training calls, as `Block.compile_whole` does."""
        self._compiled = torch.compile(self._norm, dynamic=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        compiled = self._compiled if torch.is_grad_enabled() else None
        return (compiled or self._norm)(x_BTD)

    def _norm(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.float()
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return (wide_BTD * scale_BT1 * self.weight).to(x_BTD.dtype)


def rotary_tables(positions_BT: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (batch, 1, positions, head size), in fp32.

    Su et al. 2021 (arXiv 2104.09864), with the halves of a head as the two coordinates, as in
    Hugging Face's Llama.
    """
    pairs = torch.arange(0, head_size, 2, device=positions_BT.device, dtype=torch.float32)
    angles = positions_BT.float()[:, None, :, None] * theta ** (-pairs / head_size)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTS: Tensor, cos_B1TS: Tensor, sin_B1TS: Tensor) -> Tensor:
    """Turn each pair of coordinates by its position's angle."""
    first, second = x_BHTS.chunk(2, dim=-1)
    turned_BHTS = torch.cat((-second, first), dim=-1)
    return (x_BHTS * cos_B1TS + turned_BHTS * sin_B1TS).to(x_BHTS.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention within documents."""

    def __init__(self, config: TransformerConfig, rules: ScalingRules) -> None:
        super().__init__()
        d, s = config.hidden_size, config.head_size
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, s
        self.dropout = config.attention_dropout
        self.query_factor = rules.attention
        self.q_proj = nn.Linear(d, self.heads * s, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * s, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * s, bias=False)
        self.o_proj = nn.Linear(self.heads * s, d, bias=False)

    def forward(
        self, x_BTD: Tensor, cos_B1TS: Tensor, sin_B1TS: Tensor, layout: Layout, fused: bool
    ) -> Tensor:
        q_BHTS, k_BKTS, v_BKTS = self.project(x_BTD, cos_B1TS, sin_B1TS)
        dropout = self.dropout if self.training else 0.0
        return self.join(attend(q_BHTS, k_BKTS, v_BKTS, layout, dropout, fused))

    def project(
        self, x_BTD: Tensor, cos_B1TS: Tensor, sin_B1TS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values by head, as attention takes them."""
        batch, length, _ = x_BTD.shape

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(batch, length, heads, self.head_size).transpose(1, 2)

        q_BTD = self.q_proj(x_BTD)
        if self.query_factor != 1.0:
            q_BTD = q_BTD * self.query_factor
        return (
            rotate(split(q_BTD, self.heads), cos_B1TS, sin_B1TS),
            rotate(split(self.k_proj(x_BTD), self.kv_heads), cos_B1TS, sin_B1TS),
            split(self.v_proj(x_BTD), self.kv_heads),
        )

    def join(self, out_BHTS: Tensor) -> Tensor:
        """Return what the heads give together."""
        out_BTD: Tensor = self.o_proj(out_BHTS.transpose(1, 2).flatten(2))
        return out_BTD


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.ffn_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out_BTD


class Block(nn.Module):
    """Attention, then feed-forward, each normed before, and scaled and added after.

    With `checkpointing`, training computes in the backward pass what the policy says, instead of
    keeping it.
    """

    def __init__(self, config: TransformerConfig, rules: ScalingRules) -> None:
        super().__init__()
        self.residual_factor = rules.residual
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, rules)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)
        self.checkpointing: CheckpointingPolicy | None = None
        self._compiled: Callable[..., Tensor] | None = None

    def compile_whole(self) -> None:
        """Compile what training calls; without gradients, compiling once more would gain nothing.

        Not the module's own call, in which a sharded block gathers its weights.
        """
        self._compiled = torch.compile(self._run, dynamic=False)

    def forward(
        self, x_BTD: Tensor, cos_B1TS: Tensor, sin_B1TS: Tensor, layout: Layout, fused: bool
    ) -> Tensor:
        compiled = self._compiled if torch.is_grad_enabled() else None
        return (compiled or self._run)(x_BTD, cos_B1TS, sin_B1TS, layout, fused)

    def _run(
        self, x_BTD: Tensor, cos_B1TS: Tensor, sin_B1TS: Tensor, layout: Layout, fused: bool
    ) -> Tensor:
        inputs = (x_BTD, cos_B1TS, sin_B1TS, layout, fused)
        if self.checkpointing is None or not self.training:
            return self._transform(*inputs)
        # The compiler takes a context_fn only as a constant.
        out_BTD: Tensor
        if self.checkpointing is CheckpointingPolicy.SELECTIVE:
            out_BTD = checkpoint(
                self._transform, *inputs, use_reentrant=False, context_fn=_keeping_products
            )
        else:
            out_BTD = checkpoint(self._transform, *inputs, use_reentrant=False)
        return out_BTD

    def _transform(
        self, x_BTD: Tensor, cos_B1TS: Tensor, sin_B1TS: Tensor, layout: Layout, fused: bool
    ) -> Tensor:
        normed_BTD = self.attention_norm(x_BTD)
        branch_BTD = self.attention(normed_BTD, cos_B1TS, sin_B1TS, layout, fused)
        x_BTD = torch.add(x_BTD, branch_BTD, alpha=self.residual_factor)
        branch_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        return torch.add(x_BTD, branch_BTD, alpha=self.residual_factor)


def _keeping_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Keep what matrix products and attention give; compute again what lies between."""
    import torch.nn.attention.varlen  # has its operator registered

    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts([  # type: ignore[no-untyped-call]
        torch.ops.aten.mm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.svend.attend_blockwise.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    ])
    return contexts


class ReasoningTransformer(nn.Module):
    """A transformer of one scale.

    `model(tokens_BT)` gives the logits; `model(tokens_BT, labels_BT)` the summed loss. Another
    `nn.Module` with this call signature trains, checkpoints and registers too.

    rules: how its shape scales it; None for those that the config's base gives.
    """

    def __init__(self, config: TransformerConfig, rules: ScalingRules | None = None) -> None:
        super().__init__()
        self.config = config
        self.rules = rules or scaling_rules(config)
        self.fused = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, self.rules) for _ in range(config.num_hidden_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if self.head.weight.device.type != "meta":
            self.initialize(torch.initial_seed())

    def initialize(self, seed: int) -> None:
        """Draw the weights anew: normal, with the deviations of the parametrisation.

        The same seed gives the same weights on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
                continue
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            std = self.rules.init_std[group_of(name, parameter)]
            drawn.normal_(0.0, std, generator=generator)
            with torch.no_grad():
                parameter.copy_(part_of(drawn, parameter))

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        documents_BT: Tensor | Layout | None = None,
    ) -> Tensor:
        """Return logits, (batch, positions, vocabulary), or with labels the summed loss in nats.

        tokens_BT: token ids. labels_BT: the id to predict at each position, -100 for none.
        documents_BT: the number of the document that each position belongs to; attention and
        positions then stay within a document. It may be on the CPU while the rest is on CUDA; or
        the layout that it gives (`lay_out_documents`), on the device of the rest.
        """
        x_ND = self.hidden_states(tokens_BT, documents_BT).flatten(0, 1)
        if self.rules.logits != 1.0:
            x_ND = x_ND * self.rules.logits  # as multiplying the logits, which are wider
        if labels_BT is None:
            return F.linear(x_ND, self.head.weight.to(x_ND.dtype)).view(*tokens_BT.shape, -1)
        return summed_linear_cross_entropy(
            x_ND, self.head.weight, labels_BT.flatten(), self.fused
        )

    def hidden_states(
        self, tokens_BT: Tensor, documents_BT: Tensor | Layout | None
    ) -> Tensor:
        """Return the normed hidden states before the head, (batch, positions, hidden)."""
        x_BTD, cos_B1TS, sin_B1TS, layout = self.embed(tokens_BT, documents_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_B1TS, sin_B1TS, layout, self.fused)
        out_BTD: Tensor = self.final_norm(x_BTD)
        return out_BTD

    def embed(
        self, tokens_BT: Tensor, documents_BT: Tensor | Layout | None
    ) -> tuple[Tensor, Tensor, Tensor, Layout]:
        """Return what the first block takes: embedded tokens, rotary tables, and the layout."""
        x_BTD: Tensor = self.embedding(tokens_BT)
        device_type = tokens_BT.device.type
        if torch.is_autocast_enabled(device_type):
            # The residual stream too: half the memory traffic, and fp32 where the norms need it.
            x_BTD = x_BTD.to(torch.get_autocast_dtype(device_type))
        layout = documents_BT
        if not isinstance(layout, Layout):
            layout = lay_out_documents(tokens_BT, layout)
        index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        positions_BT = index_T - layout.starts_BT
        tables = rotary_tables(positions_BT, self.config.head_size, self.config.rope_theta)
        cos_B1TS, sin_B1TS = (table.to(x_BTD.dtype) for table in tables)
        return x_BTD, cos_B1TS, sin_B1TS, layout

    def checkpoint_blocks(self, policy: CheckpointingPolicy | None) -> None:
        """Set what training computes again in the backward pass; None keeps everything."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.checkpointing = policy

    def compile_blocks(self) -> None:
        """Compile one block and use it for all, and fuse what surrounds them.

        Seconds instead of a compilation per layer.
        """
        self.fused = True
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_whole()
        self.final_norm.compile_whole()
