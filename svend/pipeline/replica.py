"""What each process of a run has, and everything that they do together.

The functions here are what the first process has all of them call: each takes the replica of the
process that it runs in, and what else it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from svend.data.stream import Batch, PackedSequences
from svend.device import DTYPES, return_freed_memory
from svend.evaluation.heldout import HeldoutLoss, sum_heldout_losses
from svend.models import shards
from svend.models.shards import is_sharded, whole
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.checkpoints.metadata import read_metadata
from svend.pipeline.checkpoints.sharded import PartialSave, size_of
from svend.pipeline.checkpoints.states import load_parts
from svend.pipeline.config import PipelineConfig
from svend.pipeline.crew import Crew
from svend.training.examination import Examination, examine_step
from svend.training.health import HealthProbe
from svend.training.loop import StepMetrics, train_steps
from svend.training.schedules import learning_rate_factor
from svend.training.state import TrainState

# Held-out sequences: each would else take fresh memory beside what the ones before it freed.
BETWEEN_RETURNS = 4
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(kw_only=True)
class Replica:
    """The model and its state as one process holds them, and the data of which it takes a share.

    stages: the iterators of steps that are under way, a branch's behind the run's. partial: the
    parts of a checkpoint on their way. start: weights to begin with, where this process has them.
    """

    config: PipelineConfig
    device: torch.device
    sequences: PackedSequences
    heldout: PackedSequences
    state: TrainState
    total_steps: int
    crew: Crew
    stages: list[tuple[Iterator[StepMetrics], list[Any]]] = field(default_factory=list)
    partial: PartialSave | None = None
    written: Future[Any] | None = None
    start: Mapping[str, Tensor] | None = None
    background: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="parts")
    )

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model."""
        return any(map(is_sharded, self.state.model.parameters()))

    @property
    def sharing(self) -> str:
        """How many processes share the run, and what each holds; empty for one that is alone."""
        size = self.crew.size
        if size == 1:
            return ""
        if not self.sharded:
            return f"{size}, each with the whole model (ddp)"
        shards = self.config.training.shard_processes or size
        copies = "" if shards == size else f", in {size // shards} groups"
        return f"{size}, each with 1/{shards} of the model (fsdp){copies}"

    def call(
        self, operation: Callable[Concatenate[Replica, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Have every process run one of the functions below; only the first may call."""
        return self.crew.call(operation, self, *args, **kwargs)


def begin_stage(replica: Replica, last_step: int, decays_to: int | None, *, looks: bool) -> None:
    """Get ready to train until a step; `next_step` takes the steps.

    decays_to: the step at which a branch's learning rate reaches its minimum, never above the
    run's own. looks: whether health is looked at.
    """
    state, training = replica.state, replica.config.training
    of_run = state.scheduler.lr_lambdas
    if decays_to is not None:
        decay = partial(
            learning_rate_factor, total_steps=replica.total_steps, training=training, end=decays_to
        )
        lower = partial(_lower, of_run[0], decay)
        state.scheduler.lr_lambdas = [lower] * len(of_run)
    every_steps = replica.config.health.every_steps if looks else None
    probe = None if every_steps is None else HealthProbe(
        state.model, training.precision, every_steps
    )
    replica.stages.append((train_steps(state, training, last_step, probe), of_run))


def stage_steps(
    replica: Replica, last_step: int, *, decays_to: int | None = None, looks: bool = False
) -> Iterator[StepMetrics]:
    """Yield the steps up to the last, which all processes take; called by the first alone.

    Whoever leaves before the last, and goes on with the run, is to have all call `end_stage`.
    """
    replica.call(begin_stage, last_step, decays_to, looks=looks)
    while (metrics := replica.call(next_step)) is not None:
        yield metrics
    replica.call(end_stage)


def next_step(replica: Replica) -> StepMetrics | None:
    """Take a step; None behind the last."""
    steps, _ = replica.stages[-1]
    return next(steps, None)


def end_stage(replica: Replica) -> None:
    """Leave what `begin_stage` began."""
    _, of_run = replica.stages.pop()
    replica.state.scheduler.lr_lambdas = of_run


def measure_heldout(replica: Replica) -> HeldoutLoss:
    """Measure the loss on the run's held-out sequences, of which each process takes its share."""
    training, ranks = replica.config.training, replica.crew.ranks
    count = min(training.heldout_sequences, len(replica.heldout))
    # As many for each, for a sharded model needs all: the last again where there are too few.
    numbers = [min(n, count - 1) for n in range(ranks.rank, count + ranks.rank, ranks.size)]
    numbers += numbers[-1:] * (-(-count // ranks.size) - len(numbers))
    measured = sum_heldout_losses(
        replica.state.model, _heldout_batches(replica.heldout, numbers), training.precision,
        replica.device,
    )
    shards.reshard(replica.state.model)
    if ranks.size > 1:
        import torch.distributed as dist

        shares: list[Any] = [None] * ranks.size
        dist.all_gather_object(shares, measured, group=ranks.orders)
        measured = [shares[n % ranks.size][n // ranks.size] for n in range(count)]
    return HeldoutLoss.of(measured)


def _heldout_batches(heldout: PackedSequences, numbers: Sequence[int]) -> Iterator[Batch]:
    """Yield sequences one by one, and have what they leave free returned."""
    for place, number in enumerate(numbers):
        if place % BETWEEN_RETURNS == 0:
            return_freed_memory()
        yield heldout.batch(number, 1)


def count_nonfinite(replica: Replica) -> int:
    """Return how many of the model's weights are NaN or infinite."""
    return shards.count_nonfinite(replica.state.model)


def examine(replica: Replica, batch_size: int, firsts: list[int]) -> Examination:
    """Return what micro-batches, by their first sequences, do to the model."""
    batches = (replica.sequences.batch(first, batch_size) for first in firsts)
    return examine_step(replica.state, replica.config.training.precision, batches)


def load_state(replica: Replica, checkpoint: Path) -> None:
    """Bring model, optimizer, schedule and counts to where a verified checkpoint left them."""
    state = replica.state
    _, _, extra = load_parts(read_metadata(checkpoint), {
        "model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler,
        "scaler": state.scaler,
    })
    state.load_extra_state(extra)


def load_weights(replica: Replica, checkpoint: Path) -> None:
    """Give the model the weights of a verified checkpoint."""
    load_parts(read_metadata(checkpoint), {"model": replica.state.model})


def take_start(replica: Replica) -> None:
    """Give the model the weights that the first process has found to begin with."""
    if replica.crew.size == 1:
        assert replica.start is not None
        replica.state.model.load_state_dict(replica.start)
        replica.start = None
        return
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for name, tensor in replica.state.model.state_dict().items():
            given = torch.empty(tensor.shape) if replica.start is None else replica.start[name]
            given = given.to(tensor.device, tensor.dtype)
            if is_sharded(tensor):
                given = distribute_tensor(given, tensor.device_mesh, tensor.placements)
            else:
                dist.broadcast(given, 0)
            tensor.copy_(given)
    replica.start = None


def leave_out(replica: Replica, next_sequence: int) -> None:
    """Go on behind data that made the run diverge."""
    replica.state.stream.load_state_dict({"next_sequence": next_sequence})
    replica.state.rewinds += 1


def sharded_bytes(replica: Replica) -> int:
    """Return the size of what all processes write of a checkpoint."""
    state = replica.state
    return size_of({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()})


def begin_partial_save(replica: Replica, folder: Path) -> None:
    """Begin to write this process's part of a checkpoint into a folder."""
    if replica.written is not None:
        replica.written.result()
    state = replica.state
    states = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    replica.partial = PartialSave(folder, states, replica.crew.ranks)
    if not replica.crew.ranks.place.leads:
        # The first waits for its own where it writes what is not sharded.
        replica.written = replica.partial.result_in(replica.background)


def gather_model(replica: Replica) -> nn.Module | None:
    """Return a model that is whole, in the first process, to generate with.

    Of a sharded one it is a copy, its matrices in the precision that they are multiplied in.
    """
    model = replica.state.model
    if not replica.sharded:
        return model
    assert isinstance(model, ReasoningTransformer)
    leads, precision = replica.crew.ranks.place.leads, replica.config.training.precision
    weights = {}
    for name, parameter in model.named_parameters():
        gathered = whole(parameter.detach())  # by every process
        if leads:
            weights[name] = gathered.to(DTYPES[precision]) if gathered.dim() > 1 else gathered
    if not leads:
        return None
    with torch.device("meta"):
        copy = ReasoningTransformer(model.config, model.rules)
    copy.load_state_dict(weights, assign=True)
    return copy


def _lower(first: Any, second: Any, step: int) -> float:
    return min(float(first(step)), float(second(step)))
