"""Rows of each kind of the mix, and in which order the kinds take turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from svend.data.packing import Ints, PackedRows, pack_rows
from svend.data.token_array import KINDS, TokenArray
from svend.errors import DataError


@dataclass(eq=False)
class KindRows:
    """The rows of one kind, in an order that changes each time they have been gone through.

    kind: its number among KINDS. sources: the numbers of those that it comes from. dropped, split:
    documents that are longer than a row, and were left out or cut.
    """

    kind: int
    rows: PackedRows
    sources: npt.NDArray[np.uint8]
    seed: int
    dropped: int
    split: int
    _latest_order: tuple[int, Ints] = (-1, np.empty(0, dtype=np.int64))

    @classmethod
    def packed(
        cls, part: TokenArray, kind: int, row_length: int, split_long: bool, seed: int
    ) -> KindRows:
        """Pack the documents of a kind. Raises DataError if there are none, or none fits a row."""
        documents = np.flatnonzero(part.kinds == kind)
        name = KINDS[kind].value
        if not len(documents):
            raise DataError(
                f"no documents of kind '{name}' in the {part.name} part; raise "
                "training.data.num_samples or training.data.heldout_fraction, or give more data"
            )
        documents = np.random.default_rng([seed, kind, 0x5EED]).permutation(documents)
        lengths = part.lengths[documents]
        rows = pack_rows(part.starts[documents], lengths, row_length, split_long=split_long)
        if len(rows) == 0:
            raise DataError(
                f"no document of kind '{name}' fits into {row_length} tokens; "
                "raise data.max_seq_length or set data.long_documents=split"
            )
        longer = int((lengths > row_length).sum())
        return cls(kind, rows, np.unique(part.sources[documents]), seed,
                   dropped=0 if split_long else longer, split=longer if split_long else 0)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens_per_row(self) -> float:
        """How many tokens a row holds in the mean, padding not counted."""
        return self.rows.tokens / len(self.rows)

    def pieces(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield start and length of each piece in row `number` of the kind's endless order."""
        turn, place = divmod(number, len(self.rows))
        known_turn, order = self._latest_order
        if turn != known_turn:
            generator = np.random.default_rng([self.seed, self.kind, turn])
            order = generator.permutation(len(self.rows))
            self._latest_order = turn, order  # at once: several threads may read
        row = order[place]
        for piece in range(self.rows.row_offsets[row], self.rows.row_offsets[row + 1]):
            yield int(self.rows.starts[piece]), int(self.rows.lengths[piece])


def apportion(shares: list[float], seats: int) -> list[int]:
    """Return whole numbers in these proportions, of at least 1, that sum to `seats`.

    By the method of the largest remainder.
    """
    exact = [share / sum(shares) * seats for share in shares]
    counts = [max(1, int(value)) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i]):
        if sum(counts) >= seats:
            break
        counts[index] += 1
    counts[int(np.argmax(counts))] += seats - sum(counts)
    return counts


def interleave(counts: list[int]) -> tuple[npt.NDArray[np.intp], Ints]:
    """Return which kind each place of the pattern has, and its number among those of the kind.

    The j-th of n places of a kind is due at (j + 1/2) / n; in this order no stretch has more or
    less than its share of a kind, but for a row or two.
    """
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    kinds = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(due, kind="stable")
    return kinds[order], ranks[order]
