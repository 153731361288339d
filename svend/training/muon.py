"""Muon, in the number format that the device multiplies fast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from svend.device import multiplies_in_bf16
from svend.models.shards import part_of, whole

# Of the quintic iteration; they steepen its slope at zero (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made nearly orthogonal (Jordan et al. 2024), for matrices.

    Steps are scaled to the size that AdamW's have (Liu et al. 2025, arXiv 2502.16982). It is
    `torch.optim.Muon` with `match_rms_adamw`, which iterates in bf16 whatever the machine: on a CPU
    without products in bf16 that takes many times as long as the model's own forward and backward.
    Matrices of one shape go through the iteration together; those that are sharded are gathered for
    it, and each process computes the same.

    parameters: matrices, or groups of them with settings of their own, as torch takes them.
    dtype: of the iteration; None for bf16, or fp32 on a CPU without products in bf16.
    found_inf: where it is 1, as torch's fused optimizers have it, a step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        on_cpu = all(p.device.type == "cpu" for p in self.param_groups[0]["params"])
        slow = on_cpu and not multiplies_in_bf16()
        self._dtype = dtype or (torch.float32 if slow else torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step; a closure is not supported."""
        assert closure is None
        skipped = None if self.found_inf is None else self.found_inf > 0
        for group in self.param_groups:
            # The two sides of a matrix may change places: a wide one is as good as a tall one.
            alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.shape
                    moved = whole(self._with_momentum(parameter, skipped))
                    key = (min(rows, columns), max(rows, columns))
                    alike[key].append((parameter, moved if rows <= columns else moved.T))
            for (_, larger), matrices in alike.items():
                steps_NRC = orthogonalize(
                    torch.stack([moved for _, moved in matrices]).to(self._dtype)
                )
                length = group["lr"] * 0.2 * larger**0.5
                for (parameter, _), step_RC in zip(matrices, steps_NRC, strict=True):
                    updated = parameter * (1 - group["lr"] * group["weight_decay"])
                    wide = parameter.shape == step_RC.shape
                    step = part_of(step_RC if wide else step_RC.T, parameter)
                    updated.add_(step, alpha=-length)
                    _put(parameter, updated, skipped)

    def _with_momentum(self, parameter: nn.Parameter, skipped: Tensor | None) -> Tensor:
        """Return the gradient with Nesterov's momentum."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        updated = state["momentum_buffer"].lerp(parameter.grad, 1 - MOMENTUM)
        _put(state["momentum_buffer"], updated, skipped)
        return parameter.grad.lerp(state["momentum_buffer"], MOMENTUM)


def _put(tensor: Tensor, updated: Tensor, skipped: Tensor | None) -> None:
    """Set a tensor to its update where the step is not skipped, by selection: 0 x NaN is NaN."""
    tensor.copy_(updated if skipped is None else torch.where(skipped, tensor, updated))


def orthogonalize(x_NRC: Tensor) -> Tensor:
    """Return wide matrices with singular values near 1 and the same singular vectors.

    A quintic Newton-Schulz iteration: x becomes a x + b (x x') x + c (x x')^2 x.
    """
    a, b, c = COEFFICIENTS
    x_NRC = x_NRC / x_NRC.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram_NRR = x_NRC @ x_NRC.mT
        gram_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, gram_NRR, x_NRC, beta=a)
    return x_NRC
