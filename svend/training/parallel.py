"""Processes that train one model together: each computes a share of every step's sequences.

They hold the model whole (DDP, Li et al. 2020, arXiv 2006.15704) or in parts (FSDP2, `fully_shard`;
Zhao et al. 2023, arXiv 2304.11277), and add up the same numbers either way: a step is the one that
a single process would take, to rounding.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import SAC_IGNORED_OPS

from svend import cuda
from svend.errors import ResourceError, one_line
from svend.models.attention import lay_out_documents
from svend.models.shards import SHARD
from svend.models.transformer import ReasoningTransformer, RMSNorm
from svend.pipeline.config import Precision, TrainingConfig
from svend.ranks import Place, set_rendezvous

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]
    from torch.distributed.device_mesh import DeviceMesh

# For the next word of the process that leads, which may be measuring benchmarks meanwhile.
PATIENCE = timedelta(days=7)
# One process may be done writing to a slow disk so much later than another.
SAVING_SLACK = 6


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them; alone by default.

    store: where they leave notes. orders: the group in which the first tells the others what to do.
    saving: that of checkpoints, which are written meanwhile.
    """

    place: Place = Place()
    store: Store | None = None
    orders: ProcessGroup | None = None
    saving: ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """The number of this process, 0 for the one that leads."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.place.size

    def sum_count(self, count: int) -> int:
        """Return the sum of each process's count; waits for the others."""
        if self.size == 1:
            return count
        import torch.distributed as dist

        counts = torch.tensor(count)
        dist.all_reduce(counts)
        return int(counts)

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Return the sum of each process's tensor, which is changed; waits for no device."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor


_joined: Ranks | None = None
_given_up = False


def give_up() -> None:
    """Take it that the processes are not where they should be: nothing is ended in good order.

    To part from others that wait in the middle of something would be to wait for them.
    """
    global _given_up  # noqa: PLW0603
    _given_up = True


def has_given_up() -> bool:
    """Whether this process is to end at once, once it has said why."""
    return _given_up


def is_about_a_connection(error: BaseException) -> bool:
    """Whether a collective failed, for a process did not answer or its connection broke."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def join_ranks(place: Place, device: torch.device, timeout_seconds: float) -> Ranks:
    """Meet the other processes of the run, once in the life of this one.

    timeout_seconds: for a process that does not answer in the middle of a step.
    """
    global _joined  # noqa: PLW0603
    if place.size == 1:
        return Ranks()
    if _joined is None:
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        set_rendezvous()
        timeout = timedelta(seconds=timeout_seconds)
        try:
            meeting, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=timeout))
        except (RuntimeError, ValueError) as error:
            raise ResourceError(
                f"the other processes are not found at {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')} ({one_line(error)[:160]}); start as many "
                f"processes as WORLD_SIZE says, {place.size}, and let them reach the first"
            ) from error
        store = PrefixStore("svend", meeting)
        on_cuda = device.type == "cuda"
        if on_cuda:
            # Of one that Slurm has bound to a device, that is the only one it sees.
            index = place.local_rank if cuda.device_count() > 1 else 0
            if index >= cuda.device_count():
                raise ResourceError(
                    f"{place.local_size} processes on a machine with {cuda.device_count()} "
                    "CUDA devices: start one per device"
                )
            cuda.use_device(index)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "cpu:gloo", store=store, rank=place.rank,
            world_size=place.size, timeout=timeout,
            device_id=torch.device("cuda", index) if on_cuda else None,
        )
        # An order is not sent before it is listened for: the first waits as for any answer.
        _joined = Ranks(
            place, store,
            dist.new_group(backend="gloo", timeout=timeout if place.leads else PATIENCE),
            dist.new_group(
                backend="gloo", timeout=timedelta(seconds=SAVING_SLACK * timeout_seconds)
            ),
        )
        atexit.register(leave_ranks)
    return _joined


def leave_ranks() -> None:
    """Part from the other processes, at the end of this one."""
    global _joined  # noqa: PLW0603
    if _joined is not None and not _given_up:
        import torch.distributed as dist

        _joined = None
        dist.destroy_process_group()


def shard_mesh(ranks: Ranks, device: torch.device, shard_processes: int | None) -> DeviceMesh:
    """Return how the processes share weights: in groups of so many, each with one copy of them.

    None for one group of all. Groups are of neighbours, which lie on one machine where they fit.
    """
    from torch.distributed.device_mesh import init_device_mesh

    shards = shard_processes or ranks.size
    if shards == ranks.size:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=(SHARD,))
    return init_device_mesh(
        device.type, (ranks.size // shards, shards), mesh_dim_names=("replicate", SHARD)
    )


def shard_model(model: nn.Module, mesh: DeviceMesh, training: TrainingConfig) -> None:
    """Have each process hold a part of every weight, its gradient and its moments.

    Block by block the weights are gathered, in bf16 where that is the precision, for the forward
    and the backward pass; gradients are summed in fp32. Embedding and head stay whole through a
    step. Gains stay in fp32, in groups of their own: a group has one precision.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gains are gathered within what selective checkpointing records, which would take FSDP's notes
    # to the profiler for operations, and find others of them when it computes a block again.
    SAC_IGNORED_OPS.update({
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    })
    low = torch.bfloat16 if training.precision is Precision.BF16 else None
    matrices = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    gains = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for norm in [part for part in model.modules() if isinstance(part, RMSNorm)]:
        fully_shard(norm, mesh=mesh, mp_policy=gains)
    for blocks in [part for part in model.modules() if isinstance(part, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=matrices)
    fully_shard(model, mesh=mesh, mp_policy=matrices)
    if isinstance(model, ReasoningTransformer):
        # Ahead of FSDP's own hook, which moves tensors to the device: of document numbers that are
        # there, where documents begin could be told only by waiting for it.
        model.register_forward_pre_hook(_lay_out_documents, prepend=True)


def _lay_out_documents(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put the layout of documents, on the device of the tokens, in the place of their numbers."""
    tokens_BT, labels_BT, documents_BT = inputs
    return tokens_BT, labels_BT, lay_out_documents(tokens_BT, documents_BT)


def replicate_model(model: nn.Module) -> nn.Module:
    """Return what to call for a forward pass, after whose backward pass gradients are means.

    Without device_ids, which would have document numbers moved to the device.
    """
    return nn.parallel.DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


@contextlib.contextmanager
def summing_gradients(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Sum over the processes in the backward pass of a step's last micro-batch alone.

    A sharded model sums in each: to keep gradients whole until the last is what it has no room for.
    """
    if last or not isinstance(module, nn.parallel.DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield
