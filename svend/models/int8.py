"""Matrix products in int8: weights with a scale per output, inputs with a scale per row.

Meant for one row on a CPU, where a step takes as long as its weights take to be read. Sums of
integers are exact, so that rounding never depends on the number of rows. `quantization.py`
measures what it costs in accuracy.

Shape suffixes: N rows, D inputs, F outputs.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

INT8_MAX = 127
SMALLEST = 1e-30  # of a row's largest value, so that a row of zeros divides by something


class Int8Weights:
    """A weight matrix in int8, packed for FBGEMM.

    The inputs take seven bits: of eight, pairs of products may not fit the 16 bits that CPUs
    without VNNI add them in.
    """

    def __init__(self, weight_FD: Tensor) -> None:
        scale_F = weight_FD.abs().amax(dim=1).clamp_min(SMALLEST) / INT8_MAX
        with warnings.catch_warnings():
            # torch says that quantized tensors will leave it; FBGEMM's products have no other door.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            quantized_FD = torch.quantize_per_channel(
                weight_FD, scale_F.double(), torch.zeros(len(scale_F), dtype=torch.int64), 0,
                torch.qint8,
            )
        self._packed = torch.ops.quantized.linear_prepack(quantized_FD, None)
        # The kernel takes one scale, of the least and the greatest input: with this row, of both
        # being 1, and with every row divided by its largest value, it is the same for all.
        self._bounds_1D = torch.zeros(1, weight_FD.shape[1])
        self._bounds_1D[0, 0], self._bounds_1D[0, -1] = 1.0, -1.0

    def multiply(self, x_ND: Tensor) -> Tensor:
        """Return x_ND times the weights, (rows, outputs)."""
        scale_N1 = torch.linalg.vector_norm(x_ND, torch.inf, dim=-1, keepdim=True)
        scale_N1 = scale_N1.clamp_min_(SMALLEST)
        bounded_ND = torch.cat((x_ND / scale_N1, self._bounds_1D))
        out_NF: Tensor = torch.ops.quantized.linear_dynamic(bounded_ND, self._packed, True)
        return out_NF[:-1].mul_(scale_N1)
