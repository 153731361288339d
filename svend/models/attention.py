"""Attention within documents: causal, and never across the boundary of two packed documents.

On CPU torch's own flash kernel is fast forward and slow backward, and takes a mask only whole.
Here it runs on blocks of queries, each against the keys from the start of the earliest document in
the block to the block's end: a row of short documents costs its documents, not its length squared.
The backward pass is FlashAttention's (Dao et al. 2022, arXiv 2205.14135, algorithm 4) in batched
matrix products: it stores the row's normaliser, not its probabilities.

Shape suffixes: B batch, T positions, H query heads, K key/value heads, S head size, G query heads
per key/value head, R queries of a block, N the queries of a block in all heads of a group, W keys
that a block sees, E ends of documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svend import cuda
from svend.device import to_device

QUERY_BLOCK = 256
# Where a block's keys start is rounded down to this: of few sizes, freed memory fits what is asked
# for next, and the library of matrix products builds few kernels.
KEY_STEP = 128


class Layout(NamedTuple):
    """Where the documents of a batch lie, for `attend`.

    starts_BT: the position in its row at which each position's document starts.
    offsets_E: on CUDA, where in the flattened batch each document starts; then the batch's end, as
    often as it takes to fill up to a power of two.
    """

    starts_BT: Tensor
    offsets_E: Tensor | None


def lay_out_documents(tokens_BT: Tensor, documents_BT: Tensor | None) -> Layout:
    """Return the layout, on the device of tokens_BT, of documents numbered along each row.

    documents_BT may be on the CPU: there, what it holds is known without waiting for the device.
    """
    device = tokens_BT.device
    if documents_BT is None:
        documents_BT = torch.zeros(tokens_BT.shape, dtype=torch.int64)
    starts_BT = document_starts(documents_BT)
    offsets_E = None
    if device.type == "cuda":
        offsets_E = to_device(document_offsets(starts_BT), device)
    return Layout(to_device(starts_BT, device), offsets_E)


def document_starts(documents_BT: Tensor) -> Tensor:
    """Return the position in its row at which each position's document starts."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return torch.where(starts_BT, index_T, 0).cummax(dim=1).values


def document_offsets(starts_BT: Tensor) -> Tensor:
    """Return `Layout.offsets_E`. A power of two: few lengths, so few compilations."""
    index_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    first_N = (starts_BT == index_T).flatten().nonzero().squeeze(1)
    filled = 2 ** math.ceil(math.log2(len(first_N) + 1))
    offsets_E = first_N.new_full((filled,), starts_BT.numel())
    offsets_E[: len(first_N)] = first_N
    return offsets_E.int()


def attend(
    q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, layout: Layout, dropout: float, fused: bool
) -> Tensor:
    """Return attention of each query to the keys of its document up to itself, as q_BHTS is.

    By blocks on CPU, by torch's variable-length flash attention on CUDA, and where neither can
    (dropout, fp32 on CUDA) with a mask. `fused` compiles the elementwise part of the CPU's
    backward pass.
    """
    starts_BT, offsets_E = layout
    if q_BHTS.device.type == "cpu" and dropout == 0.0:
        out_BHTS: Tensor = _attend_blockwise(q_BHTS, k_BKTS, v_BKTS, starts_BT, fused)[0]
        return out_BHTS
    if offsets_E is not None and dropout == 0.0 and q_BHTS.dtype != torch.float32:
        return _attend_varlen(q_BHTS, k_BKTS, v_BKTS, offsets_E)
    group = q_BHTS.shape[1] // k_BKTS.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTS,
        k_BKTS.repeat_interleave(group, dim=1),
        v_BKTS.repeat_interleave(group, dim=1),
        attn_mask=_mask(starts_BT, slice(0, q_BHTS.shape[2]), 0, q_BHTS.dtype)[:, None],
        dropout_p=dropout,
    )


def _attend_varlen(q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, offsets_E: Tensor) -> Tensor:
    batch, _, length, _ = q_BHTS.shape
    q_NHS, k_NKS, v_NKS = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTS, k_BKTS, v_BKTS))
    out_NHS = cuda.attend_varlen(q_NHS, k_NKS, v_NKS, offsets_E, length)
    return out_NHS.view(batch, length, *out_NHS.shape[1:]).transpose(1, 2)


def seen_keys(starts_BT: Tensor, queries: slice, first_key: int) -> Tensor:
    """Return which keys from `first_key` on each query of a block sees, (batch, queries, keys)."""
    key_W = torch.arange(first_key, queries.stop, dtype=torch.int32, device=starts_BT.device)
    query_R1 = key_W[queries.start - first_key :, None]
    return (key_W <= query_R1) & (key_W >= starts_BT[:, queries, None].int())


