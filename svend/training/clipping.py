"""Clipping by the global norm of the gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from svend.models.shards import local, norm_over_shards


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm`; return the norm before.

    Pascanu, Mikolov and Bengio 2013 (arXiv 1211.5063), as `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    held = [local(gradient) for gradient in gradients]
    on_cpu = all(gradient.device.type == "cpu" for gradient in held)
    norm = _norm_on_cpu(held) if on_cpu else norm_in_fp32(held)
    if gradients:
        norm = norm_over_shards(norm, gradients[0])
    # On CPU, where to look costs nothing, gradients that are not scaled are not touched.
    if not on_cpu or not bool(norm <= max_norm):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(held, scale)
    return norm


def _norm_on_cpu(gradients: list[Tensor]) -> Tensor:
    """Return the norm from dot products, which take all cores; torch's own norm takes one."""
    flat = [gradient.flatten().float() for gradient in gradients]
    return torch.stack([torch.dot(g, g) for g in flat]).sum().sqrt()


def norm_in_fp32(gradients: list[Tensor]) -> Tensor:
    """Return the norm as torch.nn.utils.get_total_norm does, which rounds that of bf16 to bf16."""
    norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm
