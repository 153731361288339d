"""The model as decoding runs it: weights converted once, a cache, and a step for all rows.

It computes what `ReasoningTransformer` does, in fp32 but for the products, each of which rounds as
its weights' form does (`products.py`). The weights take up the parametrisation's multipliers.

Shape suffixes: R rows (positions of one prompt, or one of each row), D hidden, H query heads,
K key/value heads, S head size, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from svend.device import DTYPES, resolve_precision
from svend.models.kv_cache import KeyValueCache
from svend.models.parametrisation import ScalingRules
from svend.models.products import Product, make_product, steady_rows
from svend.models.transformer import Block, ReasoningTransformer, rotary_tables, rotate
from svend.pipeline.config import Precision

# Takes queries, keys and values of a layer, (rows, heads, head size); stores and attends.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# Row counts above this are rounded up to a multiple of it: few sizes to try.
ROW_STEP = 4


@dataclass(frozen=True)
class _Layer:
    """One block's weights; query, key and value are one product, gate and up another."""

    attention_gain: Tensor
    qkv: Product
    output: Product
    ffn_gain: Tensor
    gate_up: Product
    down: Product


class DecodingModel:
    """A model's weights as they are now, ready to decode rows in a cache of `lanes`.

    `invariant`: a row's numbers do not depend on how many rows there are, see `Decoder`.
    """

    def __init__(
        self,
        model: ReasoningTransformer,
        lanes: int,
        max_length: int,
        precision: Precision,
        *,
        int8: bool,
        invariant: bool,
    ) -> None:
        config = model.config
        device = model.head.weight.device
        precision = resolve_precision(precision, device)
        self._config = config
        self._invariant = invariant
        self._rows: dict[int, tuple[int, bool]] = {}

        def product(*weights: Tensor) -> Product:
            return make_product(torch.cat(weights), precision, int8=int8)

        with torch.no_grad():
            self._layers = [_convert(block, model.rules, product) for block in model.blocks]
            self._final_gain = model.final_norm.weight.detach().float().clone()
            self._head = product(model.rules.fold("head.weight", model.head.weight))
            self._embedding_VD = model.embedding.weight.detach().to(DTYPES[precision], copy=True)
            tables = rotary_tables(
                torch.arange(max_length, device=device)[None], config.head_size, config.rope_theta
            )
            self._cos_T1S, self._sin_T1S = (table[0, 0, :, None] for table in tables)
        cache_dtype = torch.float32 if device.type == "cpu" else DTYPES[precision]
        self.cache = KeyValueCache(config, lanes, max_length, cache_dtype, device, invariant)

    @torch.inference_mode()
    def extend(self, lane: int, start: int, tokens: Sequence[int]) -> Tensor:
        """Run tokens of one row from position `start` on; return the last one's logits, (1, V)."""
        x_RD = self._extend(lane, start, tokens)[-1:]
        return self._head(x_RD)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits at every position of a row, (positions, V). Overwrites lane 0."""
        return self._head(self._extend(0, 0, tokens))

    def _extend(self, lane: int, start: int, tokens: Sequence[int]) -> Tensor:
        def attend(layer: int, q_RHS: Tensor, k_RKS: Tensor, v_RKS: Tensor) -> Tensor:
            return self.cache.attend_span(layer, lane, start, q_RHS, k_RKS, v_RKS).float()

        positions = slice(start, start + len(tokens))
        tokens_R = torch.tensor(tokens, device=self._embedding_VD.device)
        return self._hidden_states(
            tokens_R, self._cos_T1S[positions], self._sin_T1S[positions], attend, False
        )

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Run one token of each row, in the lanes from the first on; return logits, (rows, V)."""
        rows = len(tokens)
        padded, in_tiles = self._padding(rows)
        device = self._embedding_VD.device
        filled = [*positions, *([0] * (padded - rows))]
        positions_R = torch.tensor(filled, device=device)
        tokens_R = torch.tensor([*tokens, *([0] * (padded - rows))], device=device)
        self.cache.begin_step(positions)
        x_RD = self._hidden_states(
            tokens_R, self._cos_T1S[positions_R], self._sin_T1S[positions_R],
            self.cache.attend_step, in_tiles,
        )
        return self._head(x_RD, in_tiles)[:rows]

    def _padding(self, rows: int) -> tuple[int, bool]:
        if not self._invariant:
            return rows, False
        if rows not in self._rows:
            wanted = rows if rows < ROW_STEP else -(-rows // ROW_STEP) * ROW_STEP
            first = self._layers[0]
            self._rows[rows] = steady_rows(
                (first.qkv, first.output, first.gate_up, first.down, self._head), wanted
            )
        return self._rows[rows]

    def _hidden_states(
        self, tokens_R: Tensor, cos_R1S: Tensor, sin_R1S: Tensor, attend: Attend, in_tiles: bool
    ) -> Tensor:
        """Return the normed hidden states before the head, (rows, hidden)."""
        config = self._config
        heads, kv_heads, size = config.heads, config.kv_heads, config.head_size
        x_RD = F.embedding(tokens_R, self._embedding_VD).float()
        for number, layer in enumerate(self._layers):
            qkv_RHS = layer.qkv(self._norm(x_RD, layer.attention_gain), in_tiles).view(
                -1, heads + 2 * kv_heads, size
            )
            turned_RHS = rotate(qkv_RHS[:, : heads + kv_heads], cos_R1S, sin_R1S)
            out_RHS = attend(
                number, turned_RHS[:, :heads], turned_RHS[:, heads:], qkv_RHS[:, heads + kv_heads :]
            )
            x_RD = x_RD + layer.output(out_RHS.flatten(1), in_tiles)
            gate_RF, up_RF = layer.gate_up(self._norm(x_RD, layer.ffn_gain), in_tiles).chunk(2, -1)
            x_RD = x_RD + layer.down(F.silu(gate_RF) * up_RF, in_tiles)
        return self._norm(x_RD, self._final_gain)

    def _norm(self, x_RD: Tensor, gain_D: Tensor) -> Tensor:
        return F.rms_norm(x_RD, gain_D.shape, gain_D, self._config.rms_norm_eps)


def _convert(
    block: torch.nn.Module, rules: ScalingRules, product: Callable[..., Product]
) -> _Layer:
    assert isinstance(block, Block)
    weights = {name: rules.fold(name, weight) for name, weight in block.named_parameters()}
    attention = [weights[f"attention.{name}_proj.weight"] for name in "qkvo"]
    ffn = [weights[f"feed_forward.{name}_proj.weight"] for name in ("gate", "up", "down")]
    return _Layer(
        block.attention_norm.weight.detach().float().clone(),
        product(*attention[:3]),
        product(attention[3]),
        block.feed_forward_norm.weight.detach().float().clone(),
        product(*ffn[:2]),
        product(ffn[2]),
    )
