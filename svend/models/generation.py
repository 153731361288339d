"""Decoding of many rows at once: rows that end leave, and waiting prompts take their lanes."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from svend.errors import ConfigError, DataError
from svend.models.decoding import DecodingModel
from svend.models.sampling import Sampling, choose_tokens, uniform
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import Precision

__all__ = ["Completion", "Decoder", "PlainTurn", "Request", "Sampling", "Turn"]

GREEDY = Sampling()


class Turn(Protocol):
    """Decides, token by token, how a row goes on."""

    def take(self, token: int) -> Sequence[int] | None:
        """Take a sampled token.

        Return nothing to go on; token ids to put after it, such as a tool's result, before going
        on; or None to end the row.
        """


class PlainTurn:
    """Ends after so many tokens, at a stop token, or at a sequence of tokens."""

    def __init__(
        self,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        stop_sequences: Sequence[Sequence[int]] = (),
    ) -> None:
        if max_new_tokens < 1 or not all(stop_sequences):
            raise ValueError("max_new_tokens must be at least 1, and no stop sequence empty")
        self._left = max_new_tokens
        self._stop_ids = frozenset(stop_ids)
        self._stop_sequences = [tuple(sequence) for sequence in stop_sequences]
        self._last: deque[int] = deque(maxlen=max(map(len, self._stop_sequences), default=0))

    def take(self, token: int) -> Sequence[int] | None:
        self._left -= 1
        self._last.append(token)
        last = tuple(self._last)
        stopped = token in self._stop_ids or any(
            last[-len(sequence) :] == sequence for sequence in self._stop_sequences
        )
        return None if stopped or self._left == 0 else ()


@dataclass(frozen=True)
class Request:
    """A prompt, what decides how it goes on, and the seed of its random numbers.

    sampling: where it is another than the decoder's.
    """

    prompt: Sequence[int]
    turn: Turn
    seed: int = 0
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Completion:
    """What came after the prompt of the request at place `index`.

    tokens: all of them, sampled and inserted, the stop token included. complete: the turn ended
    it; False means that the cache was full.
    """

    index: int
    tokens: list[int]
    complete: bool


@dataclass
class _Row:
    """A request in its lane: `cached` of its tokens are in the cache, the last is not yet."""

    index: int
    request: Request
    cached: int = 0
    tokens: list[int] = field(default_factory=list)


class Decoder:
    """Completes prompts, `lanes` at a time, with a model's weights as they are now.

    max_length: tokens of a row that the cache holds: the prompt and what follows it, all but the
    last. precision: what the weights are rounded to; what lies between the products is fp32. int8:
    the matrices are rounded to 8 bits, and what is multiplied with them to 7 (`int8.py`); meant for
    few lanes.

    invariant: a completion depends on its request alone, to the bit, not on the lanes or on what is
    in them. Each prompt, and what is inserted, runs by itself; a row attends by itself; and a
    step's rows are padded to a number at which the products round as at any such number
    (`products.steady_rows`). On CUDA attention then reads the whole cache, and its kernels are
    trusted, untested, to treat each row alike.

    Greedy tokens are those of the uncached model where its two likeliest differ by more than
    rounding: in fp32 about 1e-6 of the logits, in bf16 what rounding the weights moves them by.
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
        if lanes < 1 or max_length < 1:
            raise ConfigError(f"lanes = {lanes}, max_length = {max_length}: must be at least 1")
        self._lanes, self._max_length, self._sampling = lanes, max_length, sampling
        self._model = DecodingModel(
            model, lanes, max_length, precision, int8=int8, invariant=invariant
        )
        self._user: object = None
        self.steps = 0
        self.prefilled_tokens = 0

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits after each token of a text, (tokens, vocabulary), in fp32.

        It overwrites what the cache holds.
        """
        self._user = None
        return self._model.logits(tokens)

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Yield completions in the order in which they end; take a request when a lane is free.

        None in place of a request means that none is waiting now: those in the lanes go on, and the
        next is asked for after their step. Where no lane is in use it is asked for at once, so it
        is for `requests` to wait then.

        Raises DataError for a prompt that is empty or leaves no room: before anything runs where
        `requests` is a sequence, else when it is taken. A Decoder runs one `generate` at a time:
        one that is not at its end when another begins, or `score` is called, cannot go on.
        """
        if isinstance(requests, Sequence):
            for index, request in enumerate(requests):
                if request is not None:
                    self._check(index, request)
        return self._generate(enumerate(requests))

    def _generate(self, waiting: Iterator[tuple[int, Request | None]]) -> Iterator[Completion]:
        user = self._user = object()
        rows: list[_Row] = []  # in lanes 0, 1, ...
        at_end = False
        while True:
            while len(rows) < self._lanes and not at_end:
                index, request = next(waiting, (-1, None))
                at_end = index < 0
                if request is None:
                    break
                self._check(index, request)
                row = _Row(index, request)
                token = self._extend(row, len(rows), list(row.request.prompt))
                completion = self._advance(row, len(rows), token)
                if completion is None:
                    rows.append(row)
                else:
                    yield completion
                    self._check_user(user)
            if not rows:
                if at_end:
                    return
                continue
            for completion in self._step(rows):
                yield completion
                self._check_user(user)

    def _check_user(self, user: object) -> None:
        if self._user is not user:
            raise RuntimeError("this decoder has been used for something else meanwhile")

    def _check(self, index: int, request: Request) -> None:
        length = len(request.prompt)
        if length == 0:
            raise DataError(f"request {index}: the prompt is empty; give at least one token")
        if length >= self._max_length:
            raise DataError(
                f"request {index}: a prompt of {length} tokens leaves no room for an answer "
                f"within {self._max_length}; shorten it or raise max_length"
            )

    def _step(self, rows: list[_Row]) -> list[Completion]:
        """Give every row its next token; take out those that end, and return them."""
        self.steps += 1
        logits_RV = self._model.step(
            [row.tokens[-1] for row in rows], [row.cached for row in rows]
        )
        ended: list[tuple[int, Completion]] = []
        for lane, (row, token) in enumerate(
            zip(rows, self._choose(logits_RV, rows), strict=True)
        ):
            row.cached += 1
            completion = self._advance(row, lane, token)
            if completion is not None:
                ended.append((lane, completion))
        for lane, _ in reversed(ended):
            # The last row takes the lane, so that those in use stay neighbours.
            last = rows.pop()
            if lane < len(rows):
                self._model.cache.move(len(rows), lane, last.cached)
                rows[lane] = last
        return [completion for _, completion in ended]

    def _advance(self, row: _Row, lane: int, token: int) -> Completion | None:
        """Give a row its token, and what its turn inserts; return the completion if it ends."""
        while True:
            row.tokens.append(token)
            inserted = row.request.turn.take(token)
            if inserted is None:
                return Completion(row.index, row.tokens, complete=True)
            row.tokens += inserted
            following = [token, *inserted]
            if row.cached + len(following) > self._max_length:
                return Completion(row.index, row.tokens, complete=False)
            if not inserted:
                return None
            token = self._extend(row, lane, following)

    def _extend(self, row: _Row, lane: int, tokens: list[int]) -> int:
        """Read tokens of one row at once; return the token that follows them."""
        logits_1V = self._model.extend(lane, row.cached, tokens)
        row.cached += len(tokens)
        self.prefilled_tokens += len(tokens)
        (token,) = self._choose(logits_1V, [row])
        return token

    def _choose(self, logits_RV: Tensor, rows: Sequence[_Row]) -> list[int]:
        uniforms = [uniform(row.request.seed, len(row.tokens)) for row in rows]
        samplings = [row.request.sampling or self._sampling for row in rows]
        if len(set(samplings)) == 1:
            return choose_tokens(logits_RV, samplings[0], uniforms)
        chosen = [0] * len(rows)
        for sampling in set(samplings):
            places = [place for place, other in enumerate(samplings) if other == sampling]
            tokens = choose_tokens(
                logits_RV[places], sampling, [uniforms[place] for place in places]
            )
            for place, token in zip(places, tokens, strict=True):
                chosen[place] = token
        return chosen
