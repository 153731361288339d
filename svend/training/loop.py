"""The training loop: a generator that yields once per optimizer step.

Whoever iterates decides when to log, evaluate, gate, save, go back or stop. The loop itself never
waits for the device: losses, norms and what the guard decided are handed out as tensors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from svend.data.stream import Batch
from svend.device import autocast, to_device
from svend.pipeline.config import TrainingConfig
from svend.training.clipping import clip_gradients
from svend.training.health import HealthProbe, HealthReading
from svend.training.optimizers import take_step
from svend.training.parallel import summing_gradients
from svend.training.state import TrainState


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    `loss` (nats per predicted token, over the whole step), `gradient_norm` (before clipping),
    `skipped_steps` (so far) and `skipped_in_a_row` (up to this step; 0 if it was not skipped) are
    scalars on the device: reading them waits for it. `learning_rate` is the schedule's, before the
    factors of the parametrisation. `tokens` counts the run's predicted tokens so far. `health` is
    there where a look was due.
    """

    step: int
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float
    tokens: int
    started_seconds: float
    skipped_steps: Tensor
    skipped_in_a_row: Tensor
    health: HealthReading | None = None


def train_steps(
    state: TrainState,
    training: TrainingConfig,
    total_steps: int,
    health: HealthProbe | None = None,
) -> Iterator[StepMetrics]:
    """Train until `total_steps`, yielding after each optimizer step.

    A step is `gradient_accumulation_steps` micro-batches, over all processes; its loss and gradient
    are means over all of their tokens, so that accumulation, and any number of processes, give the
    update of the one large batch. A step that the guard does not accept moves on in data and
    schedule, and leaves weights and optimizer as they are.
    """
    while state.step < total_steps:
        started_seconds = time.perf_counter()
        micro_batches = [next(state.stream) for _ in range(state.stream.passes)]
        with _stance_before(state.step + 1, state.device):
            loss, step_tokens = _accumulate_gradients(state, training, micro_batches)
        learning_rate = training.learning_rate * state.rate_factor
        end_look = None if health is None else health.begin(state.step + 1)
        gradient_norm = _update(state, loss, training.max_grad_norm)
        state.step += 1
        state.tokens += step_tokens
        yield StepMetrics(
            state.step, loss, gradient_norm, learning_rate, state.tokens, started_seconds,
            state.guard.skipped_steps, state.guard.skipped_in_a_row,
            None if end_look is None else end_look(micro_batches[0]),
        )


def runs_uncompiled(step: int, device: torch.device) -> bool:
    """Whether a step is computed as it is written, although the model's blocks are compiled.

    A CPU's compiler takes half a minute, and the first step a second: what a run begins with is
    seen before. On CUDA it might take memory that the compiled one does not.
    """
    return step == 1 and device.type == "cpu"


def _stance_before(step: int, device: torch.device) -> AbstractContextManager[None]:
    if runs_uncompiled(step, device):
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


def _accumulate_gradients(
    state: TrainState, training: TrainingConfig, micro_batches: list[Batch]
) -> tuple[Tensor, int]:
    """Run the micro-batches forward and backward; return the step's loss and token count."""
    state.model.train()
    step_tokens = state.ranks.sum_count(sum(batch.predicted_tokens for batch in micro_batches))
    loss = torch.zeros((), device=state.device)
    for number, batch in enumerate(micro_batches, 1):
        tokens_BT = to_device(batch.tokens_BT, state.device)
        labels_BT = to_device(batch.labels_BT, state.device)
        with summing_gradients(state.forward, last=number == len(micro_batches)):
            with autocast(training.precision, state.device):
                summed = state.forward(tokens_BT, labels_BT, batch.documents_BT)
            mean = summed / max(1, step_tokens)
            # Gradients become means over the processes, of what are shares of one mean.
            share = mean if state.ranks.size == 1 else mean * state.ranks.size
            (share if state.scaler is None else state.scaler.scale(share)).backward()
        loss += mean.detach()
    return state.ranks.sum_tensor(loss), step_tokens


def _update(state: TrainState, loss: Tensor, max_grad_norm: float) -> Tensor:
    """Clip, step the optimizer and the schedule; return the gradient norm before clipping."""
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    gradient_norm = clip_gradients(state.model.parameters(), max_grad_norm)
    # An overflow in fp16 makes the norm infinite: the guard skips the step, the scale is lowered.
    take_step(state.optimizer, state.guard.accept(loss, gradient_norm))
    if state.scaler is not None:
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.scheduler.step()
    return gradient_norm
