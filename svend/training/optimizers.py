"""AdamW, or Muon for the blocks' matrices beside it; weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from svend.errors import ConfigError
from svend.pipeline.config import Optimizer, TrainingConfig
from svend.training.muon import Muon

Parameters = list[nn.Parameter]


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the model's parameters.

    AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for the matrices between
    embedding and head and AdamW for the rest, at one learning rate: Muon's updates are scaled to
    the size that AdamW's have (Liu et al. 2025, arXiv 2502.16982). Matrices and embeddings decay;
    gains and other vectors do not.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if training.optimizer is Optimizer.ADAMW:
        return _adamw([p for _, p in named], training)
    between = {id(p) for name, p in named if p.dim() == 2 and name.startswith("blocks.")}
    if not between:
        raise ConfigError(
            "training.optimizer = muon: the model has no matrices under 'blocks.', which Muon is "
            "for; set training.optimizer=adamw"
        )
    muon = Muon(
        [p for _, p in named if id(p) in between],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
    )
    return OptimizerPair(muon, _adamw([p for _, p in named if id(p) not in between], training))


def _adamw(parameters: Parameters, training: TrainingConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


class OptimizerPair(torch.optim.Optimizer):
    """Two optimizers of different parameters, as one: its groups are theirs."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self._pair = (first, second)
        super().__init__(self._groups(), {})
        self.param_groups = self._groups()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step with both; a closure is not supported."""
        assert closure is None
        for optimizer in self._pair:
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
