"""Models in which every part matters: freshly drawn weights are too small for a test to tell."""

from __future__ import annotations

import torch

from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer


def large_weights(
    config: TransformerConfig, seed: int = 0, factor: float = 8.0
) -> ReasoningTransformer:
    """Return a model with its matrices times a factor, and gains between 0.5 and 1.5."""
    model = ReasoningTransformer(config)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.mul_(factor)
    return model
