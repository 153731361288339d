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
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW4bit, AdamW8bit

from svend.errors import ConfigError
from svend.training.low_memory import LowMemoryAdamW, local

# torchao quantizes no tensor of fewer entries.
SMALLEST_QUANTIZED = 4096

# What is missing is a longer life of the compiler's cache.
warnings.filterwarnings("ignore", message="OptimState.bit does not implement", category=UserWarning)


class _QuantizedAdamW(LowMemoryAdamW):
    """What torchao's optimizers lack: plain states, random numbers of our own, steps left out.

    They do not look at `found_inf`, so `take_step` reads on the host whether there is a step.
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
            "exp_avg": self._new_buffer(parameter, True),
            "exp_avg_sq": self._new_buffer(parameter, False),
        }

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step; a closure is not supported."""
        assert closure is None
        device = self.param_groups[0]["params"][0].device
        stance = torch.compiler.set_stance("force_eager" if self.eager else "default")
        with seeded(device, self.next_rounding_seed()), stance:
            super().step()


class AdamWInt8(_QuantizedAdamW, AdamW8bit):  # type: ignore[misc]
    """AdamW with moments in 8 bits."""


class AdamWInt4(_QuantizedAdamW, AdamW4bit):  # type: ignore[misc]
    """AdamW with moments in 4 bits."""


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Have torch draw on the device from a seed, and go on afterwards as if nothing was drawn."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _check_shards(parameter: nn.Parameter, block_size: int) -> None:
    """Raise ConfigError where some processes would quantize their part and others not."""
    if not isinstance(parameter, DTensor) or parameter.dim() < 2:
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
