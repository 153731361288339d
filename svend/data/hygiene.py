"""Duplicates, near and exact, and overlap with evaluation sets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from svend.data.documents import Document, Role

Hashes = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

WORD = re.compile(r"\w+")
# What is asked and answered; declared tools and instructions may be alike everywhere.
COMPARED_ROLES = (Role.USER, Role.ASSISTANT, Role.TEXT)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
KNOWN_WORDS = 1_000_000
AT_ONCE = 1 << 20

# MinHash (Broder 1997) of five-word sequences. By locality-sensitive hashing two documents are
# compared if any of 16 bands of 8 agrees: at 0.8 in 95 cases of 100, at 0.5 in 6.
SHINGLE_WORDS = 5
PERMUTATIONS, BANDS = 128, 16
NEAR = 0.8
EMPTY = np.iinfo(np.uint32).max


class _WordHashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        if len(self) >= KNOWN_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        self[word] = int.from_bytes(digest)
        return self[word]


_word_hashes = _WordHashes()


def word_sequences(document: Document, words: int) -> Hashes:
    """Return a hash of each run of so many words in a document; case and punctuation are left out.

    A message of fewer words has none.
    """
    found = [
        _rolling(WORD.findall(message.content.lower()), words)
        for message in document.messages
        if message.role in COMPARED_ROLES
    ]
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def _rolling(words: list[str], count: int) -> Hashes:
    runs = len(words) - count + 1
    if runs < 1:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))
    total = np.zeros(runs, np.uint64)
    for place in range(count):
        total = total * MULTIPLIER + hashes[place : place + runs]
    return total


def occurs_in(sequences: Hashes, sorted_known: Hashes) -> bool:
    """Whether any of the sequences is among the known ones."""
    return bool(are_among(sequences, sorted_known).any())


def are_among(hashes: Hashes, sorted_known: Hashes) -> npt.NDArray[np.bool_]:
    """Return which hashes are among the known ones; takes little memory beside them."""
    found = np.zeros(len(hashes), dtype=np.bool_)
    if len(sorted_known):
        for start in range(0, len(hashes), AT_ONCE):
            some = hashes[start : start + AT_ONCE]
            places = np.searchsorted(sorted_known, some).clip(max=len(sorted_known) - 1)
            found[start : start + AT_ONCE] = sorted_known[places] == some
    return found


def minhash_signatures(documents: Iterable[Document]) -> Signatures:
    """Return a row of 128 minima for each document; a document of few words has no minimum."""
    from rensa import RMinHash  # only where near duplicates are asked for

    shingles = [word_sequences(document, SHINGLE_WORDS) for document in documents]
    offsets = np.cumsum([0, *map(len, shingles)], dtype=np.uint64)
    flat = np.concatenate(shingles) if shingles else np.empty(0, np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        flat, offsets, num_perm=PERMUTATIONS, seed=0
    )
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(shingles), PERMUTATIONS)


def first_occurrences(digests: Hashes) -> npt.NDArray[np.bool_]:
    """Return which entries are the first of their value."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    is_first = np.ones(len(digests), dtype=np.bool_)
    is_first[order[1:][ordered[1:] == ordered[:-1]]] = False
    return is_first


def near_duplicates(signatures: Signatures) -> npt.NDArray[np.bool_]:
    """Return which documents are much like an earlier one that is not itself left out.

    Two documents are compared if one of 16 bands agrees, and are alike if 0.8 of their minima do,
    which estimates how many of their five-word sequences they share.
    """
    count = len(signatures)
    has_words = (signatures != EMPTY).any(axis=1)
    left_out = np.zeros(count, dtype=np.bool_)
    nearest = np.arange(count)
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        columns = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = columns.view([("", np.uint32)] * width).ravel()
        _, firsts, group = np.unique(keys, return_index=True, return_inverse=True)
        earlier = firsts[group]
        # The first of a group may itself be like one before it: the group goes back to that one.
        earlier = np.minimum(earlier, nearest[earlier])
        for start in range(0, count, 1 << 16):
            rows = np.arange(start, min(count, start + (1 << 16)))
            before = earlier[rows]
            agreement = (signatures[rows] == signatures[before]).mean(axis=1)
            alike = has_words[rows] & (before < rows) & (agreement >= NEAR)
            left_out[rows[alike]] = True
            nearest[rows[alike]] = np.minimum(nearest[rows[alike]], before[alike])
    return left_out
