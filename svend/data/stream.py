"""The order in which a run sees its data. The whole state is one integer.

Documents are mixed by the recipe's ratios and packed once; every epoch shuffles the rows anew
from the seed. Sequence number i is therefore known without having read the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svend.data.corpus import KINDS, TokenArray
from svend.data.packing import PackedRows, pack_rows
from svend.data.sources import mix_of
from svend.errors import DataError
from svend.pipeline.config import DataConfig, LongDocuments

PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class Batch:
    """Token ids, (batch, positions), and the number of each position's document in its row.

    Padding has document number -1.
    """

    tokens_BT: Tensor
    documents_BT: Tensor


class PackedSequences:
    """The rows of one part of a corpus, mixed, packed, and shuffled anew each epoch."""

    def __init__(self, part: TokenArray, data: DataConfig, seed: int) -> None:
        assert data.max_seq_length is not None  # set by PipelineConfig.resolve
        self._tokens = part.tokens
        self._length = data.max_seq_length
        self._seed = seed
        documents = mix_documents(part, mix_of(data), seed)
        self.mixed_documents = documents
        self._rows: PackedRows = pack_rows(
            part.offsets[documents],
            part.lengths[documents],
            self._length,
            split_long=data.long_documents is LongDocuments.SPLIT,
        )
        if len(self._rows) == 0:
            raise DataError(
                f"no document fits into {self._length} tokens; "
                "raise data.max_seq_length or set data.long_documents=split"
            )

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return len(self._rows)

    def batch(self, first: int, size: int) -> Batch:
        """Return sequences first .. first + size - 1 of the endless order over epochs."""
        tokens_BT = np.zeros((size, self._length), dtype=np.int64)
        documents_BT = np.full((size, self._length), PADDING_DOCUMENT, dtype=np.int64)
        for slot, number in enumerate(range(first, first + size)):
            epoch, place = divmod(number, len(self._rows))
            row = self._epoch_order(epoch)[place]
            at = 0
            pieces = range(self._rows.row_offsets[row], self._rows.row_offsets[row + 1])
            for document, piece in enumerate(pieces):
                start, length = self._rows.starts[piece], self._rows.lengths[piece]
                tokens_BT[slot, at : at + length] = self._tokens[start : start + length]
                documents_BT[slot, at : at + length] = document
                at += length
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(documents_BT))

    def first(self, count: int) -> Iterator[Batch]:
        """Yield the first `count` sequences, or all if there are fewer, one to a batch."""
        return (self.batch(number, 1) for number in range(min(count, len(self))))

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != getattr(self, "_ordered_epoch", None):
            generator = np.random.default_rng([self._seed, epoch])
            self._order = generator.permutation(len(self._rows))
            self._ordered_epoch = epoch
        return self._order


class BatchStream:
    """An endless iterator of micro-batches whose state is the number of the next sequence."""

    def __init__(self, sequences: PackedSequences, batch_size: int) -> None:
        self._sequences = sequences
        self._batch_size = batch_size
        self.next_sequence = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._sequences.batch(self.next_sequence, self._batch_size)
        self.next_sequence += self._batch_size
        return batch

    @property
    def epoch(self) -> int:
        """Whole epochs that have been read."""
        return self.next_sequence // len(self._sequences)

    def state_dict(self) -> dict[str, int]:
        return {"next_sequence": self.next_sequence}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.next_sequence = state["next_sequence"]


def mix_documents(
    part: TokenArray, ratios: Mapping[str, float], seed: int
) -> npt.NDArray[np.int64]:
    """Return documents in random order whose tokens are of the kinds in these ratios.

    The kind that is scarcest for its ratio is used up; the others are cut to fit.
    """
    generator = np.random.default_rng([seed, 0x5EED])
    lengths = part.lengths
    of_kind = {
        kind.value: generator.permutation(np.flatnonzero(part.kinds == number))
        for number, kind in enumerate(KINDS)
        if ratios.get(kind.value, 0.0) > 0
    }
    for kind, documents in of_kind.items():
        if not len(documents):
            raise DataError(
                f"no documents of kind '{kind}' in the {part.name} part; raise "
                "training.data.num_samples or training.data.heldout_fraction, or give more data"
            )
    total = min(lengths[documents].sum() / ratios[kind] for kind, documents in of_kind.items())
    chosen = []
    for kind, documents in of_kind.items():
        reached = np.cumsum(lengths[documents])
        chosen.append(documents[: int(np.searchsorted(reached, total * ratios[kind])) + 1])
    return generator.permutation(np.concatenate(chosen))
