"""AdamW with its moments in 8 or 4 bits, by torchao; import it only where it is wanted.

Dettmers et al. 2022 (arXiv 2110.02861) and Li et al. 2023 (arXiv 2309.01507): blocks of 256 or 128
entries share a scale. Vectors, and matrices that are no whole number of blocks, have their moments
in the dtype of the parameter.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchao.optim import AdamW4bit, AdamW8bit
from torchao.optim.adam import single_param_adam

from svend import cuda
from svend.errors import ConfigError
from svend.models.shards import is_sharded, local
from svend.training.low_memory import LowMemoryAdamW

# torchao quantizes no tensor of fewer entries.
SMALLEST_QUANTIZED = 4096

# What is missing is a longer life of the compiler's cache.
warnings.filterwarnings("ignore", message="OptimState.bit does not implement", category=UserWarning)


class _QuantizedAdamW(LowMemoryAdamW):
    """What torchao's optimizers lack: plain states, random numbers of our own, sharded weights.

    Of a sharded parameter each process moves its part, as if it were whole: as DTensors, weights in
    bf16 and quantized states do not go together in torchao 0.18. A step does not look at
    `found_inf`, so `take_step` reads on the host whether there is one.
    """

    takes_found_inf = False
    eager = False
    block_size: int
    _new_buffer: Callable[[Tensor, bool], Tensor]

    def __init__(
        self,
        parameters: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        seed: int,
        *,
        eager: bool,
    ) -> None:
        super().__init__(parameters, lr, betas=betas, bf16_stochastic_round=True)  # type: ignore[arg-type, call-arg]
        self.rounding_seed, self.eager = seed, eager
        for group in self.param_groups:
            for parameter in group["params"]:
                _check_shards(parameter, self.block_size)

    def fresh_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what torchao begins with."""
        return {
            "step": torch.tensor(0.0),
            "exp_avg": self._new_buffer(local(parameter.detach()), True),
            "exp_avg_sq": self._new_buffer(local(parameter.detach()), False),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step; a closure is not supported."""
        assert closure is None
        device = self.param_groups[0]["params"][0].device
        update = single_param_adam
        if not self.eager:
            update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
        # As torchao does: there is a kernel for each shape, and no end of them is a mistake.
        with torch._dynamo.utils.disable_cache_limit(), seeded(device, self.next_rounding_seed()):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group, update)

    def _move(
        self, parameter: nn.Parameter, group: dict[str, Any], update: Callable[..., None]
    ) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(self.fresh_state(parameter))
        state["step"] += 1
        update(
            local(parameter.detach()), local(parameter.grad), state["step"], state["exp_avg"],
            state["exp_avg_sq"], None, group["lr"], *group["betas"], group["weight_decay"],
            group["eps"], IS_ADAMW=True, BF16_STOCHASTIC_ROUND=parameter.dtype is torch.bfloat16,
        )


class AdamWInt8(_QuantizedAdamW, AdamW8bit):  # type: ignore[misc]
    """AdamW with moments in 8 bits."""


class AdamWInt4(_QuantizedAdamW, AdamW4bit):  # type: ignore[misc]
    """AdamW with moments in 4 bits."""


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Have torch draw on the device from a seed, and go on afterwards as if nothing was drawn."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = cuda.default_generator(device)
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _check_shards(parameter: nn.Parameter, block_size: int) -> None:
    """Raise ConfigError where some processes would quantize their part and others not."""
    if not is_sharded(parameter) or parameter.dim() < 2:
        return
    columns = math.prod(parameter.shape[1:])
    shards = math.prod(
        parameter.device_mesh.size(dimension)
        for dimension, placement in enumerate(parameter.placements) if placement.is_shard()
    )
    least = local(parameter).numel() if parameter.shape[0] % shards == 0 else 0
    if columns % block_size or least < SMALLEST_QUANTIZED:
        raise ConfigError(
            f"training.moment_precision: a matrix of {'x'.join(map(str, parameter.shape))} in "
            f"{shards} parts is not cut into whole blocks of {block_size}; set "
            "training.moment_precision=bf16, or use fewer processes"
        )
