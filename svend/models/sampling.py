"""From logits to a token: the likeliest one, or one drawn.

Shape suffixes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the likeliest. top_k: only so many of the likeliest are drawn from. top_p:
    only the likeliest that together have this probability are (Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0


def choose_tokens(logits_NV: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> list[int]:
    """Return a token for each row of logits, by a number in [0, 1) of the row's own.

    By the inverse of the distribution function, so that a row's token depends on its own logits
    and number alone.
    """
    if sampling.temperature == 0:
        greedy: list[int] = logits_NV.argmax(dim=-1).tolist()
        return greedy
    scaled_NV = logits_NV.float() / sampling.temperature
    ordered_NV, order_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
    probabilities_NV = ordered_NV.softmax(dim=-1)
    if sampling.top_k is not None:
        probabilities_NV[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1:
        # What lies before a token is less than top_p: the one that crosses it is in.
        before_NV = probabilities_NV.cumsum(dim=-1) - probabilities_NV
        total_N1 = probabilities_NV.sum(dim=-1, keepdim=True)
        probabilities_NV = torch.where(
            before_NV < sampling.top_p * total_N1, probabilities_NV, 0.0
        )
    cumulative_NV = probabilities_NV.cumsum(dim=-1)
    drawn_N1 = torch.tensor(uniforms, dtype=torch.float32, device=logits_NV.device)[:, None]
    places_N1 = torch.searchsorted(cumulative_NV, drawn_N1 * cumulative_NV[:, -1:], right=True)
    last_N1 = (probabilities_NV > 0).sum(dim=-1, keepdim=True) - 1
    places_N1 = torch.minimum(places_N1, last_N1)
    drawn: list[int] = order_NV.gather(-1, places_N1).squeeze(-1).tolist()
    return drawn


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that a seed and a position decide, and nothing else."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{position}".encode()) / 2**64
