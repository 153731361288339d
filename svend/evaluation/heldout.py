"""The loss on held-out text, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from svend.data.stream import Batch
from svend.device import autocast, to_device
from svend.errors import DataError
from svend.pipeline.config import Precision

Z_95 = 1.96  # two-sided 95% of a normal distribution


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean negative log-likelihood in nats per token; standard error over sequences."""

    loss: float
    standard_error: float
    tokens: int
    sequences: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the loss."""
        return self.loss - Z_95 * self.standard_error, self.loss + Z_95 * self.standard_error

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """The loss in bits per byte of text: what compares across tokenizers."""
        return self.loss / math.log(2) / bytes_per_token

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        low, high = self.interval
        return _exp(low), _exp(high)


def measure_heldout_loss(
    model: nn.Module, batches: Iterable[Batch], precision: Precision, device: torch.device
) -> HeldoutLoss:
    """Measure the loss on held-out batches.

    Each batch weighs by its tokens. The standard error is the ratio estimator's (Cochran 1977,
    section 6.3) over batches, best of one sequence each: documents of a sequence are not
    independent, sequences nearly are. Raises DataError if no token is predicted.
    """
    was_training = model.training
    model.eval()
    sums, tokens = [], []
    try:
        # One context for all batches: the weights are turned into lower precision once.
        with torch.no_grad(), autocast(precision, device):
            for batch in batches:
                tokens_BT = to_device(batch.tokens_BT, device)
                labels_BT = to_device(batch.labels_BT, device)
                sums.append(model(tokens_BT, labels_BT, batch.documents_BT))
                tokens.append(batch.predicted_tokens)
    finally:
        model.train(was_training)
    if sum(tokens) == 0:
        raise DataError("the held-out part predicts no token; give longer held-out documents")
    return _ratio_estimate([float(summed) for summed in sums], tokens)


def _ratio_estimate(sums: list[float], tokens: list[int]) -> HeldoutLoss:
    total, n = sum(tokens), len(sums)
    loss = sum(sums) / total
    if n < 2:
        return HeldoutLoss(loss, math.inf, total, n)
    squares = sum((s - loss * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    return HeldoutLoss(loss, math.sqrt(squares * n / (n - 1)) / total, total, n)


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)
