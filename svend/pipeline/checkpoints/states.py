"""What goes into a checkpoint and comes out of it: the states of model, optimizer and the rest."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svend import cuda
from svend.errors import CheckpointError, one_line
from svend.models.shards import is_sharded
from svend.pipeline.checkpoints.metadata import EXTRA_STATE, Checkpoint
from svend.pipeline.checkpoints.sharded import PartialSave, read_state_of
from svend.pipeline.state_files import read_state

# The names, the metadata and what a state has beside its tensors.
BYTES_BESIDE_TENSORS = 200_000


class Stateful(Protocol):
    """What has a state to save: an optimizer, a scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold."""

    step: int
    epoch: int
    metrics: dict[str, float]
    states: dict[str, Any]
    partial: PartialSave | None

    @property
    def bytes(self) -> int:
        """What it takes on the disk, a little more than its tensors."""
        if self.partial is not None:
            return self.partial.bytes + BYTES_BESIDE_TENSORS
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in _tensors_in(self.states)
        }
        return sum(storages.values()) + BYTES_BESIDE_TENSORS


def gather_content(
    parts: Mapping[str, Stateful | nn.Module | None],
    step: int,
    epoch: int,
    metrics: Mapping[str, float] | None,
    extra_state: Mapping[str, Any] | None,
    partial: PartialSave | None,
) -> Content:
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    return Content(
        _whole_number("step", step),
        _whole_number("epoch", epoch),
        {name: _number(name, value) for name, value in (metrics or {}).items()},
        {**states, "extra_state": dict(extra_state or {}),
         **({} if partial is None else {"layout": partial.layout})},
        partial,
    )


class Snapshots:
    """Copies of states in main memory, each in the memory of the one before.

    On CUDA the memory is pinned, so that copying runs at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def take(self, state: Any) -> Any:
        """Return a copy that training does not change, and that the next call overwrites.

        Tensors that share their memory, such as tied weights, share it in the copy too.
        """
        taken: dict[tuple[Any, ...], torch.Tensor] = {}

        def copy_of(value: Any, place: tuple[Any, ...]) -> Any:
            if isinstance(value, torch.Tensor):
                key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
                if value.numel() == 0 or key not in taken:
                    taken[key] = self._filled(place, value.detach())
                return taken[key]
            if isinstance(value, dict):
                # A shallow copy first: a module's state has attributes beside its entries.
                changed = copy.copy(value)
                changed.update({k: copy_of(entry, (*place, k)) for k, entry in value.items()})
                return changed
            if type(value) in (list, tuple):
                return type(value)(copy_of(v, (*place, i)) for i, v in enumerate(value))
            return copy.deepcopy(value)

        whole = copy_of(state, ())
        if any(tensor.is_pinned() for tensor in self._buffers.values()):
            cuda.synchronize()
        return whole

    def _filled(self, place: tuple[Any, ...], value: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(
                value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda"
            )
            self._buffers[place] = buffer
        return buffer.copy_(value, non_blocking=True)


def load_parts(
    checkpoint: Checkpoint, parts: Mapping[str, Stateful | nn.Module | None]
) -> tuple[int, int, dict[str, Any]]:
    """Load what is given, by its name, from a verified checkpoint; None for what is not wanted.

    Saved whole or in parts, it is loaded whole or in parts, as model and optimizer are laid out.
    Where several processes each hold a part, each calls this.
    """
    wanted = {name: part for name, part in parts.items() if part is not None}
    like, on_cuda = _sharded_tensor(wanted.get("model")), _is_on_cuda(wanted.get("model"))
    # All are read before the first is changed, but for a sharded model, which is read into its
    # place: there is no room for it twice.
    states = {
        name: read_state_of(checkpoint, name, part.state_dict(), like, on_cuda=on_cuda)
        for name, part in wanted.items()
    }
    extra_state = read_state(checkpoint.path / EXTRA_STATE)
    if not isinstance(extra_state, dict):
        raise CheckpointError(f"{checkpoint.path / EXTRA_STATE}: holds no state")
    for name, part in wanted.items():
        try:
            part.load_state_dict(states.pop(name))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint.path / name}.pt does not fit this {name}: "
                f"{one_line(error)[:300]}"
            ) from None
    return checkpoint.step, checkpoint.epoch, extra_state


def _sharded_tensor(model: Stateful | nn.Module | None) -> Tensor | None:
    """Return a tensor of the model by which this process cuts what it loads, if it does."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next(filter(is_sharded, parameters), None)


def _is_on_cuda(model: Stateful | nn.Module | None) -> bool:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return any(parameter.device.type == "cuda" for parameter in parameters)


def _tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors_in(value)


def _whole_number(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise CheckpointError(f"{name} = {value!r}: must be a whole number of at least 0")
    return number


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"metrics['{name}'] = {value!r}: must be a number") from None
