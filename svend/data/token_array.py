"""Tokenised documents as one array: where each lies, and what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from svend.data.documents import Kind
from svend.data.packing import Ints

KINDS = tuple(Kind)


class Tokens:
    """Token ids in several files, addressed as if they were one."""

    def __init__(self, arrays: Sequence[npt.NDArray[np.unsignedinteger]]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in self._arrays])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._arrays else 0

    def read(self, start: int, length: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `length` tokens from `start`, which lie in one file."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        begin = start - int(self._ends[number] - len(self._arrays[number]))
        return self._arrays[number][begin : begin + length]


@dataclass(frozen=True)
class TokenArray:
    """One part of a corpus: where each document's tokens lie, and what it is.

    `marks` says by token id who begins to speak (`chat.speaker_marks`); None where nobody does.
    """

    name: str
    tokens: Tokens
    starts: Ints
    lengths: Ints
    kinds: npt.NDArray[np.uint8]
    sources: npt.NDArray[np.uint8]
    text_bytes: npt.NDArray[np.uint32]
    marks: npt.NDArray[np.int8] | None = None

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def of(
        cls, name: str, documents: Sequence[npt.NDArray[Any]], kinds: Sequence[Kind]
    ) -> TokenArray:
        """Return the documents, held in memory, as a part."""
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        return cls(
            name,
            Tokens([np.concatenate(documents)]),
            np.cumsum(lengths) - lengths,
            lengths,
            np.array([KINDS.index(kind) for kind in kinds], dtype=np.uint8),
            np.zeros(len(documents), dtype=np.uint8),
            lengths.astype(np.uint32),
        )
