"""Which steps may update the weights: none whose loss or gradient is not finite, or a spike.

It is decided and counted on the device, which nobody waits for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Accepted steps that a loss and a gradient norm are held against, and how many there must be.
WINDOW = 128
WARM_UP = 64
# Of the mean: in a window that hardly varies, rounding is no spike.
SMALLEST_DEVIATION = 1e-3


class StepGuard:
    """Accepts a step, or has it skipped, by its loss and the norm of its gradient.

    A spike is more than `deviations` standard deviations above the mean of the last `window`
    accepted steps, once there are `warm_up` of them: the rule of OLMo 2 (arXiv 2501.00656;
    `SkipStepOptimizer` in OLMo-core), but that what falls is no spike, and that a skipped step does
    not move what the next is held against. None for `deviations` accepts all that is finite.
    """

    def __init__(
        self,
        device: torch.device,
        deviations: float | None,
        window: int = WINDOW,
        warm_up: int = WARM_UP,
    ) -> None:
        self._deviations = deviations
        self._warm_up = warm_up
        # Losses and gradient norms of accepted steps, each over the oldest once all slots are full.
        self._accepted_2N = torch.zeros((2, window), device=device)
        self._slots_N = torch.arange(window, device=device)
        self._accepted_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def accept(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Return whether the step may update the weights, as a boolean on the device; count it.

        No tensor that was handed out before is changed.
        """
        step_2 = torch.stack([loss, gradient_norm]).detach().float()
        accepted = step_2.isfinite().all()
        if self._deviations is not None:
            accepted = accepted & ~self._is_spike(step_2, self._deviations)
        slot = self._accepted_steps % len(self._slots_N)
        taken_N = (self._slots_N == slot) & accepted
        self._accepted_2N = torch.where(taken_N, step_2[:, None], self._accepted_2N)
        self._accepted_steps = self._accepted_steps + accepted
        self.skipped_steps = self.skipped_steps + ~accepted
        self.skipped_in_a_row = torch.where(accepted, 0, self.skipped_in_a_row + 1)
        return accepted

    def last_accepted(self) -> tuple[float, float] | None:
        """Return loss and gradient norm of the last accepted step; waits for the device."""
        accepted = int(self._accepted_steps)
        if accepted == 0:
            return None
        loss, norm = self._accepted_2N[:, (accepted - 1) % len(self._slots_N)].tolist()
        return loss, norm

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the next decisions depend on, and the counts."""
        return {
            "accepted": self._accepted_2N.cpu(),
            "accepted_steps": self._accepted_steps.cpu(),
            "skipped_steps": self.skipped_steps.cpu(),
            "skipped_in_a_row": self.skipped_in_a_row.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        device = self._slots_N.device
        self._accepted_2N = state["accepted"].to(device)
        self._accepted_steps = state["accepted_steps"].to(device)
        self.skipped_steps = state["skipped_steps"].to(device)
        self.skipped_in_a_row = state["skipped_in_a_row"].to(device)

    def _is_spike(self, step_2: Tensor, deviations: float) -> Tensor:
        known_N = self._slots_N < self._accepted_steps
        count = known_N.sum()
        # Slots that are not known hold zeros.
        mean_2 = self._accepted_2N.sum(dim=1) / count.clamp(min=1)
        squares_2N = (self._accepted_2N - mean_2[:, None]).square()
        squares_2N = torch.where(known_N, squares_2N, 0.0)
        deviation_2 = (squares_2N.sum(dim=1) / (count - 1).clamp(min=1)).sqrt()
        deviation_2 = torch.maximum(deviation_2, SMALLEST_DEVIATION * mean_2.abs())
        above = (step_2 > mean_2 + deviations * deviation_2).any()
        return above & (count >= self._warm_up)
