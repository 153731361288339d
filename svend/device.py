"""The device a run trains on, and the settings that make it fast."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import torch
from torch import Tensor

from svend import cuda
from svend.errors import ResourceError
from svend.pipeline.config import Device, Precision

DTYPES = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
# What torch.cpu.get_capabilities calls matrix products in bf16, on x86 and on Arm.
CPU_BF16 = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "arm_bf16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


def resolve_device(device: Device) -> torch.device:
    """Return the device; raises ResourceError if CUDA is asked for and absent."""
    has_cuda = cuda.is_available()
    if device is Device.CUDA and not has_cuda:
        raise ResourceError(
            "training.device = cuda: torch finds no CUDA device; check nvidia-smi and that torch "
            f"({torch.__version__}) is a CUDA build, or set training.device=cpu"
        )
    if not has_cuda or device is Device.CPU:
        return torch.device("cpu")
    return torch.device("cuda")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return what AUTO stands for on the device; another precision as it is."""
    if precision is not Precision.AUTO:
        return precision
    if device.type == "cuda":
        return Precision.BF16 if cuda.multiplies_in_bf16() else Precision.FP16
    return Precision.BF16 if multiplies_in_bf16() else Precision.FP32


def multiplies_in_bf16() -> bool:
    """Whether the CPU has instructions for products in bf16; without them they are very slow."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in CPU_BF16)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise ResourceError if the device cannot compute in this precision."""
    if precision is not Precision.BF16 or device.type != "cuda":
        return
    if not cuda.multiplies_in_bf16():
        raise ResourceError(
            f"training.precision = bf16: {cuda.device_name(device)} has no bf16; "
            "set training.precision=fp16"
        )


def check_float8(precision: Precision, device: torch.device) -> None:
    """Raise ResourceError if the device, or the packages here, cannot multiply in float8."""
    if device.type != "cuda" or not cuda.multiplies_in_float8(device):
        raise ResourceError(
            f"training.float8 = true: {describe_device(device)} does not multiply in float8; it "
            "takes an H100 or newer; set training.float8=false"
        )
    if precision is not Precision.BF16:
        raise ResourceError(
            f"training.float8 = true: is used with bf16, not {precision}; set "
            "training.precision=bf16"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ResourceError(
            "training.float8 = true: needs torchao; pip install 'svend[float8]', or set "
            "training.float8=false"
        )


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass; the weights stay fp32 outside it."""
    if precision is Precision.FP32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; to CUDA by way of pinned memory, without waiting."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return cuda.copy_through_pinned_memory(tensor, device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told; a CPU always has."""
    if device.type == "cuda":
        cuda.synchronize(device)


def describe_device(device: torch.device) -> str:
    """Return the device's name as people know it."""
    if device.type == "cuda":
        return cuda.device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        models = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
        name = models[0].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of unmapping them.

    A step frees and takes the same large tensors again; mapping them anew costs hundreds of
    thousands of page faults a step. The price is that memory, once used, stays with the process,
    until `return_freed_memory`.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Have glibc return what is free, where a process turns to something else.

    What it takes next has other sizes, and would lie beside the holes of what went before.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it builds with: a compiler and Python's headers."""
    default, variable = ("g++", "CXX") if device.type == "cpu" else ("gcc", "CC")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(os.environ.get(variable, default)) is not None and headers.is_file()


def available_bytes(device: torch.device) -> int:
    """Return the memory that this process can have in all, what it holds now included."""
    if device.type == "cuda":
        return cuda.available_bytes(device)
    held = psutil.Process().memory_info().rss
    available = psutil.virtual_memory().available + held
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        return min(available, int(text))
    return available


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held on the device so far."""
    if device.type == "cuda":
        return cuda.peak_bytes(device)
    import resource  # not on Windows, where only CUDA runs report a peak

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
