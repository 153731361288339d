"""Matrix products in float8 (Micikevicius et al. 2022, arXiv 2209.05433), by torchao."""

from __future__ import annotations

import dataclasses

from torch import nn


def compute_in_float8(module: nn.Module, emulated: bool = False) -> None:
    """Have the module's linear layers multiply in float8, forward and backward, in place.

    Each row has a scale of its own, found anew at each product, so that the weights stay what
    they are and checkpoints are the same as without. `emulated` rounds as float8 does and
    multiplies in the layer's own precision: slow, but any device can.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # takes a second

    recipe = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(module, config=dataclasses.replace(recipe, emulate=emulated))
