"""What every contestant of a benchmark is given, and what it must hand back.

Nothing here or in the peers' modules imports the rest of Svend: a peer may live in an environment
of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A model, a batch, and what to fill it with.

    With `documents`, a file of token arrays, each row holds whole documents: packed by us, one to
    a row and padded to the longest of the batch by the others. Without, rows are random tokens.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    batch_size: int
    length: int
    device: str
    documents: str | None = None
    padded_batch_size: int = 16
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Contestant:
    """A training step that is ready to run: it returns the tokens that it learnt from."""

    parameters: int
    step: Callable[[], int]
