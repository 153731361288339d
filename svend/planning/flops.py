"""Floating-point operations of training and evaluating, counted by formula."""

from __future__ import annotations

from svend.pipeline.config import ModelConfig

# A backward pass costs two forward passes; a multiply-add is two operations.
FORWARD_PER_PARAMETER = 2
TRAIN_PER_FORWARD = 3


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Return model FLOPs of a forward pass, per token.

    2 (blocks + head) + 2 L T d: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1, with the
    embedding look-up left out, the head counted (and the norms' gains, under 0.1%), and causal
    attention counted as the half that it is. Masks between documents, which save more, are not
    subtracted.
    """
    attention = model.num_hidden_layers * sequence_length * model.hidden_size
    return FORWARD_PER_PARAMETER * (model.num_matrix_parameters() + attention)


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Return model FLOPs of a training step, per token: 6 (blocks + head) + 6 L T d."""
    return TRAIN_PER_FORWARD * forward_flops_per_token(model, sequence_length)
