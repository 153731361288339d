"""Tensors of which each process holds a part, beside those that are whole.

torch's DTensor is not imported where no process shards: that takes a second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SHARD = "shard"  # the mesh's dimension along which tensors are cut


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process holds a part of the tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds: the tensor itself, or its part, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; where it is sharded, every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return of a whole tensor what belongs to a tensor that is laid out as `like`.

    Each process cuts its own part, without a word to the others.
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def sum_over_shards(summed: Tensor, of: Tensor) -> Tensor:
    """Return the sum of what each process found in its part of tensors laid out as `of`."""
    if is_sharded(of):
        import torch.distributed as dist

        dist.all_reduce(summed, group=of.device_mesh.get_group(SHARD))
    return summed


def norm_over_shards(norm: Tensor, of: Tensor) -> Tensor:
    """Return the norm of the whole, from that of each process's part of tensors laid out as `of`.

    A norm that is whole is left as it is: its square may be too large.
    """
    return sum_over_shards(norm.square(), of).sqrt() if is_sharded(of) else norm


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Have a sharded module hold its parameters whole meanwhile, but for those of children that are
    sharded by themselves.

    For what calls it otherwise than by its forward pass. Every process must come here.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def reshard(model: nn.Module) -> None:
    """Have a sharded model hold its parts alone again, after a forward pass without a backward one.

    The root of it keeps what it gathered, for a backward pass that does not come.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(model, fsdp.FSDPModule):
        model.reshard()


def count_nonfinite(model: nn.Module) -> int:
    """Return how many weights are NaN or infinite; waits for the device once.

    Where they are sharded, every process must ask.
    """
    with torch.no_grad():
        here: list[Tensor] = []
        elsewhere: list[Tensor] = []  # in part
        sharded: Tensor | None = None
        for parameter in model.parameters():
            count = (~local(parameter).isfinite()).sum()
            if is_sharded(parameter):
                sharded = parameter
                elsewhere.append(count)
            else:
                here.append(count)
        if sharded is not None:
            here.append(sum_over_shards(torch.stack(elsewhere).sum(), sharded))
        return int(torch.stack(here).sum()) if here else 0
