"""Attention within documents against the formula, written to be read."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svend.models import attention
from svend.models.attention import Layout, attend, document_offsets, document_starts

# Of the largest value; a bf16 number has 8 bits, and probabilities and sums are rounded to it.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def reference(q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, documents_BT: Tensor) -> Tensor:
    """Each query looks at every key; those of other documents and of later positions are hidden."""
    group = q_BHTS.shape[1] // k_BKTS.shape[1]
    k_BHTS, v_BHTS = k_BKTS.repeat_interleave(group, 1), v_BKTS.repeat_interleave(group, 1)
    scores_BHTT = q_BHTS @ k_BHTS.mT / math.sqrt(q_BHTS.shape[-1])
    index_T = torch.arange(q_BHTS.shape[2])
    later_TT = index_T[None, :] > index_T[:, None]
    other_BTT = documents_BT[:, :, None] != documents_BT[:, None, :]
    return scores_BHTT.masked_fill((later_TT | other_BTT)[:, None], -math.inf).softmax(-1) @ v_BHTS


def draw(
    batch: int, length: int, kv_heads: int, group: int, size: int, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and the output's gradient, and documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    tensors = [torch.randn(batch, n, length, size, generator=generator) for n in heads]
    begins_BT = torch.rand(batch, length, generator=generator) < 0.2
    return tensors, begins_BT.cumsum(dim=1)


def outputs_and_gradients(tensors: list[Tensor], run: object) -> list[Tensor]:
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in tensors[:3])
    out = run(q, k, v)  # type: ignore[operator]
    out.backward(tensors[3].to(out.dtype))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 41), kv_heads=st.integers(1, 3),
    group=st.integers(1, 4), size=st.sampled_from([2, 6, 16, 64]), seed=st.integers(0, 2**31),
    block=st.sampled_from([1, 3, 8, 64]),
)
@example(batch=1, length=1, kv_heads=1, group=1, size=2, seed=0, block=1)
def test_output_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, batch: int, length: int, kv_heads: int, group: int, size: int, seed: int,
    block: int,
) -> None:
    tensors, documents_BT = draw(batch, length, kv_heads, group, size, seed)
    tensors = [tensor.to(dtype) for tensor in tensors]
    starts_BT = document_starts(documents_BT)
    exact = outputs_and_gradients(
        [tensor.float() for tensor in tensors],
        lambda q, k, v: reference(q, k, v, documents_BT),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        ours = outputs_and_gradients(
            tensors, lambda q, k, v: attend(q, k, v, Layout(starts_BT, None), 0.0, fused=False)
        )
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype is dtype
        scale = max(1.0, float(theirs.abs().max()))
        assert float((mine.float() - theirs).abs().max()) <= TOLERANCE[dtype] * scale


def run(starts_BT: Tensor, fused: bool, *qkv: Tensor) -> Tensor:
    return attend(*qkv, Layout(starts_BT, None), 0.0, fused)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_the_compiled_backward_pass_gives_the_eager_ones_gradients(dtype: torch.dtype) -> None:
    for length, seed in ((300, 1), (513, 2)):
        tensors, documents_BT = draw(2, length, 2, 4, 32, seed)
        tensors = [tensor.to(dtype) for tensor in tensors]
        starts_BT = document_starts(documents_BT)
        eager, fused = (
            outputs_and_gradients(tensors, partial(run, starts_BT, fused))
            for fused in (False, True)
        )
        for mine, theirs in zip(fused, eager, strict=True):
            scale = max(1.0, float(theirs.abs().max()))
            assert float((mine - theirs).abs().max()) <= TOLERANCE[dtype] * scale


def test_nothing_of_another_document_is_read_and_no_gradient_reaches_it() -> None:
    tensors, _ = draw(1, 40, 1, 2, 8, 3)
    documents_BT = (torch.arange(40) >= 17).long()[None]
    starts_BT = document_starts(documents_BT)
    outputs = []
    for value in (-50.0, 50.0):
        q, k, v = (tensor.clone() for tensor in tensors[:3])
        k[:, :, :17], v[:, :, :17] = value, value
        outputs.append(attend(q, k, v, Layout(starts_BT, None), 0.0, fused=False))
    assert not torch.equal(outputs[0][:, :, :17], outputs[1][:, :, :17])
    assert torch.equal(outputs[0][:, :, 17:], outputs[1][:, :, 17:])
    k, v = (tensor.clone().requires_grad_() for tensor in tensors[1:3])
    attend(q, k, v, Layout(starts_BT, None), 0.0, fused=False)[:, :, 17:].sum().backward()
    for x in (k, v):
        assert x.grad is not None
        assert not x.grad[:, :, :17].any()
        assert x.grad[:, :, 17:].any()


def test_with_dropout_the_expectation_is_attention_without() -> None:
    tensors, documents_BT = draw(1, 9, 1, 2, 4, 5)
    starts_BT = document_starts(documents_BT)
    torch.manual_seed(0)
    q, k, v = (tensor.expand(2000, -1, -1, -1) for tensor in tensors[:3])
    dropped = attend(q, k, v, Layout(starts_BT.expand(2000, -1), None), 0.2, fused=False)
    kept = attend(*tensors[:3], Layout(starts_BT, None), 0.0, fused=False)
    assert bool((dropped[0] != kept[0]).any())
    torch.testing.assert_close(dropped.mean(0, keepdim=True), kept, atol=0.1, rtol=0)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 4), length=st.integers(1, 40), seed=st.integers(0, 999))
def test_offsets_are_where_documents_start_then_the_end(
    batch: int, length: int, seed: int
) -> None:
    _, documents_BT = draw(batch, length, 1, 1, 4, seed)
    offsets = document_offsets(document_starts(documents_BT)).tolist()
    expected = [
        row * length + at
        for row in range(batch) for at in range(length)
        if at == 0 or documents_BT[row, at] != documents_BT[row, at - 1]
    ]
    end = batch * length
    assert offsets == expected + [end] * (len(offsets) - len(expected))
    assert offsets[-1] == end
    assert len(offsets).bit_count() == 1
    assert len(offsets) <= 2 * (len(expected) + 1)
