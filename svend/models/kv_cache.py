"""Keys and values of the rows that are being decoded, and attention over them.

On CPU each row attends over its own length, rounded up to a block, so that what it gets depends on
nothing but itself. Neighbouring rows of equally many blocks share one call of torch's kernel, which
computes each row and head by itself.

Shape suffixes: N layers, L lanes, H query heads, K key/value heads, G query heads per key/value
head, T positions, S head size, R rows of a step (one token each), C columns that a row sees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svend.models.config import TransformerConfig

BLOCK = 128


class _Run(NamedTuple):
    """Neighbouring lanes whose rows have equally many blocks: (layers, rows, K, columns, S)."""

    lanes: slice
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask_RGC: Tensor


class KeyValueCache:
    """Preallocated keys and values, (layers, lanes, key/value heads, max length, head size).

    `fixed_span`: on CUDA, attend over the whole length at every step, so that the shape of the
    products does not depend on the other rows.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lanes: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        fixed_span: bool,
    ) -> None:
        self.lanes, self.max_length = lanes, max_length
        self._room = -(-max_length // BLOCK) * BLOCK
        self._group = config.heads // config.kv_heads
        self._fixed_span = fixed_span
        shape = (config.num_hidden_layers, lanes, config.kv_heads, self._room, config.head_size)
        # Zeros: what is masked is multiplied by zero, so it must be finite.
        self.keys_NLKTS = torch.zeros(shape, dtype=dtype, device=device)
        self.values_NLKTS = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = tuple(
            zip(self.keys_NLKTS.unbind(0), self.values_NLKTS.unbind(0), strict=True)
        )
        self._lane_L = torch.arange(lanes, device=device)
        self._column_T = torch.arange(self._room, device=device)
        self._positions_R = self._lane_L[:0]
        self._mask_RC = torch.empty(0)
        self._blocks: list[int] = []
        self._runs: dict[tuple[int, int, int], _Run] = {}

    def attend_span(
        self, layer: int, lane: int, start: int, q_THS: Tensor, k_TKS: Tensor, v_TKS: Tensor
    ) -> Tensor:
        """Store the keys and values of positions from `start` on, and attend from each.

        Each position sees the lane's earlier ones and itself. Returns (positions, heads, size).
        """
        keys_LKTS, values_LKTS = self._layers[layer]
        stop = start + len(q_THS)
        keys_LKTS[lane, :, start:stop] = k_TKS.transpose(0, 1)
        values_LKTS[lane, :, start:stop] = v_TKS.transpose(0, 1)
        mask_TC = None
        if start > 0:
            column_C = self._column_T[:stop]
            mask_TC = column_C <= column_C[start:, None]
        out_1HTS = F.scaled_dot_product_attention(
            q_THS.to(keys_LKTS.dtype).transpose(0, 1)[None],
            keys_LKTS[lane : lane + 1, :, :stop],
            values_LKTS[lane : lane + 1, :, :stop],
            attn_mask=mask_TC,
            is_causal=start == 0,
            enable_gqa=self._group > 1,
        )
        return out_1HTS[0].transpose(0, 1)

    def begin_step(self, positions: Sequence[int]) -> None:
        """Say at which position the row of each lane, from the first on, adds its next token."""
        device = self._lane_L.device
        self._positions_R = torch.tensor(positions, device=device)
        if device.type == "cpu":
            self._begin_runs([position // BLOCK + 1 for position in positions])
            return
        span = self._room if self._fixed_span else (max(positions) // BLOCK + 1) * BLOCK
        self._mask_RC = self._column_T[:span] <= self._positions_R[:, None]

    def _begin_runs(self, blocks: list[int]) -> None:
        columns = max(blocks) * BLOCK
        seen_RC = self._column_T[:columns] <= self._positions_R[:, None]
        if blocks != self._blocks or not self._runs:
            self._blocks = blocks
            self._mask_RC = torch.empty(len(blocks), columns, dtype=self.keys_NLKTS.dtype)
            self._runs = self._lay_out_runs(blocks)
        self._mask_RC.fill_(-math.inf).masked_fill_(seen_RC, 0.0)

    def _lay_out_runs(self, blocks: list[int]) -> dict[tuple[int, int, int], _Run]:
        runs, old, start = {}, self._runs, 0
        for count, members in itertools.groupby(blocks):
            stop = start + len(list(members))
            key = (start, stop, count)
            lanes, columns = slice(start, stop), slice(0, count * BLOCK)
            mask_RGC = self._mask_RC[lanes, None, None, columns].expand(-1, 1, self._group, -1)
            if key in old:
                runs[key] = old[key]._replace(mask_RGC=mask_RGC)
            else:
                runs[key] = _Run(
                    lanes,
                    self.keys_NLKTS[:, lanes, :, columns].unbind(0),
                    self.values_NLKTS[:, lanes, :, columns].unbind(0),
                    mask_RGC,
                )
            start = stop
        return runs

    def attend_step(self, layer: int, q_RHS: Tensor, k_RKS: Tensor, v_RKS: Tensor) -> Tensor:
        """Store one key and value for each row of the step, and attend from it.

        There may be more rows than `begin_step` was told of: those get zeros. Returns
        (rows, heads, size), as q_RHS is.
        """
        rows = len(self._positions_R)
        keys_LKTS, values_LKTS = self._layers[layer]
        places = (self._lane_L[:rows], slice(None), self._positions_R)
        keys_LKTS[places] = k_RKS[:rows].to(keys_LKTS.dtype)
        values_LKTS[places] = v_RKS[:rows].to(values_LKTS.dtype)
        # The query heads that share a key head are so many queries of it.
        by_group = (rows, -1, self._group, q_RHS.shape[2])
        q_RKGS = q_RHS[:rows].to(keys_LKTS.dtype).reshape(by_group)
        out_RHS = torch.zeros_like(q_RHS, memory_format=torch.contiguous_format)
        out_RKGS = out_RHS[:rows].view(by_group)
        if q_RHS.device.type != "cpu":
            columns = self._mask_RC.shape[1]
            out_RKGS.copy_(F.scaled_dot_product_attention(
                q_RKGS, keys_LKTS[:rows, :, :columns], values_LKTS[:rows, :, :columns],
                attn_mask=self._mask_RC[:, None, None],
            ))
            return out_RHS
        for run in self._runs.values():
            out_RKGS[run.lanes] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_RKGS[run.lanes], run.keys[layer], run.values[layer], attn_mask=run.mask_RGC
            )[0]
        return out_RHS

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one lane to another."""
        for cache_NLKTS in (self.keys_NLKTS, self.values_NLKTS):
            cache_NLKTS[:, target, :, :length] = cache_NLKTS[:, source, :, :length]
