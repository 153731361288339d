"""Problems that are made on the spot, and that no training has seen.

`accuracy`: reasoning-gym's problems, scored by that library's own verifiers. `tool_execution`:
problems of which a tool gives the answer. Both take only questions whose hash lies in the part that
every training run holds out, so that they are new to a model whatever seed it was trained with.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from svend.data.documents import Document, Message, Role, dump_json
from svend.data.gym_problems import LEVELS, REASONING_TASKS, GymProblem, gym_problems
from svend.data.selection import heldout_bound_of
from svend.data.tool_dialogues import offered_tools
from svend.data.tool_problems import TOOL_TASKS, ToolProblem, tool_problems
from svend.evaluation.benchmark import (
    Answer,
    Benchmark,
    Problem,
    ProblemSource,
    Score,
    share_correct,
)
from svend.tools.toolbox import InvalidCall, Toolbox, is_error

# How many are asked where nothing says how many.
DEFAULT_PROBLEMS = 500
MARK = "####"
NO_MARK = f"no {MARK} before an answer"
# A task is taken to have no more questions after so many draws, times what is held out.
DRAWS_FOR_ONE = 50
# The library gives less than 1 for an answer that is only nearly right.
RIGHT = 0.999

P = TypeVar("P", GymProblem, ToolProblem)
Task = TypeVar("Task")

_toolbox = Toolbox()


# A ladder asks the same after every rung.
@functools.lru_cache(maxsize=4)
def read_reasoning(source: ProblemSource) -> list[Problem]:
    """Return held-out reasoning problems, each task and level in turn."""
    return _choose_heldout(
        source, REASONING_TASKS, gym_problems,
        lambda problem: (Message(Role.USER, problem.question),), lambda problem: problem.answer,
    )


@functools.lru_cache(maxsize=4)
def read_tool_use(source: ProblemSource) -> list[Problem]:
    """Return held-out problems that a tool solves, each task and level in turn."""
    return _choose_heldout(
        source, TOOL_TASKS, tool_problems,
        lambda problem: (
            Message(Role.TOOLS, offered_tools(problem)), Message(Role.USER, problem.question)
        ),
        _expected,
    )


def _choose_heldout(
    source: ProblemSource, tasks: Sequence[Task], draw: Callable[[Task, str, int], Iterator[P]],
    prompt: Callable[[P], tuple[Message, ...]], expected: Callable[[P], str],
) -> list[Problem]:
    """Return as many of the problems that are drawn as are wanted, each task and level in turn."""
    seen: set[int] = set()
    streams = [
        _heldout(draw(task, level, source.seed), source, seen)
        for level in LEVELS for task in tasks
    ]
    chosen = itertools.islice(_in_turn(streams), source.limit or DEFAULT_PROBLEMS)
    return [
        Problem(
            f"{problem.task}/{problem.level}/{number}", f"{problem.task}/{problem.level}",
            prompt(problem), expected(problem), problem,
        )
        for number, problem in enumerate(chosen)
    ]


def score_reasoning(problem: Problem, answer: Answer) -> Score:
    """Decide by the library's verifier on what stands behind the last `####`."""
    given = read_answer(answer.text)
    if given is None:
        return Score(False, "", NO_MARK)
    return _scored(_is_right(problem.reference, given), given)


def score_tool_use(problem: Problem, answer: Answer) -> Score:
    """Decide whether the answer is right, and is what a valid call returned."""
    given = read_answer(answer.text)
    if given is None:
        return Score(False, "", NO_MARK)
    returned = [
        result for call, result in zip(answer.calls, answer.results, strict=False)
        if not is_error(result) and not isinstance(_toolbox.parse_call(call), InvalidCall)
    ]
    tool_problem: ToolProblem = problem.reference
    if not returned:
        return Score(False, given, "no valid call")
    if not any(_solves(tool_problem, problem.expected, result) for result in returned):
        return Score(False, given, "no call that returns the answer")
    return _scored(_solves(tool_problem, problem.expected, given), given)


def read_answer(text: str) -> str | None:
    """Return what stands behind the last `####`, None if nothing does."""
    _, mark, given = text.rpartition(MARK)
    return given.strip() or None if mark else None


def _scored(right: bool, given: str) -> Score:
    return Score(right, given, "" if right else "another answer")


def _expected(problem: ToolProblem) -> str:
    if problem.gym is not None:
        return problem.gym.answer
    call = {"name": problem.tool, "arguments": dict(problem.arguments)}
    return _toolbox.call(dump_json(call))


def _solves(problem: ToolProblem, expected: str, given: str) -> bool:
    if problem.gym is not None:
        return _is_right(problem.gym, given)
    return given.split() == expected.split()


def _is_right(problem: GymProblem, given: str) -> bool:
    return bool(_dataset(problem.task).score_answer(given, problem.entry) > RIGHT)


@functools.cache
def _dataset(task: str) -> Any:
    import reasoning_gym  # most of a second, and only where problems are scored

    return reasoning_gym.create_dataset(task, size=1, seed=0)


def _heldout(problems: Iterator[P], source: ProblemSource, seen: set[int]) -> Iterator[P]:
    """Leave out what a training run may have seen, and what is in `seen` already.

    The stream ends where a task has hardly another question.
    """
    bound = heldout_bound_of(source.heldout_fraction)
    patience = int(DRAWS_FOR_ONE / source.heldout_fraction)
    in_vain = 0
    for problem in problems:
        digest = Document((Message(Role.USER, problem.question),)).question_digest
        if digest < bound and digest not in seen:
            seen.add(digest)
            in_vain = 0
            yield problem
        elif (in_vain := in_vain + 1) > patience:
            return


def _in_turn(streams: list[Iterator[P]]) -> Iterator[P]:
    """Yield from each stream in turn, as long as it goes on."""
    while streams:
        for stream in list(streams):
            problem = next(stream, None)
            if problem is None:
                streams.remove(stream)
            else:
                yield problem


ACCURACY = Benchmark(
    name="accuracy",
    read=read_reasoning,
    score=score_reasoning,
    summarize=share_correct("accuracy"),
    max_new_tokens=256,
    metrics=("accuracy",),
)
TOOL_EXECUTION = Benchmark(
    name="tool_execution",
    read=read_tool_use,
    score=score_tool_use,
    summarize=share_correct("tool_execution_accuracy"),
    max_new_tokens=256,
    uses_tools=True,
    metrics=("tool_execution_accuracy",),
)
