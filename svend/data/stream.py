"""The order in which a run sees its data. The whole state is one integer.

Each kind of the mix is packed into rows of its own; every time a kind is gone through, its rows
are shuffled anew from the seed. Row number i of a run is of a kind that i alone decides, so that
the mix holds over any stretch, and any row is known without having read the ones before it.
"""

from __future__ import annotations

import math
import operator
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svend.data.chat import spoken_by_model
from svend.data.mixing import KindRows, apportion, interleave
from svend.data.packing import Ints
from svend.data.sources import mix_of
from svend.data.token_array import KINDS, TokenArray
from svend.pipeline.config import DataConfig, Exhausted, LongDocuments, LossOn

PADDING_DOCUMENT = -1
IGNORE_LABEL = -100
# Rows after which the pattern of kinds repeats; ratios are kept to one part in so many.
PERIOD = 10_000
BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """Token ids, labels and document numbers, each (batch, positions).

    A label is the id of the next token of the same document, or -100 where there is none or where
    training is not to learn it. Padding has document number -1.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    documents_BT: Tensor

    @classmethod
    def of(cls, tokens_BT: Tensor, documents_BT: Tensor) -> Batch:
        """Return a batch in which every next token is to be learnt."""
        return cls(tokens_BT, next_token_labels(tokens_BT, documents_BT), documents_BT)

    @property
    def predicted_tokens(self) -> int:
        """How many labels are to be learnt; the batch is to be on the CPU, else this waits."""
        return int((self.labels_BT >= 0).sum())


class PackedSequences:
    """The rows of one part of a corpus, packed by kind, mixed, and shuffled anew each epoch."""

    def __init__(self, part: TokenArray, data: DataConfig, seed: int) -> None:
        assert data.max_seq_length is not None  # set by PipelineConfig.resolve
        self._part = part
        self._length = data.max_seq_length
        self._marks = part.marks if data.loss_on is LossOn.ANSWERS else None
        mix = mix_of(data)
        split_long = data.long_documents is LongDocuments.SPLIT
        self._kinds = [
            KindRows.packed(part, number, self._length, split_long, seed)
            for number, kind in enumerate(KINDS) if mix.get(kind.value, 0.0) > 0
        ]
        # Rows of one kind may be fuller than another's, and the ratios are of tokens.
        needed = [mix[KINDS[rows.kind].value] / rows.tokens_per_row for rows in self._kinds]
        self._counts = apportion(needed, PERIOD)
        self._pattern, self._ranks = interleave(self._counts)
        epochs = [len(rows) * PERIOD / count
                  for rows, count in zip(self._kinds, self._counts, strict=True)]
        longest = data.exhausted is Exhausted.REPEAT
        self._epoch_rows = max(1, math.ceil(max(epochs)) if longest else int(min(epochs)))

    def __len__(self) -> int:
        """Sequences in one epoch: until a kind of the mix runs out, or all have been seen."""
        return self._epoch_rows

    @property
    def padding(self) -> float:
        """The share of positions in an epoch that hold no token."""
        return 1 - sum(self.tokens_by_kind(len(self)).values()) / (len(self) * self._length)

    @property
    def dropped_documents(self) -> int:
        """Documents left out because they are longer than a row."""
        return sum(rows.dropped for rows in self._kinds)

    @property
    def split_documents(self) -> int:
        """Documents cut because they are longer than a row."""
        return sum(rows.split for rows in self._kinds)

    def tokens_by_kind(self, sequences: int) -> dict[str, int]:
        """Return about how many tokens of each kind the first so many sequences hold."""
        return {
            KINDS[rows.kind].value: round(count * rows.tokens_per_row)
            for rows, count in zip(self._kinds, self._rows_by_kind(sequences), strict=True)
        }

    def epochs_by_source(self, sequences: int) -> dict[int, float]:
        """Return how often the first so many sequences go through each source, by its number."""
        return {
            int(source): count / len(rows)
            for rows, count in zip(self._kinds, self._rows_by_kind(sequences), strict=True)
            for source in rows.sources
        }

    def batch(self, first: int, size: int) -> Batch:
        """Return sequences first .. first + size - 1 of the endless order."""
        tokens_BT = torch.zeros((size, self._length), dtype=torch.int64)
        documents_BT = torch.full_like(tokens_BT, PADDING_DOCUMENT)
        learnt_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        for slot, number in enumerate(range(first, first + size)):
            self._fill(
                number, tokens_BT[slot].numpy(), documents_BT[slot].numpy(),
                learnt_BT[slot].numpy(),
            )
        labels_BT = next_token_labels(tokens_BT, documents_BT)
        labels_BT[:, :-1].masked_fill_(~learnt_BT[:, 1:], IGNORE_LABEL)
        return Batch(tokens_BT, labels_BT, documents_BT)

    def empty_batch(self) -> Batch:
        """Return a sequence that holds no token."""
        tokens_BT = torch.zeros((1, self._length), dtype=torch.int64)
        return Batch.of(tokens_BT, torch.full_like(tokens_BT, PADDING_DOCUMENT))

    def first(self, count: int) -> Iterator[Batch]:
        """Yield the first `count` sequences, or all if there are fewer, one to a batch."""
        return (self.batch(number, 1) for number in range(min(count, len(self))))

    def bytes_per_token(self, count: int) -> float:
        """Return bytes of text per token in the first `count` sequences, or in all.

        A piece of a document counts by its tokens.
        """
        text_bytes, tokens = 0.0, 0
        for number in range(min(count, len(self))):
            for start, length in self._pieces(number):
                document = self._document_at(start)
                share = length / self._part.lengths[document]
                text_bytes += self._part.text_bytes[document] * share
                tokens += length
        return text_bytes / tokens

    def documents(self, number: int) -> list[tuple[int, int]]:
        """Return source number and place in the part of each document in sequence `number`."""
        found = [self._document_at(start) for start, _ in self._pieces(number)]
        return [(int(self._part.sources[document]), document) for document in found]

    def _rows_by_kind(self, sequences: int) -> Ints:
        blocks, place = divmod(sequences, PERIOD)
        begun = np.bincount(self._pattern[:place], minlength=len(self._kinds))
        return blocks * np.array(self._counts) + begun

    def _pieces(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield start and length of what sequence `number` holds."""
        block, place = divmod(number, PERIOD)
        kind = int(self._pattern[place])
        rows = self._kinds[kind]
        return rows.pieces(block * self._counts[kind] + int(self._ranks[place]))

    def _fill(
        self, number: int, tokens_T: Ints, documents_T: Ints, learnt_T: npt.NDArray[np.bool_]
    ) -> None:
        """Write sequence `number`: its tokens, their documents, and which are to be predicted."""
        at, begins, spoken = 0, [], []
        for document, (start, length) in enumerate(self._pieces(number)):
            tokens_T[at : at + length] = self._part.tokens.read(start, length)
            documents_T[at : at + length] = document
            if self._marks is not None:
                begins.append(at)
                spoken.append(self._is_spoken_at(start))
            at += length
        if self._marks is not None:
            learnt_T[:at] = spoken_by_model(tokens_T[:at], begins, spoken, self._marks)

    def _is_spoken_at(self, start: int) -> bool:
        """Whether the model speaks where a piece starts that begins with no control token."""
        assert self._marks is not None
        begin = int(self._part.starts[self._document_at(start)])
        if start == begin:
            return True  # running text: a conversation begins with a control token
        before_T = self._part.tokens.read(begin, start - begin).astype(np.int64)
        return bool(spoken_by_model(before_T, [0], [True], self._marks)[-1])

    def _document_at(self, start: int) -> int:
        order = self._order_of_starts
        return int(order[np.searchsorted(self._part.starts[order], start, side="right") - 1])

    @cached_property
    def _order_of_starts(self) -> Ints:
        return np.argsort(self._part.starts, kind="stable")


