"""The loss on held-out text, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from svend.data.stream import Batch
from svend.device import autocast, to_device
from svend.errors import DataError
from svend.evaluation.measurement import Measurement, Values, bootstrap
from svend.pipeline.config import Precision


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean negative log-likelihood in nats per predicted token, from sums over sequences.

    sums: the summed loss of each sequence. predicted: how many tokens each predicts.
    """

    sums: tuple[float, ...]
    predicted: tuple[int, ...]

    @classmethod
    def of(cls, measured: Iterable[tuple[float, int]]) -> HeldoutLoss:
        """Return the loss of sums and counts. Raises DataError if no token is predicted."""
        rows = list(measured)
        if not any(count for _, count in rows):
            raise DataError(
                "the held-out part predicts no token; give longer held-out documents, and ones in "
                "which the model speaks where data.loss_on=answers"
            )
        return cls(tuple(summed for summed, _ in rows), tuple(count for _, count in rows))

    @property
    def tokens(self) -> int:
        """How many tokens are predicted in all."""
        return sum(self.predicted)

    @property
    def sequences(self) -> int:
        """How many sequences were measured."""
        return len(self.predicted)

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return sum(self.sums) / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss, infinite where that is too large."""
        return float(_exp(np.array(self.loss)))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """The loss in bits per byte of text: what compares across tokenizers."""
        return self.loss / math.log(2) / bytes_per_token

    def measurements(self) -> dict[str, Measurement]:
        """Return loss and perplexity as gates name them, with bootstrap intervals.

        Whole sequences are drawn anew: their tokens are not independent of one another, they
        nearly are. The sample size is that of the sequences.
        """
        rows_N2 = np.array([self.sums, self.predicted], dtype=np.float64).T
        return {
            "loss": bootstrap(rows_N2, _mean_loss),
            "perplexity": bootstrap(rows_N2, lambda means: _exp(_mean_loss(means))),
        }


def measure_heldout_loss(
    model: nn.Module, batches: Iterable[Batch], precision: Precision, device: torch.device
) -> HeldoutLoss:
    """Measure the loss on held-out batches, best of one sequence each.

    Each batch weighs by its tokens. Raises DataError if no token is predicted.
    """
    return HeldoutLoss.of(sum_heldout_losses(model, batches, precision, device))


def sum_heldout_losses(
    model: nn.Module, batches: Iterable[Batch], precision: Precision, device: torch.device
) -> list[tuple[float, int]]:
    """Return, of each batch, the summed loss and how many tokens it predicts."""
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
    return [(float(summed), count) for summed, count in zip(sums, tokens, strict=True)]


def measure_gradient_norm(
    model: nn.Module, batches: Iterable[Batch], precision: Precision, device: torch.device
) -> float:
    """Measure the norm of the gradient of the mean loss over batches; leaves no gradient behind."""
    tokens = 0
    model.zero_grad(set_to_none=True)
    for batch in batches:
        with autocast(precision, device):
            loss = model(to_device(batch.tokens_BT, device), to_device(batch.labels_BT, device),
                         batch.documents_BT)
        loss.backward()
        tokens += batch.predicted_tokens
    if tokens == 0:
        raise DataError("the held-out part predicts no token; give longer held-out documents")
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) / tokens
    model.zero_grad(set_to_none=True)
    return norm


def _mean_loss(means: Values) -> Values:
    # A resample may have drawn only sequences that predict nothing: that gives no mean.
    with np.errstate(invalid="ignore"):
        return means[..., 0] / means[..., 1]


def _exp(value: Values) -> Values:
    with np.errstate(over="ignore"):
        return np.exp(value)
