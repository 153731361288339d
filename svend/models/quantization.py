"""What rounding the weights to int8 costs in accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from svend.models.generation import Decoder
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import Precision


@dataclass(frozen=True)
class QuantizationLoss:
    """How the int8 model differs from the one that it was made of, on the same text.

    Losses are in nats per token. standard_error: of the difference, over texts (ratio estimator,
    Cochran 1977, section 6.3); infinite for a single text. equal_greedy: the share of places at
    which both would choose the same token.
    """

    loss: float
    int8_loss: float
    standard_error: float
    equal_greedy: float
    tokens: int

    @property
    def difference(self) -> float:
        """By how much int8's loss is higher, in nats per token."""
        return self.int8_loss - self.loss


@torch.no_grad()
def measure_quantization_loss(
    model: ReasoningTransformer, texts: Sequence[Sequence[int]], precision: Precision
) -> QuantizationLoss:
    """Compare int8 with the precision on held-out texts, token ids of at least two each.

    The numbers are those of decoding: int8 rounds each position by itself, however many go at once.
    """
    longest = max(map(len, texts))
    exact, rounded = (
        Decoder(model, lanes=1, max_length=longest, precision=precision, int8=int8)
        for int8 in (False, True)
    )
    sums: list[tuple[float, float, int, int]] = []
    for text in texts:
        labels_T = torch.tensor(text[1:], device=model.head.weight.device)
        exact_TV, rounded_TV = exact.score(text)[:-1], rounded.score(text)[:-1]
        loss, int8_loss = (
            float(torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum"))
            for logits_TV in (exact_TV, rounded_TV)
        )
        equal = int((exact_TV.argmax(-1) == rounded_TV.argmax(-1)).sum())
        sums.append((loss, int8_loss, equal, len(labels_T)))
    losses, int8_losses, equals, counts = zip(*sums, strict=True)
    total, n = sum(counts), len(texts)
    difference = (sum(int8_losses) - sum(losses)) / total
    squares = sum((i - o - difference * count) ** 2
                  for o, i, count in zip(losses, int8_losses, counts, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / total if n > 1 else math.inf
    return QuantizationLoss(
        sum(losses) / total, sum(int8_losses) / total, error, sum(equals) / total, total
    )
