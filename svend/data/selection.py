"""Which documents a run trains on, and which it holds out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svend.data.hygiene import are_among, first_occurrences, near_duplicates
from svend.data.packing import Ints
from svend.data.tokenised import Progress, TokenisedPart
from svend.pipeline.config import DataConfig, Duplicates

PartPair = tuple[TokenisedPart, TokenisedPart | None]  # train, and held out where it has its own


@dataclass(frozen=True)
class Selection:
    """The documents of each source by number: to train on, held out, and how many left out."""

    train: list[Ints]
    heldout: list[Ints]
    leaked: list[int]
    duplicates: list[int]


def select_documents(
    data: DataConfig, parts: list[PartPair], progress: Progress
) -> Selection:
    """Divide the documents, and leave out of the train part what leaks and what is there twice."""
    bound = heldout_bound(data)
    held, candidates, held_questions = [], [], []
    for train, own in parts:
        questions = (own or train).questions
        is_held = questions < bound if own is None else np.ones(len(questions), bool)
        held.append(np.flatnonzero(is_held))
        held_questions.append(questions[is_held])
        candidates.append(
            np.flatnonzero(~is_held) if own is None else np.arange(len(train.lengths))
        )
    known = np.unique(np.concatenate(held_questions))
    kept, leaked = [], []
    for (train, _), numbers in zip(parts, candidates, strict=True):
        leaks = (are_among(train.questions, known) | train.leaked)[numbers]
        kept.append(numbers[~leaks])
        leaked.append(int(leaks.sum()))
    unique = _without_duplicates(data, parts, kept, held, progress)
    duplicates = [len(a) - len(b) for a, b in zip(kept, unique, strict=True)]
    return Selection(unique, held, leaked, duplicates)


def explain_empty(parts: list[PartPair], chosen: Selection, places: str) -> str:
    """Return what became of the documents, for a user whose run has none to train on or hold out.
    """
    trains = [train.info for train, _ in parts]
    became = {
        "held out": sum(map(len, chosen.heldout)),
        "left out for they repeat what is held out": sum(chosen.leaked),
        "duplicates": sum(chosen.duplicates),
        "broken rows dropped": sum(info.dropped_rows for info in trains),
    }
    told = ", ".join(f"{count:,} {what}" for what, count in became.items() if count)
    count = sum(info.documents for info in trains)
    return f"{count:,} documents in {places} are too few{f' ({told})' if told else ''}"


def _without_duplicates(
    data: DataConfig, parts: list[PartPair], kept: list[Ints], held: list[Ints],
    progress: Progress,
) -> list[Ints]:
    if data.duplicates is Duplicates.KEEP:
        return kept
    digests = np.concatenate([t.digests[n] for (t, _), n in zip(parts, kept, strict=True)])
    stays = np.split(first_occurrences(digests), np.cumsum([len(n) for n in kept])[:-1])
    kept = [numbers[stay] for numbers, stay in zip(kept, stays, strict=True)]
    if data.duplicates is Duplicates.EXACT:
        return kept
    progress("looking for near duplicates")
    # The held-out documents come first: what is like them is what has to go.
    signatures = [(own or t).signatures[n] for (t, own), n in zip(parts, held, strict=True)]
    before = sum(map(len, signatures))
    signatures += [train.signatures[n] for (train, _), n in zip(parts, kept, strict=True)]
    alike = near_duplicates(np.concatenate(signatures))[before:]
    left_out = np.split(alike, np.cumsum([len(n) for n in kept])[:-1])
    return [numbers[~out] for numbers, out in zip(kept, left_out, strict=True)]


def heldout_bound(data: DataConfig) -> np.uint64:
    """Questions whose hash is below this are held out, where a source has no split of its own."""
    return np.uint64(heldout_bound_of(data.heldout_fraction))


def heldout_bound_of(fraction: float) -> int:
    """Return the bound below which so many of all hashes of questions lie."""
    return int(fraction * 2**64)
