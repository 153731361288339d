"""Looks at the health of a run, at intervals: what goes on in the model, and how far it moves.

A look changes nothing that training depends on, and is handed out as tensors on the device, which
nobody waits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svend.data.stream import Batch
from svend.device import autocast, to_device
from svend.models.inspection import Inspection, inspect_row
from svend.models.shards import local, sum_over_shards
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import Precision

# Of each parameter; more would not change what a look says.
SAMPLED_ENTRIES = 65_536


@dataclass(frozen=True)
class HealthReading:
    """What one look saw, by layer.

    relative_update_L: the norm of what the step changed over the norm of the weights before it, 0
    for a layer that it left alone. inspection: of the weights after it; None where the model is no
    ReasoningTransformer.
    """

    layers: tuple[str, ...]
    relative_update_L: Tensor
    inspection: Inspection | None


class HealthProbe:
    """Looks at a model in every step whose number is a multiple of `every_steps`."""

    def __init__(self, model: nn.Module, precision: Precision, every_steps: int) -> None:
        self._model = model
        self._precision = precision
        self._every_steps = every_steps
        self._weights = LayerWeights(model)

    def begin(self, step: int) -> Callable[[Batch], HealthReading] | None:
        """Return what ends the look at a step, None where none is due.

        Call this before the weights are updated, and what it returns after that, with a batch to
        look at the model on.
        """
        if step % self._every_steps:
            return None
        before = self._weights.sample()

        def end(batch: Batch) -> HealthReading:
            update_L = self._weights.relative_update(before)
            return HealthReading(self._weights.layers, update_L, self._inspect(batch))

        return end

    def _inspect(self, batch: Batch) -> Inspection | None:
        if not isinstance(self._model, ReasoningTransformer):
            return None
        device = local(self._model.head.weight).device
        with autocast(self._precision, device):
            return inspect_row(
                self._model, to_device(batch.tokens_BT[:1], device), batch.documents_BT
            )


class LayerWeights:
    """Samples of a model's weights by layer: block by block of a ReasoningTransformer, else by what
    the module holds directly.
    """

    def __init__(self, model: nn.Module) -> None:
        by_layer: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            layer = _layer_of(name, model)
            if layer is not None:
                by_layer.setdefault(layer, []).append(parameter)
        self.layers = tuple(by_layer)
        self._counts = [len(parameters) for parameters in by_layer.values()]
        self._parameters = [p for parameters in by_layer.values() for p in parameters]
        self._strides = [_stride(local(parameter)) for parameter in self._parameters]

    @torch.no_grad()
    def sample(self) -> list[Tensor]:
        """Return a copy of at most 65,536 entries of what is here of each parameter."""
        return [
            local(parameter).flatten()[::stride].to(torch.float32, copy=True)
            for parameter, stride in zip(self._parameters, self._strides, strict=True)
        ]

    @torch.no_grad()
    def relative_update(self, before: list[Tensor]) -> Tensor:
        """Return, by layer, the norm of the change since a sample over the sample's norm."""
        changes = torch._foreach_sub(self.sample(), before)
        return self._norms(changes) / self._norms(before)

    def _norms(self, sampled: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """Return an estimate of each layer's norm, in which an entry stands for its stride."""
        norms_P = torch.stack(torch._foreach_norm(sampled))
        strides_P = torch.tensor(self._strides, dtype=torch.float32)
        squares_P = norms_P.square() * to_device(strides_P, norms_P.device)
        layers = torch.split(squares_P, self._counts)
        squares_L = torch.stack([squares_P.sum() for squares_P in layers])
        return sum_over_shards(squares_L, self._parameters[0]).sqrt()


def _layer_of(name: str, model: nn.Module) -> str | None:
    """Return the layer of a parameter, by its name; None for one outside the blocks."""
    parts = name.split(".")
    if not isinstance(model, ReasoningTransformer):
        return parts[0]
    return f"layer_{int(parts[1]):02d}" if parts[0] == "blocks" else None


def _stride(parameter: Tensor) -> int:
    """Return the least stride that samples few enough entries and comes through all columns.

    One that shares a factor with the row's length would see the same few columns in each row.
    """
    stride = max(1, math.ceil(parameter.numel() / SAMPLED_ENTRIES))
    while math.gcd(stride, parameter.shape[-1] if parameter.dim() else 1) > 1:
        stride += 1
    return stride
