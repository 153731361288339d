"""AdamW, or Muon for the blocks' matrices beside it, each group with its own settings.

AdamW may keep weights and moments in fewer bits (`low_memory.py`, `quantized.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svend.device import can_compile
from svend.errors import ConfigError, ResourceError
from svend.models.parametrisation import (
    STANDARD_FACTORS,
    STANDARD_MUON,
    Factors,
    Group,
    group_of,
)
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import (
    Compile,
    MomentPrecision,
    Optimizer,
    TrainingConfig,
    WeightPrecision,
)
from svend.training.low_memory import LowMemoryAdamW, RoundedAdamW
from svend.training.muon import Muon

Named = list[tuple[str, nn.Parameter]]


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the model's parameters.

    AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for the matrices between
    embedding and head and AdamW for the rest, at one learning rate: Muon's updates are scaled to
    the size that AdamW's have (Liu et al. 2025, arXiv 2502.16982). Learning rate, weight decay and
    epsilon of each group of parameters are the configuration's times the factors of the model's
    parametrisation; gains and other vectors do not decay.
    """
    adamw, muon = STANDARD_FACTORS, STANDARD_MUON
    if isinstance(model, ReasoningTransformer):
        adamw, muon = model.rules.adamw, model.rules.muon
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if training.optimizer is Optimizer.ADAMW:
        return _adamw(named, adamw, training)
    between = {id(p) for name, p in named if p.dim() == 2 and group_of(name, p) in muon}
    if not between:
        raise ConfigError(
            "training.optimizer = muon: the model has no matrices under 'blocks.', which Muon is "
            "for; set training.optimizer=adamw"
        )
    matrices = [(name, p) for name, p in named if id(p) in between]
    rest = [(name, p) for name, p in named if id(p) not in between]
    groups = [
        {
            "params": parameters,
            "lr": training.learning_rate * of_group.learning_rate,
            "weight_decay": training.weight_decay * of_group.weight_decay,
        }
        for of_group, parameters in _alike(matrices, muon)
    ]
    first = Muon(groups, training.learning_rate, training.weight_decay)
    return OptimizerPair(first, _adamw(rest, adamw, training))


def _adamw(
    named: Named, factors: Mapping[Group, Factors], training: TrainingConfig
) -> torch.optim.Optimizer:
    groups = [
        {
            "params": parameters,
            "lr": training.learning_rate * of_group.learning_rate,
            "weight_decay": training.weight_decay * of_group.weight_decay,
            "eps": training.adam_epsilon * of_group.epsilon,
        }
        for of_group, parameters in _alike(named, factors)
    ]
    lr, betas = training.learning_rate, (training.adam_beta1, training.adam_beta2)
    moments = training.moment_precision
    if moments in (MomentPrecision.INT8, MomentPrecision.INT4):
        return _quantized_adamw(groups, training)
    if moments is MomentPrecision.BF16 or training.weight_precision is WeightPrecision.BF16:
        dtype = torch.bfloat16 if moments is MomentPrecision.BF16 else torch.float32
        return RoundedAdamW(groups, lr, betas, dtype, training.seed)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def _quantized_adamw(groups: list[dict[str, Any]], training: TrainingConfig) -> LowMemoryAdamW:
    if importlib.util.find_spec("torchao") is None:
        raise ResourceError(
            f"training.moment_precision = {training.moment_precision.value}: needs torchao; pip "
            "install 'svend[lowbit]', or set training.moment_precision=bf16"
        )
    from svend.training.quantized import AdamWInt4, AdamWInt8  # takes seconds

    kind = AdamWInt8 if training.moment_precision is MomentPrecision.INT8 else AdamWInt4
    # torchao has its step compiled, a kernel for each shape of a matrix.
    device = groups[0]["params"][0].device
    eager = training.compile is Compile.OFF or not can_compile(device)
    betas = (training.adam_beta1, training.adam_beta2)
    return kind(groups, training.learning_rate, betas, training.seed, eager=eager)


def _alike(
    named: Named, factors: Mapping[Group, Factors]
) -> list[tuple[Factors, list[nn.Parameter]]]:
    """Return the parameters by the factors that they share, matrices first."""
    alike: dict[Factors, list[nn.Parameter]] = {}
    for name, parameter in sorted(named, key=lambda pair: pair[1].dim() < 2):
        alike.setdefault(factors[group_of(name, parameter)], []).append(parameter)
    return list(alike.items())


def take_step(optimizer: torch.optim.Optimizer, accepted: Tensor) -> None:
    """Take a step, or none if `accepted` is false, as decided on the device.

    Then parameters, moments and counts stay as they are, bit for bit, whatever the gradients hold:
    the fused AdamW and ours look at `found_inf`, as for `torch.amp.GradScaler`. torchao's do not:
    for them the host waits for the decision, once a step.
    """
    if isinstance(optimizer, LowMemoryAdamW) and not optimizer.takes_found_inf:
        if bool(accepted):
            optimizer.step()
        return
    optimizer.found_inf = (~accepted).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.found_inf = None  # type: ignore[attr-defined]


class OptimizerPair(torch.optim.Optimizer):
    """Two optimizers of different parameters, as one: its groups are theirs."""

    found_inf: Tensor | None = None  # see take_step

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self._pair = (first, second)
        super().__init__(self._groups(), {})
        self.param_groups = self._groups()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step with both; a closure is not supported."""
        assert closure is None
        for optimizer in self._pair:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each, in their order."""
        first, second = (optimizer.state_dict() for optimizer in self._pair)
        return {"first": first, "second": second}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for optimizer, name in zip(self._pair, ("first", "second"), strict=True):
            optimizer.load_state_dict(state_dict[name])
        # Loading makes their groups anew.
        self.param_groups = self._groups()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._pair for group in optimizer.param_groups]
