"""The embedded data: problems made on the spot by the library reasoning-gym, offline.

Each generator returns the same documents for the same seed and count. The questions, tools and
answers are templated: they try the pipeline, they do not make a useful model.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterator
from typing import Any

from svend.data.documents import Document, Role, conversation, dump_json
from svend.errors import ConfigError

# Short problems beside gsm_symbolic's worked ones, which make up the rest.
ARITHMETIC_SETS = ("basic_arithmetic", "chain_sum", "simple_equations", "leg_counting", "gcd")
GENERAL_SETS = ("sentence_reordering", "word_sorting", "syllogism", "spell_backward",
                "letter_counting", "calendar_arithmetic")


def reasoning_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield word problems with worked answers in GSM8K's format, and one in four without."""
    worked = _problems("gsm_symbolic", count, seed)
    short = [_problems(name, count, seed) for name in ARITHMETIC_SETS]
    for index in range(count):
        if index % 4 == 3:
            problem = short[index // 4 % len(short)][index]
            answer = f"#### {problem['answer']}"
        else:
            problem = worked[index]
            answer = problem["metadata"]["answer_cot"]
        yield conversation((Role.USER, problem["question"].strip()), (Role.ASSISTANT, answer))


def general_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield questions about words, sentences, dates and plain logic."""
    sets = [_problems(name, count, seed) for name in GENERAL_SETS]
    for index in range(count):
        problem = sets[index % len(sets)][index]
        yield conversation(
            (Role.USER, problem["question"].strip()), (Role.ASSISTANT, str(problem["answer"]))
        )


def tool_use_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield dialogues: tools declared, a question, the call, its result, the answer."""
    names = sorted(TOOLS)
    # Another seed than the reasoning problems', which share generators with the tools.
    problems = {name: _problems(TOOLS[name][0], count, seed + 10**9) for name in names}
    for index in range(count):
        rng = random.Random(f"{seed}:{index}")
        name = names[index % len(names)]
        problem = problems[name][index]
        # The tool to call stands among others, so that the choice has to be learnt.
        offered = rng.sample(names, k=rng.randint(2, len(names)))
        if name not in offered:
            offered[rng.randrange(len(offered))] = name
        declarations = [_declaration(tool) for tool in offered]
        call = {"name": name, "arguments": TOOLS[name][1](problem["metadata"])}
        answer = str(problem["answer"])
        yield conversation(
            (Role.TOOLS, dump_json(declarations)),
            (Role.USER, problem["question"].strip()),
            (Role.TOOL_CALL, dump_json(call)),
            (Role.TOOL, answer),
            (Role.ASSISTANT, f"#### {answer}"),
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


def _problems(name: str, count: int, seed: int) -> Any:
    import reasoning_gym  # most of a second, and not needed where the documents are in the cache

    return reasoning_gym.create_dataset(name, size=count, seed=seed)


def _declaration(name: str) -> dict[str, Any]:
    return {"name": name, "parameters": TOOLS[name][2]}


# Each tool: the problem set it solves, the arguments in a problem's metadata, its parameters.
TOOLS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], dict[str, str]]] = {
    "calculate": (
        "basic_arithmetic",
        lambda problem: {"expression": problem["expression"]},
        {"expression": "string"},
    ),
    "greatest_common_divisor": (
        "gcd",
        lambda problem: {"numbers": problem["numbers"]},
        {"numbers": "array of integers"},
    ),
    "count_letter": (
        "letter_counting",
        lambda problem: {"letter": problem["target_letter"], "text": " ".join(problem["span"])},
        {"letter": "string", "text": "string"},
    ),
    "reverse": (
        "spell_backward",
        lambda problem: {"text": problem["word"]},
        {"text": "string"},
    ),
}
