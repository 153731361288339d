"""Matrix products with weights of a fixed form: right, and rounded alike for any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svend.device import multiplies_in_bf16
from svend.errors import ResourceError
from svend.models.products import (
    TILE,
    DenseProduct,
    HalfProduct,
    Int8Product,
    Product,
    ReorderedProduct,
    make_product,
    steady_rows,
)
from svend.pipeline.config import Precision

FORMS = [
    (DenseProduct, torch.float32, 1e-5), (ReorderedProduct, torch.float32, 1e-5),
    pytest.param(ReorderedProduct, torch.bfloat16, 1e-2, marks=pytest.mark.skipif(
        not multiplies_in_bf16(), reason="this CPU has no products in bf16"
    )),
    (HalfProduct, torch.bfloat16, 1e-5),
    (Int8Product, torch.float32, 5e-2),
]


def weights(outputs: int = 24, inputs: int = 40, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def rows(count: int, inputs: int = 40) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(("form", "dtype", "tolerance"), FORMS)
@pytest.mark.parametrize("count", [1, 7, 33])
def test_every_form_multiplies(
    form: type[Product], dtype: torch.dtype, tolerance: float, count: int
) -> None:
    weight_FD = weights().to(dtype)
    x_ND = rows(count)
    out_NF = form(weight_FD)(x_ND)
    expected_NF = x_ND @ weight_FD.float().T
    assert out_NF.dtype == torch.float32
    assert float((out_NF - expected_NF).norm() / expected_NF.norm()) < tolerance


@pytest.mark.parametrize(("form", "dtype", "_"), FORMS)
def test_rows_padded_as_told_round_alike_whatever_their_number(
    form: type[Product], dtype: torch.dtype, _: float
) -> None:
    product = form(weights(136, 512).to(dtype))
    x_ND = rows(48, 512)
    expected_NF = product(x_ND, in_tiles=True)
    for count in range(1, 41):
        padded, in_tiles = steady_rows([product], count)
        assert count <= padded < count + TILE
        filled_ND = torch.zeros(padded, 512)
        filled_ND[:count] = x_ND[:count]
        assert torch.equal(product(filled_ND, in_tiles)[:count], expected_NF[:count])


def test_int8_treats_each_row_by_itself() -> None:
    product = Int8Product(weights())
    x_ND = rows(9) * torch.logspace(-3, 3, 9)[:, None]
    x_ND[4] = 0.0
    together_NF = product(x_ND)
    for number in range(9):
        assert torch.equal(product(x_ND[number : number + 1]), together_NF[number : number + 1])
    assert torch.equal(together_NF[4], torch.zeros(24))


def test_products_that_round_by_the_number_of_rows_go_in_tiles() -> None:
    class Unsteady(Product):
        def multiply(self, x_ND: Tensor) -> Tensor:
            return x_ND.sum(dim=1, keepdim=True) + len(x_ND)

    product = Unsteady(weights(1))
    assert steady_rows([product], 5) == (TILE, False)
    assert steady_rows([product], TILE + 1) == (2 * TILE, True)
    assert torch.equal(
        product(rows(2 * TILE), in_tiles=True), rows(2 * TILE).sum(dim=1, keepdim=True) + TILE
    )


def test_a_weight_that_fp16_does_not_hold_is_refused() -> None:
    with pytest.raises(ResourceError, match="a weight of 1e\\+05 does not fit into fp16"):
        HalfProduct(torch.full((8, 8), 1e5))


def test_fp32_weights_are_multiplied_as_they_are() -> None:
    product = make_product(weights(), Precision.FP32, int8=False)
    x_ND = rows(5)
    torch.testing.assert_close(product(x_ND), x_ND @ weights().T, rtol=1e-5, atol=1e-5)