def _mask(starts_BT: Tensor, queries: slice, first_key: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a block, (batch, queries, keys): 0 or minus infinity."""
    seen_BRW = seen_keys(starts_BT, queries, first_key)
    # Filled where they are: a tensor of numbers from here would be waited for on CUDA.
    seen, unseen = (seen_BRW.new_full((), value, dtype=dtype) for value in (0.0, -math.inf))
    return torch.where(seen_BRW, seen, unseen)


def _blocks(starts_BT: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and the keys that any of them sees.

    The last first: of sizes that are equal at first the compiler would take that they always are.
    """
    length = starts_BT.shape[1]
    firsts_T = starts_BT.amin(dim=0)
    for start in reversed(range(0, length, QUERY_BLOCK)):
        stop = min(length, start + QUERY_BLOCK)
        first_key = int(firsts_T[start:stop].min()) // KEY_STEP * KEY_STEP
        yield slice(start, stop), slice(first_key, stop)


# An operator of its own, for the compiler must not trace through sizes that the data decide.
@torch.library.custom_op("svend::attend_blockwise", mutates_args=(), device_types="cpu")
def _attend_blockwise(
    q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, starts_BT: Tensor,
    fused: bool,  # noqa: ARG001  (for the backward pass)
) -> tuple[Tensor, Tensor]:
    """Return the output, and the logarithm of each row's normaliser, (batch, heads, positions)."""
    out_BHTS = torch.empty_like(q_BHTS, memory_format=torch.contiguous_format)
    log_z_BHT = torch.empty(q_BHTS.shape[:3], dtype=torch.float32)
    for queries, keys in _blocks(starts_BT):
        out_BHTS[:, :, queries], log_z_BHT[:, :, queries] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BHTS[:, :, queries], k_BKTS[:, :, keys], v_BKTS[:, :, keys],
                attn_mask=_mask(starts_BT, queries, keys.start, q_BHTS.dtype)[:, None],
            )
        )
    return out_BHTS, log_z_BHT


@_attend_blockwise.register_fake
def _(q_BHTS: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out_BHTS = torch.empty_like(q_BHTS, memory_format=torch.contiguous_format)
    return out_BHTS, q_BHTS.new_empty(q_BHTS.shape[:3], dtype=torch.float32)


def _score_gradients(
    scores_BKGRW: Tensor, grad_p_BKGRW: Tensor, log_z_BKGR: Tensor, grad_BKGRS: Tensor,
    out_BKGRS: Tensor, mask_BRW: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the probabilities, and the gradient of the unscaled scores, as the scores are."""
    dtype = scores_BKGRW.dtype
    p_BKGRW = scores_BKGRW.float().mul_(scale).add_(mask_BRW[:, None, None])
    p_BKGRW = p_BKGRW.sub_(log_z_BKGR[..., None]).exp_()
    delta_BKGR1 = (grad_BKGRS.float() * out_BKGRS.float()).sum(dim=-1, keepdim=True)
    grad_scores_BKGRW = grad_p_BKGRW.float().sub_(delta_BKGR1).mul_(p_BKGRW).mul_(scale)
    return p_BKGRW.to(dtype), grad_scores_BKGRW.to(dtype)


@cache
def _fused_score_gradients() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_score_gradients, dynamic=True)


@torch.library.custom_op("svend::attend_blockwise_backward", mutates_args=(), device_types="cpu")
def _attend_blockwise_backward(
    grad_BHTS: Tensor, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, starts_BT: Tensor,
    out_BHTS: Tensor, log_z_BHT: Tensor, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, size = q_BHTS.shape
    kv_heads = k_BKTS.shape[1]
    score_gradients = _fused_score_gradients() if fused else _score_gradients
    grad_q_BHTS = torch.empty_like(q_BHTS, memory_format=torch.contiguous_format)
    # Summed over blocks, in fp32.
    grad_k_BKTS = torch.zeros(k_BKTS.shape, dtype=torch.float32)
    grad_v_BKTS = torch.zeros(v_BKTS.shape, dtype=torch.float32)
    for queries, keys in _blocks(starts_BT):
        rows = queries.stop - queries.start

        def by_group(x: Tensor, queries: slice = queries) -> Tensor:
            """Put the query heads that share a key head side by side: (B, K, N, ...)."""
            return x[:, :, queries].reshape(batch, kv_heads, -1, *x.shape[3:])

        def by_row(x: Tensor, rows: int = rows) -> Tensor:
            return x.view(batch, kv_heads, -1, rows, *x.shape[3:])

        q_BKNS, grad_BKNS, out_BKNS = by_group(q_BHTS), by_group(grad_BHTS), by_group(out_BHTS)
        k_BKWS, v_BKWS = k_BKTS[:, :, keys], v_BKTS[:, :, keys]
        # None is a view of a longer row, to whose length the compiler would bind itself.
        p_BKGRW, grad_s_BKGRW = score_gradients(
            by_row(q_BKNS @ k_BKWS.mT),
            by_row(grad_BKNS @ v_BKWS.mT),
            by_row(by_group(log_z_BHT)),
            by_row(grad_BKNS),
            by_row(out_BKNS),
            _mask(starts_BT, queries, keys.start, q_BHTS.dtype),
            1 / math.sqrt(size),
        )
        p_BKNW, grad_s_BKNW = p_BKGRW.flatten(2, 3), grad_s_BKGRW.flatten(2, 3)
        grad_v_BKTS[:, :, keys] += p_BKNW.mT @ grad_BKNS
        grad_k_BKTS[:, :, keys] += grad_s_BKNW.mT @ q_BKNS
        grad_q_BHTS[:, :, queries] = (grad_s_BKNW @ k_BKWS).view(batch, heads, rows, size)
    return grad_q_BHTS, grad_k_BKTS.to(k_BKTS.dtype), grad_v_BKTS.to(v_BKTS.dtype)


@_attend_blockwise_backward.register_fake
def _(
    _: Tensor, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, *__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    form = torch.contiguous_format
    return (
        torch.empty_like(q_BHTS, memory_format=form),
        torch.empty_like(k_BKTS, memory_format=form),
        torch.empty_like(v_BKTS, memory_format=form),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.fused = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(
    ctx: Any, grad_BHTS: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    grads = _attend_blockwise_backward(grad_BHTS, *ctx.saved_tensors, ctx.fused)
    return *grads, None, None


_attend_blockwise.register_autograd(_backward, setup_context=_save_for_backward)
