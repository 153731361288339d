"""Cross-entropy of a linear head, without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# torch's own convention for a position that counts nothing.
IGNORE_LABEL = -100
# Rows of logits held at once: 512 x 32768 in fp32 are 67 MB. 1024 rows are no faster, 256 slower.
CHUNK_ROWS = 512


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed chunk by chunk in the forward pass, while the logits exist.

    The backward pass then only scales them. This costs no recomputation: three matrix products a
    chunk, as many as the plain way (Wijmans et al. 2024, arXiv 2411.09009, does likewise on GPUs).
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        w_VD = weight_VD.to(x_ND.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND) if needs_x else None
        grad_w_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        )
        for start in range(0, x_ND.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            x_CD, labels_C = x_ND[rows], labels_N[rows]
            counted_C1 = (labels_C != IGNORE_LABEL).unsqueeze(1)
            target_C1 = labels_C.clamp(min=0).unsqueeze(1)
            logits_CV = (x_CD @ w_VD.T).float()
            log_z_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            nll_C1 = log_z_C1 - logits_CV.gather(1, target_C1)
            loss += torch.where(counted_C1, nll_C1, 0.0).sum()
            if not (needs_x or needs_weight):
                continue
            grad_CV = logits_CV.sub_(log_z_C1).exp_()
            grad_CV.scatter_add_(1, target_C1, grad_CV.new_full((1, 1), -1.0).expand_as(target_C1))
            grad_CV = torch.where(counted_C1, grad_CV, 0.0).to(x_ND.dtype)
            if grad_x_ND is not None:
                torch.matmul(grad_CV, w_VD, out=grad_x_ND[rows])
            if grad_w_VD is not None:
                grad_w_VD += grad_CV.T @ x_CD
        ctx.save_for_backward(grad_x_ND, grad_w_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        # A scalar does not promote: the product keeps grad_x's dtype, with the scale in fp32.
        scaled_x_ND = None if grad_x_ND is None else grad_x_ND * grad
        return scaled_x_ND, None if grad_w_VD is None else grad_w_VD * grad, None


def summed_linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Return the negative log-likelihood in nats, summed over the labels, as an fp32 scalar.

    x_ND: (tokens, hidden); weight_VD: (vocabulary, hidden); labels_N: token ids, where
    IGNORE_LABEL counts nothing. The matrix products run in the dtype of x_ND.
    """
    loss: Tensor = _SummedLinearCrossEntropy.apply(x_ND, weight_VD, labels_N)  # type: ignore[no-untyped-call]
    return loss


def next_token_labels(tokens_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """Return the next token of the same document at each position, else IGNORE_LABEL.

    documents_BT numbers the documents of a row; a negative number is padding.
    """
    labels_BT = torch.full_like(tokens_BT, IGNORE_LABEL)
    follows_BT = (documents_BT[:, 1:] == documents_BT[:, :-1]) & (documents_BT[:, 1:] >= 0)
    labels_BT[:, :-1] = torch.where(follows_BT, tokens_BT[:, 1:], IGNORE_LABEL)
    return labels_BT
