"""The next token from logits: the likeliest, or drawn.

A row's random number is a function of its seed and its position alone, and every operation here
treats each row by itself: what is drawn does not depend on the other rows.

Shape suffixes: R rows, V vocabulary, B blocks of it, W tokens of a block, C candidates, the
likeliest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from svend.errors import ConfigError

# How many candidates top-p looks at first; a row whose nucleus is larger looks at more.
FIRST_CANDIDATES = 128
# Tokens of the vocabulary whose probabilities are summed before any is looked at by itself.
DRAW_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: by temperature, then of the top k, then of the top p.

    temperature: 0 takes the likeliest. top_k: of so many likeliest, None for all. top_p: of the
    fewest likeliest whose probability is at least so much (Holtzman et al. 2020, arXiv 1904.09751).
    Raises ConfigError for what is none.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature}: must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k}: must be at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p = {self.top_p}: must be above 0 and at most 1")


def choose_tokens(
    logits_RV: Tensor, sampling: Sampling, uniforms: Sequence[float]
) -> list[int]:
    """Return the next token of each row, given a number in [0, 1) for each. Waits for the device.

    Greedy choice takes no numbers.
    """
    if sampling.temperature == 0.0:
        # numpy's is twenty times as fast as torch's where both can.
        likeliest_R = (
            logits_RV.numpy().argmax(axis=-1) if logits_RV.device.type == "cpu"
            else logits_RV.argmax(dim=-1)
        )
        greedy: list[int] = likeliest_R.tolist()
        return greedy
    uniform_R1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)[:, None]
    scaled_RV = logits_RV / sampling.temperature
    vocabulary = scaled_RV.shape[1]
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        values_RC, ids_RC = scaled_RV.topk(sampling.top_k)
        mass_RC = _cumulative_probabilities(values_RC, values_RC)
        return _draw(mass_RC, ids_RC, uniform_R1, sampling.top_p)
    if sampling.top_p == 1.0:
        return _draw_from_all(scaled_RV, uniform_R1)
    return _draw_from_nucleus(scaled_RV, uniform_R1, sampling.top_p)


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that a seed and a position decide, and nothing else."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{position}".encode()) / 2**64


def _draw_from_all(scaled_RV: Tensor, uniform_R1: Tensor) -> list[int]:
    """Draw by inversion over the whole vocabulary: first a block of it, then a token in there."""
    rows = len(scaled_RV)
    filled_RV = F.pad(scaled_RV, (0, -scaled_RV.shape[1] % DRAW_BLOCK), value=-torch.inf)
    weight_RV = (filled_RV - filled_RV.amax(dim=-1, keepdim=True)).exp_()
    weight_RBW = weight_RV.view(rows, -1, DRAW_BLOCK)
    mass_RB = weight_RBW.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target_R1 = uniform_R1 * mass_RB[:, -1:]
    block_R1 = torch.searchsorted(mass_RB, target_R1, right=True).clamp_(max=mass_RB.shape[1] - 1)
    before_R1 = F.pad(mass_RB, (1, 0)).gather(1, block_R1)
    weight_RW = weight_RBW.take_along_dim(block_R1[:, :, None], dim=1)[:, 0]
    mass_RW = weight_RW.cumsum(dim=-1, dtype=torch.float64)
    # Of the sums' rounding, a target may lie past the block's last token that has any weight.
    last_R1 = torch.searchsorted(mass_RW, mass_RW[:, -1:].contiguous())
    within_R1 = torch.searchsorted(mass_RW, target_R1 - before_R1, right=True).minimum(last_R1)
    tokens: list[int] = (block_R1 * DRAW_BLOCK + within_R1)[:, 0].tolist()
    return tokens


def _draw_from_nucleus(scaled_RV: Tensor, uniform_R1: Tensor, top_p: float) -> list[int]:
    """Draw of the top p, without sorting the whole vocabulary where few tokens hold that much."""
    vocabulary = scaled_RV.shape[1]
    tokens: dict[int, int] = {}
    waiting, candidates = list(range(len(scaled_RV))), min(FIRST_CANDIDATES, vocabulary)
    while waiting:
        of_waiting_RV = scaled_RV[waiting]
        values_RC, ids_RC = of_waiting_RV.topk(candidates)
        mass_RC = _cumulative_probabilities(values_RC, of_waiting_RV)
        drawn = _draw(mass_RC, ids_RC, uniform_R1[waiting], top_p)
        whole = (mass_RC[:, -1] >= top_p).tolist()
        for place, token, holds in zip(waiting, drawn, whole, strict=True):
            if holds or candidates == vocabulary:
                tokens[place] = token
        waiting = [place for place in waiting if place not in tokens]
        candidates = min(candidates * 16, vocabulary)
    return [tokens[place] for place in range(len(scaled_RV))]


def _cumulative_probabilities(values_RC: Tensor, scaled_RV: Tensor) -> Tensor:
    """Return the summed probabilities of values in their order, of all those in scaled_RV."""
    log_z_R1 = scaled_RV.logsumexp(dim=-1, keepdim=True)
    return (values_RC - log_z_R1).exp().cumsum(dim=-1, dtype=torch.float64)


def _draw(mass_RC: Tensor, ids_RC: Tensor, uniform_R1: Tensor, top_p: float) -> list[int]:
    """Draw by inversion of the first candidates that hold `top_p` of all the candidates' mass."""
    last = mass_RC.shape[1] - 1
    kept_R1 = torch.full_like(uniform_R1, last, dtype=torch.int64)
    if top_p < 1.0:
        limit_R1 = torch.full_like(uniform_R1, top_p)
        kept_R1 = torch.searchsorted(mass_RC, limit_R1).clamp_(max=last)
    target_R1 = uniform_R1 * mass_RC.gather(1, kept_R1)
    drawn_R1 = torch.searchsorted(mass_RC, target_R1, right=True).minimum(kept_R1)
    tokens: list[int] = ids_RC.gather(1, drawn_R1)[:, 0].tolist()
    return tokens
