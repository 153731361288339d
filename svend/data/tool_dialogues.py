"""Dialogues in which tools are called, made of problems that the tools solve."""

from __future__ import annotations

import random
from collections.abc import Iterator

from svend.data.documents import Document, Role, conversation, dump_json
from svend.data.gym_problems import LEVELS, derived_seed
from svend.data.tool_problems import TOOL_TASKS, ToolProblem, tool_problems
from svend.tools.toolbox import TOOLS, Toolbox

# Tools that a question comes with, the right one among them.
MOST_OFFERED = 2
# Of a hundred dialogues, so many begin with words, or with a call that fails and is mended.
WITH_WORDS, WITH_MISTAKE = 6, 4
OPENINGS = ("Let me work it out.", "I will use a tool.", "One call is enough.")

_toolbox = Toolbox()


def tool_use_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield dialogues: tools declared, a question, the call, its result, the answer.

    In some the model says something first, or makes a mistake in its call and tries again.
    """
    streams = [tool_problems(task, level, seed) for level in LEVELS for task in TOOL_TASKS]
    for index in range(count):
        problem = next(streams[index % len(streams)])
        rng = random.Random(f"{seed}:{index}")
        call = {"name": problem.tool, "arguments": dict(problem.arguments)}
        result = _toolbox.call(dump_json(call))
        turns = [
            (Role.TOOLS, offered_tools(problem)),
            (Role.USER, problem.question),
            (Role.TOOL_CALL, dump_json(call)),
            (Role.TOOL, result),
            (Role.ASSISTANT, f"#### {result if problem.gym is None else problem.gym.answer}"),
        ]
        chance = rng.randrange(100)
        if chance < WITH_WORDS:
            turns.insert(2, (Role.ASSISTANT, rng.choice(OPENINGS)))
        elif chance < WITH_WORDS + WITH_MISTAKE:
            mistaken = _mistake(rng, dump_json(call))
            turns[2:2] = [(Role.TOOL_CALL, mistaken), (Role.TOOL, _toolbox.call(mistaken))]
        yield conversation(*turns)


def offered_tools(problem: ToolProblem) -> str:
    """Return the declaration of some tools, as JSON: the one that solves it, and others.

    Which they are follows from the question.
    """
    rng = random.Random(derived_seed(problem.question))
    others = rng.sample([name for name in TOOLS if name != problem.tool],
                        k=rng.randint(0, MOST_OFFERED - 1))
    names = [*others, problem.tool]
    rng.shuffle(names)
    return dump_json(Toolbox(TOOLS[name] for name in names).declarations())


def _mistake(rng: random.Random, call: str) -> str:
    """Return the call as one that cannot be carried out: cut off, or with another name."""
    if rng.random() < 0.5:
        return call[: rng.randint(len(call) // 2, len(call) - 1)]
    return call.replace('"arguments"', '"parameters"', 1)
