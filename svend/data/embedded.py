"""The embedded data: problems made on the spot by the library reasoning-gym, offline.

Each generator returns the same documents for the same seed and count. The questions and answers
are templated: they try the pipeline, they do not make a useful model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from svend.data.documents import Document, Role, conversation
from svend.data.gym_problems import LEVELS, REASONING_TASKS, derived_seed, gym_problems
from svend.errors import ConfigError


def _words(low: int, high: int) -> dict[str, int]:
    return {"min_words": low, "max_words": high}


# Questions about words, sentences, dates and plain logic: the parameters at each level.
GENERAL_SETS: dict[str, tuple[dict[str, Any], ...]] = {
    "sentence_reordering": tuple(
        {"min_words_in_sentence": low, "max_words_in_sentence": high}
        for low, high in ((3, 6), (7, 12), (13, 20))
    ),
    "word_sorting": (_words(3, 4), _words(5, 7), _words(8, 10)),
    "syllogism": ({}, {}, {}),
    "spell_backward": tuple(
        {"min_word_len": low, "max_word_len": high} for low, high in ((3, 4), (5, 7), (8, 10))
    ),
    "letter_counting": (_words(3, 5), _words(6, 10), _words(11, 15)),
    "calendar_arithmetic": tuple({"offset_upper_bound": days} for days in (10, 50, 100)),
}


def reasoning_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield arithmetic, equations and word problems with worked answers in GSM8K's format."""
    streams = [gym_problems(task, level, seed) for level in LEVELS for task in REASONING_TASKS]
    for index in range(count):
        problem = next(streams[index % len(streams)])
        yield conversation(
            (Role.USER, problem.question), (Role.ASSISTANT, problem.worked_answer)
        )


def general_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield questions about words, sentences, dates and plain logic."""
    size = -(-count // (len(LEVELS) * len(GENERAL_SETS)))
    sets = [
        _problems(name, size, derived_seed(f"{name}/{level}/{seed}"), **GENERAL_SETS[name][level])
        for level in range(len(LEVELS)) for name in GENERAL_SETS
    ]
    for index in range(count):
        problem = sets[index % len(sets)][index // len(sets)]
        yield conversation(
            (Role.USER, problem["question"].strip()), (Role.ASSISTANT, str(problem["answer"]))
        )


def problems(name: str, count: int, seed: int) -> Iterator[Document]:
    """Yield the problems of one data set of reasoning-gym, with their answers."""
    for problem in _problems(name, count, seed):
        answer = f"#### {problem['answer']}"
        yield conversation((Role.USER, problem["question"].strip()), (Role.ASSISTANT, answer))


def check_problem_set(name: str) -> None:
    """Raise ConfigError if reasoning-gym has no data set of this name."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(DATASETS)} others"
        raise ConfigError(f"training.data.sources: reasoning-gym has no '{name}'; {hint}")


def _problems(name: str, count: int, seed: int, **parameters: Any) -> Any:
    import reasoning_gym  # most of a second, and not needed where the documents are in the cache

    return reasoning_gym.create_dataset(name, size=count, seed=seed, **parameters)
