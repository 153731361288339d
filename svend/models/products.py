"""Matrix products with fixed weights, in the form that the machine multiplies fastest.

Which form that is follows from what the CPU can do, never from a measurement: it decides how sums
are rounded, and two runs of one seed must not differ.

Every product takes and returns fp32. Shape suffixes: N rows, D inputs, F outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from svend.device import DTYPES, multiplies_in_bf16
from svend.errors import ResourceError
from svend.models.int8 import Int8Weights
from svend.pipeline.config import Precision

# Rows that are multiplied together wherever rounding must not depend on their number.
TILE = 12


class Product(ABC):
    """Multiplies rows with a weight matrix that it holds in a form of its own."""

    def __init__(self, weight_FD: Tensor) -> None:
        self.out_features, self.in_features = weight_FD.shape
        self.device = weight_FD.device

    @property
    def form(self) -> str:
        """What decides how it rounds, beside its shape."""
        return type(self).__name__

    def __call__(self, x_ND: Tensor, in_tiles: bool = False) -> Tensor:
        """Return x_ND times the weights, (rows, outputs); `in_tiles` of TILE rows at a time."""
        if in_tiles:
            return torch.cat([self.multiply(tile_ND) for tile_ND in torch.split(x_ND, TILE)])
        return self.multiply(x_ND)

    @abstractmethod
    def multiply(self, x_ND: Tensor) -> Tensor:
        """Return x_ND times the weights, all rows at once."""


class DenseProduct(Product):
    """As `nn.Linear` multiplies, in the weights' type."""

    def __init__(self, weight_FD: Tensor) -> None:
        super().__init__(weight_FD)
        self._weight_FD = weight_FD

    @property
    def form(self) -> str:
        return f"{super().form} {self._weight_FD.dtype}"

    def multiply(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND.to(self._weight_FD.dtype), self._weight_FD).float()


class ReorderedProduct(Product):
    """By oneDNN, with the weights laid out as its kernels read them."""

    def __init__(self, weight_FD: Tensor) -> None:
        super().__init__(weight_FD)
        self._dtype = weight_FD.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_FD)

    @property
    def form(self) -> str:
        return f"{super().form} {self._dtype}"

    def multiply(self, x_ND: Tensor) -> Tensor:
        out_NF: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_ND.to(self._dtype), self._weight, None, "none", [], ""
        )
        return out_NF.float()


class HalfProduct(Product):
    """By FBGEMM, from weights kept in fp16, multiplied and summed in fp32.

    Half the memory to read of fp32, at its speed of computing, on CPUs that multiply nothing but
    fp32. bf16 weights lose nothing in fp16 from 2^-17 to 2^16; below, the error is under 2^-25.
    """

    def __init__(self, weight_FD: Tensor) -> None:
        super().__init__(weight_FD)
        largest = float(weight_FD.abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise ResourceError(
                f"a weight of {largest:.3g} does not fit into fp16; decode with precision fp32"
            )
        self._weight = torch.ops.quantized.linear_prepack_fp16(weight_FD.float(), None)

    def multiply(self, x_ND: Tensor) -> Tensor:
        out_NF: Tensor = torch.ops.quantized.linear_dynamic_fp16(x_ND, self._weight)
        return out_NF


class Int8Product(Product):
    """In int8, see `int8.py`."""

    def __init__(self, weight_FD: Tensor) -> None:
        super().__init__(weight_FD)
        self._weights = Int8Weights(weight_FD.float())

    def multiply(self, x_ND: Tensor) -> Tensor:
        return self._weights.multiply(x_ND)


def make_product(weight_FD: Tensor, precision: Precision, *, int8: bool) -> Product:
    """Return the product with a weight matrix, rounded as the precision says.

    Raises ResourceError if the machine cannot: int8 is for CPUs that FBGEMM knows.
    """
    # The engine for x86 takes FBGEMM's kernels.
    has_fbgemm = torch.backends.quantized.engine in ("x86", "fbgemm")
    if int8:
        if weight_FD.device.type != "cpu" or not has_fbgemm:
            raise ResourceError("int8 = true: only on an x86 CPU; set int8=false")
        return Int8Product(weight_FD.detach())
    weight_FD = weight_FD.detach().to(DTYPES[precision])
    if weight_FD.device.type != "cpu":
        return DenseProduct(weight_FD.clone())
    low = precision is not Precision.FP32
    if low and has_fbgemm and not (precision is Precision.BF16 and multiplies_in_bf16()):
        return HalfProduct(weight_FD)
    if low and not multiplies_in_bf16():
        weight_FD = weight_FD.float()
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ReorderedProduct(weight_FD)
    return DenseProduct(weight_FD.clone())


def steady_rows(products: Iterable[Product], rows: int) -> tuple[int, bool]:
    """Return how many rows to multiply at once, and whether in tiles, so that rounding is steady.

    Kernels choose by the number of rows in which order they sum. The number returned, `rows` or a
    few more, is one at which each row gets, bit for bit, what it gets among TILE rows, whichever
    of the products it is multiplied with; where none is near, the rows go in tiles.
    """
    products = list(products)
    for padded in range(rows, rows + TILE):
        if all(_is_steady(product, padded) for product in products):
            return padded, False
    return -(-rows // TILE) * TILE, True


_steady: dict[tuple[object, ...], bool] = {}


def _is_steady(product: Product, rows: int) -> bool:
    """Whether so many rows give what tiles give; of numbers drawn at random, all alike or none."""
    key = (product.form, product.in_features, product.out_features, rows, torch.get_num_threads())
    if key not in _steady:
        tiles = -(-rows // TILE) * TILE
        generator = torch.Generator().manual_seed(rows)
        x_ND = torch.randn(tiles, product.in_features, generator=generator).to(product.device)
        in_tiles_NF = product(x_ND, in_tiles=True)[:rows]
        _steady[key] = torch.equal(product(x_ND[:rows]), in_tiles_NF)
    return _steady[key]
