"""Everything that moves in a run, and must come back for the run to go on as if uninterrupted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from svend import cuda
from svend.data.stream import BatchStream
from svend.errors import CheckpointError, UserError, one_line
from svend.models.shards import is_sharded
from svend.pipeline.config import Precision, TrainingConfig
from svend.training.guard import StepGuard
from svend.training.low_memory import prepare_weights
from svend.training.optimizers import build_optimizer
from svend.training.parallel import Ranks, replicate_model
from svend.training.schedules import learning_rate_factor
from svend.training.trend import LossTrend


@dataclass(frozen=True)
class Horizon:
    """What a run reached at its end, or would have at an earlier one: nats per held-out token.

    tokens: that it was shown up to there, as they are planned: padding and prompts are counted.
    """

    step: int
    tokens: int
    loss: float


@dataclass
class TrainState:
    """The model, what updates it, where it stands in the data, and the counts so far.

    rewinds: how often the run went back to a checkpoint because it diverged. horizons: those that
    were measured so far. forward: what is called to train the model: it, or DDP around it. ranks:
    the processes that train it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler | None
    stream: BatchStream
    guard: StepGuard
    trend: LossTrend
    device: torch.device
    forward: nn.Module
    ranks: Ranks
    step: int = 0
    tokens: int = 0
    rewinds: int = 0
    horizons: list[Horizon] = field(default_factory=list)

    @property
    def rate_factor(self) -> float:
        """The share of the learning rate that the schedule gives the next step.

        Every group of the optimizer has its own rate times this.
        """
        factor: float = self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
        return factor

    def extra_state(self) -> dict[str, Any]:
        """Return what is neither weights, optimizer nor scheduler, as plain values and tensors."""
        state: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "stream": self.stream.state_dict(),
            "guard": self.guard.state_dict(),
            "rewinds": self.rewinds,
            "trend": self.trend.state_dict(),
            "horizons": [asdict(horizon) for horizon in self.horizons],
            "rng_cpu": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["rng_cuda"] = cuda.random_state(self.device)
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take up where `extra_state` was taken.

        Raises CheckpointError for what it cannot have returned.
        """
        try:
            step, tokens, rewinds = int(state["step"]), int(state["tokens"]), int(state["rewinds"])
            self.stream.load_state_dict(state["stream"])
            self.guard.load_state_dict(state["guard"])
            if "trend" in state:  # not in checkpoints that are older than this field
                self.trend.load_state_dict(state["trend"])
            horizons = [Horizon(**horizon) for horizon in state.get("horizons", [])]
            torch.set_rng_state(state["rng_cpu"])
            if "rng_cuda" in state and self.device.type == "cuda":
                cuda.set_random_state(state["rng_cuda"], self.device)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise CheckpointError(
                f"the checkpoint's extra state does not fit this run "
                f"({type(error).__name__}: {one_line(error)[:200]}); resume from another"
            ) from None
        self.step, self.tokens, self.rewinds = step, tokens, rewinds
        self.horizons = horizons


def build_state(
    model: nn.Module,
    stream: BatchStream,
    training: TrainingConfig,
    total_steps: int,
    device: torch.device,
    ranks: Ranks = Ranks(),  # noqa: B008 - alone, and nothing in it changes
) -> TrainState:
    """Return the state before step 1, with the model moved to the device.

    Of several processes, each holds a part of a model that is sharded, else the whole model.
    """
    model.to(device)
    prepare_weights(model, training)
    replicated = ranks.size > 1 and not any(map(is_sharded, model.parameters()))
    forward = replicate_model(model) if replicated else model
    optimizer = build_optimizer(model, training)
    factor = partial(learning_rate_factor, total_steps=total_steps, training=training)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step))
    scaler = torch.amp.GradScaler(device.type) if training.precision is Precision.FP16 else None
    guard = StepGuard(device, training.skip_spike_deviations)
    trend = LossTrend(
        round(training.warmup_ratio * total_steps), round(training.decay_begins * total_steps)
    )
    return TrainState(
        model, optimizer, scheduler, scaler, stream, guard, trend, device, forward, ranks
    )