class BatchStream:
    """An endless iterator of micro-batches whose state is the number of the next sequence.

    An optimizer step takes `accumulation * batch_size` sequences, however many processes there are:
    each of the `ranks` takes its share of them, in `passes` micro-batches. What comes next is made
    meanwhile, in a thread of its own.
    """

    def __init__(
        self, sequences: PackedSequences, batch_size: int, accumulation: int = 1, rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._sequences = sequences
        self._sequences_per_step = accumulation * batch_size
        self._shares = deal_step(self._sequences_per_step, batch_size, rank, ranks)
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: deque[Future[Batch]] = deque()
        self._read = 0  # micro-batches of the step that is under way
        self.next_sequence = 0
        self.waited_seconds = 0.0

    @property
    def passes(self) -> int:
        """Micro-batches of an optimizer step: the same for each rank."""
        return len(self._shares)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._ahead) < 1 + BATCHES_AHEAD:
            self._ahead.append(self._begin(self._read + len(self._ahead)))
        started_seconds = time.perf_counter()
        batch = self._ahead.popleft().result()
        self.waited_seconds += time.perf_counter() - started_seconds
        self._read += 1
        if self._read == self.passes:
            self._read = 0
            self.next_sequence += self._sequences_per_step
        return batch

    def _begin(self, number: int) -> Future[Batch]:
        """Begin to make a micro-batch, by its number from the start of this step on."""
        step, place = divmod(number, self.passes)
        share = self._shares[place]
        if not share:
            return self._maker.submit(self._sequences.empty_batch)
        first = self.next_sequence + step * self._sequences_per_step + share.start
        return self._maker.submit(self._sequences.batch, first, len(share))

    @property
    def epoch(self) -> int:
        """Whole epochs that have been read."""
        return self.next_sequence // len(self._sequences)

    def epochs_by_source(self) -> dict[int, float]:
        """Return how often each source has been gone through, by its number."""
        return self._sequences.epochs_by_source(self.next_sequence)

    def state_dict(self) -> dict[str, int]:
        """Return the state between two optimizer steps."""
        assert self._read == 0
        return {"next_sequence": self.next_sequence}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up what `state_dict` returned."""
        self.next_sequence = operator.index(state["next_sequence"])
        self._ahead.clear()
        self._read = 0


def deal_step(sequences: int, batch_size: int, rank: int, ranks: int) -> list[range]:
    """Return the share of a rank in the sequences of an optimizer step, pass by pass.

    Shares differ by one sequence at most. Every rank has as many passes as the others, of at most
    `batch_size` sequences each: the last may hold fewer, or none.
    """
    share, more = divmod(sequences, ranks)
    first, count = rank * share + min(rank, more), share + (rank < more)
    longest = share + (more > 0)
    return [
        range(first + done, first + min(done + batch_size, count))
        for done in range(0, longest, batch_size)
    ]


def next_token_labels(tokens_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """Return the next token of the same document at each position, else IGNORE_LABEL.

    documents_BT numbers the documents of a row; a negative number is padding.
    """
    labels_BT = torch.full_like(tokens_BT, IGNORE_LABEL)
    follows_BT = (documents_BT[:, 1:] == documents_BT[:, :-1]) & (documents_BT[:, 1:] >= 0)
    labels_BT[:, :-1] = torch.where(follows_BT, tokens_BT[:, 1:], IGNORE_LABEL)
    return labels_BT
