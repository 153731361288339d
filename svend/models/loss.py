"""Cross-entropy of a linear head, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Rows of logits held at once, in low precision: 2048 x 32768 in bf16 are 134 MB. Fewer rows make
# the matrix products slower: by a half at 512 rows, on CPU.
CHUNK_ROWS = 2048
# Rows turned into their gradient at once, in fp32: 256 x 32768 are 34 MB. Compiled for CUDA it is
# done in registers, and a slice would be a launch.
SLICE_ROWS = 256


def _replace_by_probabilities(logits_RV: Tensor) -> Tensor:
    """Leave each row's probabilities in the logits; return their log-normaliser, (rows, 1)."""
    log_z_R1 = logits_RV.float().logsumexp(dim=1, keepdim=True)
    logits_RV.copy_(logits_RV.softmax(dim=1))
    return log_z_R1


def _replace_by_probabilities_in_one_pass(logits_RV: Tensor) -> Tensor:
    """Do the same, for a compiler: twice as fast as what it makes of log_softmax and exp."""
    wide_RV = logits_RV.float()
    highest_R1 = wide_RV.amax(dim=1, keepdim=True)
    exponentials_RV = (wide_RV - highest_R1).exp()
    z_R1 = exponentials_RV.sum(dim=1, keepdim=True)
    logits_RV.copy_(exponentials_RV * (1 / z_R1))
    return highest_R1 + z_R1.log()


@cache
def _fused_replace_by_probabilities() -> Callable[[Tensor], Tensor]:
    return torch.compile(_replace_by_probabilities_in_one_pass, dynamic=False)


def _replace_by_gradient(logits_CV: Tensor, target_C1: Tensor, fused: bool) -> Tensor:
    """Turn logits into their gradient; return the negative log-likelihoods, (rows, 1)."""
    logit_C1 = logits_CV.gather(1, target_C1).float()
    slice_rows, log_z = SLICE_ROWS, []
    if fused and logits_CV.device.type == "cuda" and len(logits_CV) % SLICE_ROWS == 0:
        slice_rows = len(logits_CV)
    for logits_RV in torch.split(logits_CV, slice_rows):
        # Few compiled shapes: a last slice of fewer rows goes without.
        compiled = fused and len(logits_RV) == slice_rows
        replace = _fused_replace_by_probabilities() if compiled else _replace_by_probabilities
        log_z.append(replace(logits_RV))
    nll_C1 = torch.cat(log_z) - logit_C1
    # The target's entry anew: 1 less than a rounded probability is not the gradient, rounded.
    rows_C = torch.arange(len(logits_CV), device=logits_CV.device)
    logits_CV[rows_C, target_C1.squeeze(1)] = torch.expm1(-nll_C1).squeeze(1).to(logits_CV.dtype)
    return nll_C1


def _sum_without_gradients(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    w_VD = weight_VD.to(x_ND.dtype)
    loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
    for x_CD, labels_C in zip(
        torch.split(x_ND, CHUNK_ROWS), torch.split(labels_N, CHUNK_ROWS), strict=True
    ):
        logits_CV, labels_C1 = x_CD @ w_VD.T, labels_C.unsqueeze(1)
        for logits_RV, labels_R1 in zip(
            torch.split(logits_CV, SLICE_ROWS), torch.split(labels_C1, SLICE_ROWS), strict=True
        ):
            log_p_RV = logits_RV.log_softmax(dim=1, dtype=torch.float32)
            log_p_R1 = log_p_RV.gather(1, labels_R1.clamp(min=0))
            loss -= torch.where(labels_R1 >= 0, log_p_R1, 0.0).sum()
    return loss


def _sum_transposed(products_DV: Sequence[Tensor], scale: Tensor) -> Tensor:
    summed_DV = sum(product_DV.float() for product_DV in products_DV)
    return torch.mul(torch.as_tensor(summed_DV).T, scale).contiguous()


@cache
def _fused_sum_transposed() -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    return torch.compile(_sum_transposed, dynamic=False)


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
        # Transposed, for x^T times the gradient is twice as fast as its transpose times x. The last
        # two are summed in the backward pass, on the way.
        products_DV: list[Tensor] = []
        for start in range(0, x_ND.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            x_CD, labels_C1 = x_ND[rows], labels_N[rows].unsqueeze(1)
            counted_C1 = labels_C1 >= 0
            target_C1 = labels_C1.clamp(min=0)
            logits_CV = x_CD @ w_VD.T
            nll_C1 = _replace_by_gradient(logits_CV, target_C1, fused)
            loss += torch.where(counted_C1, nll_C1, 0.0).sum()
            # What does not count is left out on the narrow side of the products.
            if grad_x_ND is not None:
                grad_x_ND[rows] = torch.where(counted_C1, logits_CV @ w_VD, 0.0)
            if needs_weight:
                products_DV.append(torch.where(counted_C1, x_CD, 0.0).T.contiguous() @ logits_CV)
                if len(products_DV) > 2:
                    products_DV[0] = products_DV[0].float().add_(products_DV.pop(1))
            del logits_CV  # else they are held until the next chunk's are made
        ctx.save_for_backward(grad_x_ND, *products_DV)
        ctx.fused = fused
        return loss

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        grad_x_ND, *products_DV = ctx.saved_tensors
        # A scalar does not promote: the product keeps grad_x's dtype, with the scale in fp32.
        scaled_x_ND = None if grad_x_ND is None else grad_x_ND * grad
        scaled_w_VD = None
        if products_DV:
            sum_transposed = _fused_sum_transposed() if ctx.fused else _sum_transposed
            scaled_w_VD = sum_transposed(products_DV, grad)
        return scaled_x_ND, scaled_w_VD, None, None


def summed_linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, fused: bool = False
) -> Tensor:
    """Return the negative log-likelihood in nats, summed over the labels, as an fp32 scalar.

    x_ND: (tokens, hidden); weight_VD: (vocabulary, hidden); labels_N: token ids, where
    a negative one counts nothing. The matrix products run in the dtype of x_ND. `fused` compiles
    what lies between them.
    """
    # The autograd function cannot tell: it sees weights that want a gradient.
    if not torch.is_grad_enabled() or not (x_ND.requires_grad or weight_VD.requires_grad):
        return _sum_without_gradients(x_ND, weight_VD, labels_N)
    loss: Tensor = _SummedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, labels_N, fused
    )
    return loss
