"""What goes on inside a transformer: its attention, and the scale of its activations, by layer.

Block after block is computed as `transformer.py` does without dropout, eagerly whether or not the
model is compiled, with attention written out, for its scores are what is looked at.

Shape suffixes: those of transformer.py, L layers, and W keys, which are as many as the positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svend.device import to_device
from svend.models.attention import seen_keys
from svend.models.shards import gathered
from svend.models.transformer import Block, ReasoningTransformer

# What is written out grows with the square of the length.
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Inspection:
    """What one row shows of each layer; scalars per layer, on the device of the model.

    attention_logit_L: the largest |q k| / sqrt(head size), before the softmax. Entropies of heads
    are means over positions, each as a share of log(keys seen): 0 looks at one key, 1 at all alike;
    NaN where no position sees two keys. RMS over positions and hidden units: of the residual stream
    before the block, and of what each branch adds to it.
    """

    attention_logit_L: Tensor
    mean_head_entropy_L: Tensor
    min_head_entropy_L: Tensor
    residual_rms_L: Tensor
    attention_branch_rms_L: Tensor
    feed_forward_branch_rms_L: Tensor


@dataclass(frozen=True)
class OpenBlock:
    """What a block computes on a batch.

    x_BTD: the residual stream before it. seen_BTW: which keys each query sees. scores_BHTW: of each
    query and each key, seen or not, scaled, in fp32. attention_BTD, feed_forward_BTD: what the
    branches add.
    """

    x_BTD: Tensor
    seen_BTW: Tensor
    scores_BHTW: Tensor
    probabilities_BHTW: Tensor
    attention_BTD: Tensor
    feed_forward_BTD: Tensor


@torch.no_grad()
def inspect_row(
    model: ReasoningTransformer, tokens_BT: Tensor, documents_BT: Tensor
) -> Inspection:
    """Look at the first row of a batch, at no more than 512 of its positions.

    Neither waits for the device nor draws random numbers. Padding, whose document number is
    negative, does not count. documents_BT may be on the CPU.
    """
    tokens_1T, documents_1T = tokens_BT[:1, :MAX_POSITIONS], documents_BT[:1, :MAX_POSITIONS]
    real_1T = to_device(documents_1T >= 0, tokens_1T.device)
    layers = [_measure(block, real_1T) for block in open_blocks(model, tokens_1T, documents_1T)]
    return Inspection(*torch.stack(layers, dim=1))


def open_blocks(
    model: ReasoningTransformer, tokens_BT: Tensor, documents_BT: Tensor
) -> Iterator[OpenBlock]:
    """Yield what each block computes on a batch."""
    with gathered(model):
        x_BTD, cos_B1TS, sin_B1TS, layout = model.embed(tokens_BT, documents_BT)
    seen_BTW = seen_keys(layout.starts_BT, slice(0, tokens_BT.shape[1]), 0)
    for block in model.blocks:
        assert isinstance(block, Block)
        with gathered(block):
            opened = _open(block, x_BTD, (cos_B1TS, sin_B1TS), seen_BTW)
        yield opened
        x_BTD = x_BTD + opened.attention_BTD + opened.feed_forward_BTD


def _open(
    block: Block, x_BTD: Tensor, tables_B1TS: tuple[Tensor, Tensor], seen_BTW: Tensor
) -> OpenBlock:
    attention = block.attention
    q_BHTS, k_BKTS, v_BKTS = attention.project(block.attention_norm(x_BTD), *tables_B1TS)
    scores_BHTW, p_BHTW, out_BHTS = _attend(q_BHTS, k_BKTS, v_BKTS, seen_BTW)
    attention_BTD = block.residual_factor * attention.join(out_BHTS)
    feed_forward_BTD = block.residual_factor * block.feed_forward(
        block.feed_forward_norm(x_BTD + attention_BTD)
    )
    return OpenBlock(x_BTD, seen_BTW, scores_BHTW, p_BHTW, attention_BTD, feed_forward_BTD)


def _attend(
    q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, seen_BTW: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, probabilities, and the output of attention, the first two in fp32."""
    group = q_BHTS.shape[1] // k_BKTS.shape[1]
    # fp16 would overflow where a score is what it is looked at for; autocast would return to it.
    with torch.autocast(q_BHTS.device.type, enabled=False):
        k_BHWS = k_BKTS.float().repeat_interleave(group, dim=1)
        v_BHWS = v_BKTS.float().repeat_interleave(group, dim=1)
        scores_BHTW = q_BHTS.float() @ k_BHWS.mT / math.sqrt(q_BHTS.shape[-1])
        p_BHTW = scores_BHTW.masked_fill(~seen_BTW[:, None], -math.inf).softmax(dim=-1)
        out_BHTS = (p_BHTW @ v_BHWS).to(v_BKTS.dtype)
    return scores_BHTW, p_BHTW, out_BHTS


def _measure(block: OpenBlock, real_BT: Tensor) -> Tensor:
    """Return the fields of an Inspection, of one layer, in their order."""
    counted_BTW = block.seen_BTW & real_BT[..., None]
    logit = block.scores_BHTW.abs().masked_fill(~counted_BTW[:, None], 0.0).amax()
    entropy_H = _head_entropy(block.probabilities_BHTW, counted_BTW)
    scales = [
        _rms(x_BTD, real_BT) for x_BTD in (block.x_BTD, block.attention_BTD, block.feed_forward_BTD)
    ]
    return torch.stack([logit, entropy_H.mean(), entropy_H.amin(), *scales])


def _head_entropy(p_BHTW: Tensor, counted_BTW: Tensor) -> Tensor:
    """Return each head's entropy as a share of the largest possible, mean over positions."""
    keys_BT = counted_BTW.sum(dim=-1)
    # One key leaves no choice.
    chooses_BT = keys_BT > 1
    largest_BT = keys_BT.clamp(min=2).log()
    share_BHT = torch.special.entr(p_BHTW).sum(dim=-1) / largest_BT[:, None]
    total_H: Tensor = (share_BHT * chooses_BT[:, None]).sum(dim=(0, 2))
    return total_H / chooses_BT.sum()


def _rms(x_BTD: Tensor, real_BT: Tensor) -> Tensor:
    squares_BT = x_BTD.float().square().mean(dim=-1)
    return ((squares_BT * real_BT).sum() / real_BT.sum()).sqrt()
