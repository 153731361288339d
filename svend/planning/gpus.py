"""GPUs that a run can be planned for, by their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from svend.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A GPU. FLOPs per second are dense, without sparsity's factor of two.

    device_name: what CUDA calls it, or a part of that. memory_bytes: as many decimal GB as its name
    says. The driver shows a few percent more on most, and less on those with ECC in their memory,
    for which that stands here.
    """

    name: str
    device_name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", "A100", 40_000_000_000, 312e12, 19.5e12, "NVIDIA A100 data sheet"),
        Gpu("a100-80gb", "A100", 80_000_000_000, 312e12, 19.5e12, "NVIDIA A100 data sheet"),
        Gpu("h100-80gb", "H100 80GB HBM3", 80_000_000_000, 989e12, 67e12,
            "NVIDIA H100 data sheet, SXM"),
        Gpu("h200", "H200", 141_000_000_000, 989e12, 67e12, "NVIDIA H200 data sheet, SXM"),
        Gpu("l4", "L4", 23_000_000_000, 121e12, 30.3e12, "NVIDIA L4 data sheet, 24 GB with ECC"),
        Gpu("l40s", "L40S", 47_000_000_000, 362e12, 91.6e12,
            "NVIDIA L40S data sheet, 48 GB with ECC"),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name; raises ConfigError, with the known ones, for another."""
    if name not in GPUS:
        raise ConfigError(f"gpu = {name}: must be one of {', '.join(GPUS)}")
    return GPUS[name]


def bf16_peak_of(device_name: str) -> float | None:
    """Return a card's bf16 FLOPs per second, by what CUDA calls it; None for an unknown one."""
    return next(
        (gpu.bf16_flops for gpu in GPUS.values()
         if re.search(rf"\b{gpu.device_name}\b", device_name)),
        None,
    )
