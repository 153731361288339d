"""Batched decoding: rows of their own length, which leave when they are done and make room.

Every prompt is read by itself; rows then advance together, a token a step, each in a lane of one
preallocated key/value cache. A row that is done leaves, and the next request takes its place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from svend.device import resolve_precision
from svend.errors import DataError
from svend.models.decoding import CachedTransformer
from svend.models.sampling import Sampling, choose_tokens, uniform
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import Precision

__all__ = ["Completion", "Decoder", "PlainTurn", "Request", "Sampling", "Turn"]

# Rows in one matrix product of an invariant decoder, those of empty lanes included.
INVARIANT_ROWS = 32
GREEDY = Sampling()


class Turn(Protocol):
    """Decides, token by token, how a row goes on."""

    def take(self, token: int) -> Sequence[int] | None:
        """Take a sampled token; return what is put after it, or None where the row ends."""
        ...


class PlainTurn:
    """Ends after so many tokens, at one of some tokens, or after one of some sequences of them."""

    def __init__(
        self,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        stop_sequences: Sequence[Sequence[int]] = (),
    ) -> None:
        self._left = max_new_tokens
        self._stop_ids = frozenset(stop_ids)
        self._stop_sequences = [tuple(sequence) for sequence in stop_sequences]
        self._tail: tuple[int, ...] = ()
        self._tail_length = max(map(len, self._stop_sequences), default=0)

    def take(self, token: int) -> Sequence[int] | None:
        """Return nothing to put after the token, or None where the row ends with it."""
        self._left -= 1
        if self._tail_length:
            self._tail = (*self._tail, token)[-self._tail_length :]
        stops = token in self._stop_ids or any(
            self._tail[-len(sequence) :] == sequence for sequence in self._stop_sequences
        )
        return None if stops or self._left <= 0 else ()


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token, and what decides how it goes on; the seed is for drawing."""

    prompt: Sequence[int]
    turn: Turn
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    index: the request's place among all. tokens: those sampled and those put between them, the last
    one included. complete: whether the turn ended it, rather than a full cache.
    """

    index: int
    tokens: list[int]
    complete: bool


@dataclass
class _Row:
    """A request in its lane: `cached` of its tokens are in the cache, `next` is not yet."""

    index: int
    request: Request
    cached: int = 0
    next: int = -1
    tokens: list[int] = field(default_factory=list)


class Decoder:
    """Answers requests, `lanes` at a time, with a model's weights as they are now.

    max_length: of a prompt and what follows it. invariant: every product has the same shape
    whatever the lanes, and attention reads the whole cache, so that a row's tokens do not depend on
    how many rows there are; else only the rows and positions that there are cost time. int8: the
    matrices are rounded to 8 bits; meant for few lanes.
    """

    def __init__(
        self,
        model: ReasoningTransformer,
        *,
        lanes: int,
        max_length: int,
        precision: Precision,
        sampling: Sampling = GREEDY,
        int8: bool = False,
        invariant: bool = False,
    ) -> None:
        self._lanes, self._invariant, self._sampling = lanes, invariant, sampling
        rows = -(-lanes // INVARIANT_ROWS) * INVARIANT_ROWS if invariant else lanes
        precision = resolve_precision(precision, model.head.weight.device)
        self._max_length = max_length
        self._transformer = CachedTransformer(model, rows, max_length, precision, int8)
        self.steps = 0

    @torch.inference_mode()
    def score(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits after each token of a text, (tokens, vocabulary), in fp32."""
        hidden_ND = self._transformer.extend_all(0, 0, list(tokens))
        return self._transformer.logits(hidden_ND).float()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions as they are done; a request is taken when there is a lane for it.

        Raises DataError for a prompt that is empty, or as long as what a lane can hold.
        """
        waiting = enumerate(requests)
        rows: list[_Row] = []  # in lanes 0, 1, ...
        while True:
            while len(rows) < self._lanes and (taken := next(waiting, None)) is not None:
                row = _Row(*taken)
                self._check(row)
                completion = self._extend(row, len(rows), list(row.request.prompt))
                if completion is None:
                    rows.append(row)
                else:
                    yield completion
            if not rows:
                return
            for lane, completion in self._advance(rows):
                yield completion
                # The last row takes the lane, so that those in use stay neighbours.
                last = rows.pop()
                if lane < len(rows):
                    self._transformer.move(len(rows), lane, last.cached)
                    rows[lane] = last

    def _check(self, row: _Row) -> None:
        length = len(row.request.prompt)
        if length == 0:
            raise DataError(f"request {row.index}: the prompt is empty; give at least one token")
        if length >= self._max_length:
            raise DataError(
                f"request {row.index}: a prompt of {length} tokens leaves no room for an answer "
                f"within {self._max_length}; shorten it"
            )

    @torch.inference_mode()
    def _advance(self, rows: list[_Row]) -> list[tuple[int, Completion]]:
        """Take a step with every row; return those that are done with their lanes, last first."""
        chosen = self._choose(self._step(rows), rows)
        self.steps += 1
        done = []
        for lane, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            row.cached += 1
            completion = self._accept(row, lane, token)
            if completion is not None:
                done.append((lane, completion))
        return done[::-1]

    def _step(self, rows: list[_Row]) -> Tensor:
        """Return the logits of every row after its next token."""
        transformer = self._transformer
        tokens, lengths = [row.next for row in rows], [row.cached for row in rows]
        if not self._invariant:
            hidden_ND = transformer.step(
                slice(0, len(rows)), tokens, lengths, max(lengths) + 1
            )
            return transformer.logits(hidden_ND)
        parts = []
        for start in range(0, len(rows), INVARIANT_ROWS):
            used = slice(start, start + INVARIANT_ROWS)
            empty = [0] * (INVARIANT_ROWS - len(tokens[used]))
            hidden_ND = transformer.step(
                used, tokens[used] + empty, lengths[used] + empty, transformer.max_length
            )
            parts.append(transformer.logits(hidden_ND))
        return torch.cat(parts)[: len(rows)]

    def _choose(self, logits_NV: Tensor, rows: Sequence[_Row]) -> list[int]:
        uniforms = [uniform(row.request.seed, len(row.tokens)) for row in rows]
        return choose_tokens(logits_NV, self._sampling, uniforms)

    @torch.inference_mode()
    def _extend(self, row: _Row, lane: int, tokens: list[int]) -> Completion | None:
        """Read tokens of one row at once, and take the token that follows them."""
        hidden_1D = self._transformer.extend(lane, row.cached, tokens)
        row.cached += len(tokens)
        (token,) = self._choose(self._transformer.logits(hidden_1D), [row])
        return self._accept(row, lane, token)

    def _accept(self, row: _Row, lane: int, token: int) -> Completion | None:
        """Give a sampled token to the row's turn; return the completion if it is done."""
        row.tokens.append(token)
        inserted = row.request.turn.take(token)
        if inserted is None:
            return Completion(row.index, row.tokens, complete=True)
        row.tokens += inserted
        following = [token, *inserted]
        if row.cached + len(following) > self._max_length:
            return Completion(row.index, row.tokens, complete=False)
        if inserted:
            return self._extend(row, lane, following)
        row.next = token
        return None
