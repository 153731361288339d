"""All that is said to CUDA, as thin as it can be: nothing else in Svend names `torch.cuda`.

None of it can run without a GPU. `python -m svend bench --gpu-report` tries each part on one, and
docs/gpu.md says which of it has been run.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch
from torch import Tensor

HOPPER = (9, 0)  # the compute capability of an H100
# That K may be less than H: torch 2.11 takes it without being told, and cannot be told.
GROUPS_QUERIES: dict[str, Any] = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}


def is_available() -> bool:
    """Whether torch is a CUDA build and finds a device."""
    return torch.cuda.is_available()


def device_count() -> int:
    """Return how many devices torch finds."""
    return torch.cuda.device_count()


def use_device(number: int) -> None:
    """Have a process mean this device by "cuda"."""
    torch.cuda.set_device(number)


def device_name(device: torch.device) -> str:
    """Return the card's name, such as NVIDIA H100 80GB HBM3."""
    return torch.cuda.get_device_name(device)


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


def multiplies_in_bf16() -> bool:
    """Whether the card itself multiplies in bf16, from Ampere on."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def multiplies_in_float8(device: torch.device) -> bool:
    """Whether the card itself multiplies in float8 as torchao asks it to, from Hopper on."""
    return capability(device) >= HOPPER


def driver_version() -> str:
    """Return the driver's version as nvidia-smi tells it, or why it is not known."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False, timeout=60,
    )
    lines = asked.stdout.split("\n")
    return lines[0].strip() or f"unknown (nvidia-smi ended with {asked.returncode})"


def total_bytes(device: torch.device) -> int:
    """Return the card's memory."""
    return torch.cuda.mem_get_info(device)[1]


def available_bytes(device: torch.device) -> int:
    """Return the memory that this process can have in all, what it holds now included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes in tensors since the start, or since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device)


def peak_reserved_bytes(device: torch.device) -> int:
    """Return the most bytes that the allocator held since then, the unused between included."""
    return torch.cuda.max_memory_reserved(device)


def reset_peak(device: torch.device) -> None:
    """Count the peaks from now on."""
    torch.cuda.reset_peak_memory_stats(device)


def release_cached_memory() -> None:
    """Give back what the allocator holds and no tensor uses."""
    torch.cuda.empty_cache()


def synchronize(device: torch.device | None = None) -> None:
    """Wait until the device has done all that it was told."""
    torch.cuda.synchronize(device)


def random_state(device: torch.device) -> Tensor:
    """Return the state of the device's generator."""
    return torch.cuda.get_rng_state(device)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Put the device's generator into a state."""
    torch.cuda.set_rng_state(state, device)


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that torch draws with on the device."""
    return torch.cuda.default_generators[device.index or 0]


def copy_through_pinned_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, which is made while the caller goes on."""
    return tensor.pin_memory().to(device, non_blocking=True)


def attend_varlen(
    q_NHS: Tensor, k_NKS: Tensor, v_NKS: Tensor, offsets_E: Tensor, longest: int
) -> Tensor:
    """Return causal attention within the pieces that begin at the offsets, by flash attention.

    N positions of all pieces, H query heads, K key/value heads, S head size, E ends of pieces.
    """
    # Here, for it loads the compiler, which a run on CPU may not need.
    from torch.nn.attention.varlen import varlen_attn

    out_NHS = varlen_attn(
        q_NHS, k_NKS, v_NKS, offsets_E, offsets_E, longest, longest,
        window_size=(-1, 0), **GROUPS_QUERIES,
    )
    assert isinstance(out_NHS, Tensor)  # without the auxiliary outputs that were not asked for
    return out_NHS
