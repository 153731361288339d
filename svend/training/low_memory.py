"""AdamW in less memory: weights and moments in bf16, rounded stochastically.

An update below half a unit in the last place of a bf16 number is lost when it is rounded to the
nearest. Rounded up with the probability of the part that is cut off, it is kept in the mean, and
no copy in fp32 is needed (Gupta et al. 2015, arXiv 1502.02551; Zamirai et al. 2020, arXiv
2010.06192). A step computes in fp32, from rounded weights and moments to rounded ones.

`quantized.py` has the moments in fewer bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from svend.errors import ConfigError
from svend.models.shards import is_sharded, local
from svend.pipeline.config import Precision, TrainingConfig, WeightPrecision

# Entries that a step computes at once: what it holds in fp32 beside the states stays below 0.2 GB.
CHUNK = 2**22
# Odd, so that the low 32 bits, all that a CPU's generator takes, differ from seed to seed.
SEED_STRIDE = 0x9E3779B1
SEEDS = 2**63


def prepare_weights(model: nn.Module, training: TrainingConfig) -> None:
    """Bring the weights to the precision in which the configuration keeps them.

    Matrices only: a gain is near 1, where bf16 has steps of 1/128, and vectors take no memory.
    """
    if training.weight_precision is WeightPrecision.FP32:
        return
    if training.precision is not Precision.BF16:
        raise ConfigError(
            "training.weight_precision = bf16: is multiplied in bf16, and training.precision is "
            f"{training.precision.value} here; set training.precision=bf16, or "
            "training.weight_precision=fp32"
        )
    for parameter in model.parameters():
        if parameter.dim() < 2 or parameter.dtype is torch.bfloat16:
            continue
        if is_sharded(parameter):
            raise ConfigError(
                "training.weight_precision = bf16: weights cannot change their precision once they "
                "are sharded; set training.parallel=ddp, or training.weight_precision=fp32"
            )
        parameter.data = parameter.data.to(torch.bfloat16)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return fp32 numbers as bf16, each one of its two neighbours, in the mean the number itself.

    bf16 is the upper half of fp32: a random number is added to the lower half, which is cut off.
    """
    random = torch.randint(
        0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    upper = (x.view(torch.int32) + random).bitwise_and_(-(2**16))
    return upper.view(torch.float32).to(torch.bfloat16)


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW whose states have a precision of their own, also in a checkpoint.

    torch's `load_state_dict` casts states to the dtype of their parameter; ours takes them up as
    they are, and `state_dict` holds plain tensors only, so that no class is pickled.

    takes_found_inf: whether a step looks at `found_inf`, as torch's fused optimizers do.
    """

    takes_found_inf = True
    found_inf: Tensor | None = None  # see take_step
    rounding_seed = 0

    @abstractmethod
    def fresh_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the states by parameter, as plain tensors, and the groups' settings."""
        packed = super().state_dict()
        states = {
            index: plain_tensors(parameter, packed["state"][index])
            for index, parameter in self._numbered(packed) if index in packed["state"]
        }
        return {**packed, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; raises ValueError for states of another kind."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, parameter in self._numbered(state_dict):
            if index not in state_dict["state"]:
                continue
            state, saved = self.fresh_state(parameter), state_dict["state"][index]
            own = plain_tensors(parameter, state)
            if {_kind(own, name) for name in own} != {_kind(saved, name) for name in saved}:
                raise ValueError(
                    f"its states are {_described(saved)}, this optimizer's {_described(own)}; keep "
                    "training.moment_precision and training.weight_precision as they were"
                )
            for name, tensor in own.items():
                tensor.copy_(saved[name])
            self.state[parameter] = state

    def _numbered(self, state_dict: dict[str, Any]) -> list[tuple[int, nn.Parameter]]:
        """Return the parameters by their numbers in a state."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        return list(zip(numbers, parameters, strict=True))

    def next_rounding_seed(self) -> int:
        """Return the seed of a step's random numbers.

        It follows from the run's seed and the steps so far, which the groups hold: a resumed run
        draws the same numbers, and so do processes that hold the same weights, whatever else they
        draw.
        """
        for group in self.param_groups:
            group["roundings"] = group.get("roundings", 0) + 1
        return (self.rounding_seed * SEED_STRIDE + int(group["roundings"])) % SEEDS


class RoundedAdamW(LowMemoryAdamW):
    """AdamW (Loshchilov and Hutter 2019) of weights in bf16 or fp32, and moments in either.

    parameters: groups of them with settings of their own, as torch takes them. moment_dtype: of
    both moments of a matrix; vectors have theirs in fp32. found_inf: where it is 1, a step changes
    nothing but the count of random draws.
    """

    def __init__(
        self,
        parameters: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        moment_dtype: torch.dtype,
        seed: int,
    ) -> None:
        self._moment_dtype = moment_dtype
        self.rounding_seed = seed
        defaults = {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(parameters, defaults)

    def fresh_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return moments of zero."""
        dtype = self._moment_dtype if parameter.dim() >= 2 else torch.float32
        return {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=dtype, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, requires_grad=False),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step; a closure is not supported."""
        assert closure is None
        skipped = None if self.found_inf is None else self.found_inf > 0
        seed = self.next_rounding_seed()
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self.fresh_state(parameter))
                state["step"] += 1 if skipped is None else ~skipped
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(seed)
                _update(parameter, state, group, skipped, generators[device])


def _update(
    parameter: nn.Parameter,
    state: dict[str, Tensor],
    group: dict[str, Any],
    skipped: Tensor | None,
    generator: torch.Generator,
) -> None:
    """Move one parameter and its moments, a chunk at a time."""
    assert parameter.grad is not None
    (beta1, beta2), lr = group["betas"], group["lr"]
    step_size = lr / (1 - beta1 ** state["step"])
    second_scale = (1 - beta2 ** state["step"]).rsqrt()
    kept = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
    chunks = [torch.split(local(tensor).view(-1), CHUNK) for tensor in kept]
    gradients = torch.split(local(parameter.grad).reshape(-1), CHUNK)
    for weight, first, second, gradient in zip(*chunks, gradients, strict=True):
        g = gradient.float()
        m = first.float().lerp(g, 1 - beta1)
        v = second.float().lerp(g.square(), 1 - beta2)
        w = weight.float() * (1 - lr * group["weight_decay"])
        w -= step_size * (m / (v.sqrt() * second_scale + group["eps"]))
        for tensor, updated in ((weight, w), (first, m), (second, v)):
            _put(tensor, updated, skipped, generator)


def _put(
    tensor: Tensor, updated: Tensor, skipped: Tensor | None, generator: torch.Generator
) -> None:
    """Set a tensor to its update, rounded, where the step is not skipped."""
    if tensor.dtype is torch.bfloat16:
        updated = round_stochastically(updated, generator)
    tensor.copy_(updated if skipped is None else torch.where(skipped, tensor, updated))


def plain_tensors(parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's state by name, a quantized tensor as its codes and scales.

    They share their memory with the state. What belongs to a sharded parameter is sharded as it is.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if hasattr(tensor, "codes"):
            for part in ("codes", "scale"):
                plain[f"{name}.{part}"] = _sharded_as(parameter, getattr(tensor, part))
        else:
            plain[name] = tensor if name == "step" else _sharded_as(parameter, tensor)
    return plain


def _sharded_as(parameter: Tensor, part: Tensor) -> Tensor:
    """Return this process's part of a state as a part of the whole, row by row."""
    if not is_sharded(parameter) or is_sharded(part):
        return part
    from torch.distributed.tensor import DTensor

    part = part.view(local(parameter).shape[0], -1)
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False,
        shape=torch.Size((parameter.shape[0], part.shape[1])), stride=(part.shape[1], 1),
    )


def _kind(state: dict[str, Tensor], name: str) -> tuple[str, torch.dtype, int]:
    return name, state[name].dtype, state[name].numel()


def _described(state: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in state.items())
