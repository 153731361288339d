"""A small training, and checkpoints of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from svend.pipeline.checkpoints import CheckpointManager

STATE_FILES = ["model.pt", "optimizer.pt", "scheduler.pt", "scaler.pt", "extra_state.pt"]
Training = tuple[nn.Module, torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]


def _half_life(step: int) -> float:
    return float(0.5 ** (step / 10))


def small_training(seed: int = 0, steps: int = 0, width: int = 3) -> Training:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _half_life)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def small_scaler(factor: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict({"scale": factor, "growth_factor": 3.0, "backoff_factor": 0.25,
                            "growth_interval": 7, "_growth_tracker": 2})
    return scaler


def same(one: Any, other: Any) -> bool:
    """Whether two states agree bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*as_bytes)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return bool(one == other)


def checkpoint_ids(manager: CheckpointManager) -> list[str]:
    return [checkpoint.checkpoint_id for checkpoint in manager.list_checkpoints()]


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def filled(folder: Path, steps: int = 2) -> CheckpointManager:
    manager = CheckpointManager(folder)
    for step in range(1, steps + 1):
        manager.save(*small_training(step, step), step=step, metrics={"loss": 1.0 / step},
                     extra_state={"mark": step}, scaler=small_scaler(float(2**step)))
    return manager


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
