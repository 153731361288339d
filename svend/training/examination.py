"""What a step's batches do to a model, weight by weight: the evidence where training diverged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from svend.data.stream import Batch
from svend.device import autocast, to_device
from svend.models.shards import local, norm_over_shards, sum_over_shards
from svend.pipeline.config import Precision
from svend.training.state import TrainState


@dataclass(frozen=True)
class ParameterNorms:
    """Of one parameter, by its name: the norms of its gradient and its values, and what is bad."""

    name: str
    gradient_norm: float
    weight_norm: float
    nonfinite_gradients: int
    nonfinite_weights: int


@dataclass(frozen=True)
class Examination:
    """Losses (nats per predicted token) of micro-batches, and the norms of each parameter.

    The gradient is that of the mean over all tokens, before clipping.
    """

    losses: list[float]
    parameters: list[ParameterNorms]


def examine_step(
    state: TrainState, precision: Precision, micro_batches: Iterable[Batch]
) -> Examination:
    """Run a step's micro-batches forward and backward, and update nothing.

    Draws random numbers where the model does; leaves no gradients. Of several processes each is to
    examine the same micro-batches.
    """
    batches = list(micro_batches)
    step_tokens = max(1, sum(batch.predicted_tokens for batch in batches))
    # fp16 is without its loss scale lost below, and above where it is what overflowed.
    scale = 1.0 if state.scaler is None else state.scaler.get_scale()
    state.model.train()
    losses = []
    for batch in batches:
        with autocast(precision, state.device):
            summed = state.model(
                to_device(batch.tokens_BT, state.device), to_device(batch.labels_BT, state.device),
                batch.documents_BT,
            )
        (summed * (scale / step_tokens)).backward()
        losses.append(float(summed.detach()) / max(1, batch.predicted_tokens))
    with torch.no_grad():
        parameters = [
            _norms(name, parameter, scale) for name, parameter in state.model.named_parameters()
        ]
    state.optimizer.zero_grad(set_to_none=True)
    return Examination(losses, parameters)


def _norms(name: str, parameter: Tensor, scale: float) -> ParameterNorms:
    held = local(parameter)
    gradient = torch.zeros_like(held) if parameter.grad is None else local(parameter.grad) / scale
    nonfinite_2 = torch.stack([(~gradient.isfinite()).sum(), (~held.isfinite()).sum()])
    return ParameterNorms(
        name,
        float(norm_over_shards(gradient.norm(), parameter)),
        float(norm_over_shards(held.norm(), parameter)),
        *map(int, sum_over_shards(nonfinite_2, parameter)),
    )
