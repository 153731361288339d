"""Whole documents into rows of one length, so that next to nothing is padding."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# Documents looked at together; within one the fit is best, across them the order stays random.
WINDOW = 4096


@dataclass(frozen=True)
class PackedRows:
    """Rows as runs of pieces; a piece is tokens [start, start + length) of the token array."""

    starts: Ints
    lengths: Ints
    row_offsets: Ints

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return int(self.lengths.sum())


def pack_rows(starts: Ints, lengths: Ints, row_length: int, *, split_long: bool) -> PackedRows:
    """Pack documents, given by place and length, into rows of `row_length` tokens.

    Best-fit decreasing within windows of documents (Ding et al. 2024, arXiv 2404.10830). A longer
    document is cut into pieces, or left out where `split_long` is false.
    """
    starts, lengths = _cut(starts, lengths, row_length, split_long)
    rows: list[list[int]] = []
    for first in range(0, len(lengths), WINDOW):
        rows.extend(_best_fit(lengths, first, min(first + WINDOW, len(lengths)), row_length))
    order = np.array([piece for row in rows for piece in row], dtype=np.int64)
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    return PackedRows(starts[order], lengths[order], offsets)


def _cut(starts: Ints, lengths: Ints, row_length: int, split_long: bool) -> tuple[Ints, Ints]:
    if not split_long:
        fits = lengths <= row_length
        return starts[fits], lengths[fits]
    pieces = -(-lengths // row_length)
    document = np.repeat(np.arange(len(lengths)), pieces)
    within = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = within * row_length
    return starts[document] + offset, np.minimum(lengths[document] - offset, row_length)


def _best_fit(lengths: Ints, first: int, last: int, row_length: int) -> list[list[int]]:
    """Put each piece, longest first, into the row with the least room that still takes it."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for piece in sorted(range(first, last), key=lambda index: (-int(lengths[index]), index)):
        length = int(lengths[piece])
        place = bisect.bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if room > length:
            bisect.insort(open_rows, (room - length, row))
    return rows
