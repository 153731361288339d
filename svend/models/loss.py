"""Cross-entropy of a linear head, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# torch's own convention for a position that counts nothing.
IGNORE_LABEL = -100
# Rows of logits held at once, in low precision: 2048 x 32768 in bf16 are 134 MB. Fewer rows make
# the matrix products slower: by a half at 512 rows, on CPU.
CHUNK_ROWS = 2048
# Rows turned into their gradient at once, in fp32: 256 x 32768 are 34 MB.
SLICE_ROWS = 256


def _replace_by_gradient(logits_RV: Tensor, target_R1: Tensor) -> Tensor:
    """Return each row's negative log-likelihood, (rows, 1); leave its gradient in the logits."""
    log_p_RV = logits_RV.float().log_softmax(dim=1)
    one_hot_RV = torch.arange(logits_RV.shape[1], device=logits_RV.device) == target_R1
    logits_RV.copy_(log_p_RV.exp() - one_hot_RV.float())
    return -log_p_RV.gather(1, target_R1)


def _replace_by_gradient_eagerly(logits_RV: Tensor, target_R1: Tensor) -> Tensor:
    """Do the same without a compiler, in as few passes over the logits as there can be."""
    log_p_RV = logits_RV.float().log_softmax(dim=1)
    nll_R1 = -log_p_RV.gather(1, target_R1)
    p_RV = log_p_RV.exp_()
    p_RV.scatter_add_(1, target_R1, p_RV.new_full((1, 1), -1.0).expand_as(target_R1))
    logits_RV.copy_(p_RV)
    return nll_R1


@cache
def _fused_replace_by_gradient() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_replace_by_gradient, dynamic=False)


def _to_gradient(logits_CV: Tensor, target_C1: Tensor, fused: bool) -> Tensor:
    """Turn logits into their gradient, slice by slice; return the negative log-likelihoods."""
    nll = []
    for logits_RV, target_R1 in zip(
        torch.split(logits_CV, SLICE_ROWS), torch.split(target_C1, SLICE_ROWS), strict=True
    ):
        # One compiled shape: a last slice of fewer rows goes without.
        compiled = fused and len(logits_RV) == SLICE_ROWS
        replace = _fused_replace_by_gradient() if compiled else _replace_by_gradient_eagerly
        nll.append(replace(logits_RV, target_R1))
    return torch.cat(nll)


def _negative_log_likelihood(logits_CV: Tensor, target_C1: Tensor) -> Tensor:
    return torch.cat([
        -logits_RV.float().log_softmax(dim=1).gather(1, target_R1)
        for logits_RV, target_R1 in zip(
            torch.split(logits_CV, SLICE_ROWS), torch.split(target_C1, SLICE_ROWS), strict=True
        )
    ])


def _transpose_and_scale(grad_w_DV: Tensor, scale: Tensor) -> Tensor:
    return torch.mul(grad_w_DV.T, scale).contiguous()


@cache
def _fused_transpose_and_scale() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_transpose_and_scale, dynamic=False)


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed chunk by chunk in the forward pass, while the logits exist.

    The backward pass then only scales them. This costs no recomputation: three matrix products a
    chunk, as many as the plain way (Wijmans et al. 2024, arXiv 2411.09009, does likewise on GPUs).
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, fused: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        w_VD = weight_VD.to(x_ND.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND) if needs_x else None
        # Transposed, for x^T times the gradient is twice as fast as its transpose times x.
        grad_w_DV: Tensor | None = None
        for start in range(0, x_ND.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            x_CD, labels_C1 = x_ND[rows], labels_N[rows].unsqueeze(1)
            counted_C1 = labels_C1 != IGNORE_LABEL
            target_C1 = labels_C1.clamp(min=0)
            logits_CV = x_CD @ w_VD.T
            if not (needs_x or needs_weight):
                nll_C1 = _negative_log_likelihood(logits_CV, target_C1)
                loss += torch.where(counted_C1, nll_C1, 0.0).sum()
                continue
            nll_C1 = _to_gradient(logits_CV, target_C1, fused)
            loss += torch.where(counted_C1, nll_C1, 0.0).sum()
            # What does not count is left out on the narrow side of the products.
            if grad_x_ND is not None:
                grad_x_ND[rows] = torch.where(counted_C1, logits_CV @ w_VD, 0.0)
            if needs_weight:
                product_DV = torch.where(counted_C1, x_CD, 0.0).T.contiguous() @ logits_CV
                grad_w_DV = (
                    product_DV.float() if grad_w_DV is None else grad_w_DV.add_(product_DV)
                )
        ctx.save_for_backward(grad_x_ND, grad_w_DV)
        ctx.fused = fused
        return loss

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        grad_x_ND, grad_w_DV = ctx.saved_tensors
        # A scalar does not promote: the product keeps grad_x's dtype, with the scale in fp32.
        scaled_x_ND = None if grad_x_ND is None else grad_x_ND * grad
        scaled_w_VD = None
        if grad_w_DV is not None:
            scale = _fused_transpose_and_scale() if ctx.fused else _transpose_and_scale
            scaled_w_VD = scale(grad_w_DV, grad)
        return scaled_x_ND, scaled_w_VD, None, None


def summed_linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, fused: bool = False
) -> Tensor:
    """Return the negative log-likelihood in nats, summed over the labels, as an fp32 scalar.

    x_ND: (tokens, hidden); weight_VD: (vocabulary, hidden); labels_N: token ids, where
    IGNORE_LABEL counts nothing. The matrix products run in the dtype of x_ND. `fused` compiles what
    lies between them.
    """
    loss: Tensor = _SummedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, labels_N, fused
    )
    return loss


def next_token_labels(tokens_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """Return the next token of the same document at each position, else IGNORE_LABEL.

    documents_BT numbers the documents of a row; a negative number is padding.
    """
    labels_BT = torch.full_like(tokens_BT, IGNORE_LABEL)
    follows_BT = (documents_BT[:, 1:] == documents_BT[:, :-1]) & (documents_BT[:, 1:] >= 0)
    labels_BT[:, :-1] = torch.where(follows_BT, tokens_BT[:, 1:], IGNORE_LABEL)
    return labels_BT
