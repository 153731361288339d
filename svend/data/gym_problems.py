"""Problems of the library reasoning-gym that have a worked answer, by task and level."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from svend.data.worked_answers import (
    Entry,
    Solve,
    as_given,
    count_legs,
    find_common_divisor,
    find_common_multiple,
    multiply_digit_by_digit,
    simplify_fraction,
    solve_linear_equation,
    work_out_expression,
)

LEVELS = ("easy", "medium", "hard")
# Problems that one data set of the library is asked for; the next ones come from another seed.
BLOCK = 250


@dataclass(frozen=True)
class GymTask:
    """A data set of reasoning-gym: its parameters at each level, and how it is worked out.

    lines: how many lines a worked answer may have at each level, where the library has but one
    level and the length of the way to the answer makes ours.
    """

    name: str
    solve: Solve
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lines: Mapping[str, range] = field(default_factory=dict)


@dataclass(frozen=True)
class GymProblem:
    """One problem; `entry` is the library's own record of it, by which it scores an answer."""

    task: str
    level: str
    question: str
    worked_answer: str
    entry: Entry

    @property
    def answer(self) -> str:
        return str(self.entry["answer"])


def _numbers(terms: tuple[int, int], digits: tuple[int, int]) -> dict[str, Any]:
    return {"min_terms": terms[0], "max_terms": terms[1],
            "min_digits": digits[0], "max_digits": digits[1]}


def _equations(terms: int, value: int, operators: str) -> dict[str, Any]:
    weights = [1 / len(operators)] * len(operators)
    return {"min_terms": 2, "max_terms": terms, "max_value": value,
            "operators": tuple(operators), "operators_weights": weights}


def _animals(kinds: tuple[int, int], number: int) -> dict[str, Any]:
    return {"min_animals": kinds[0], "max_animals": kinds[1], "max_instances": number}


def _fractions(value: int, factor: int) -> dict[str, Any]:
    return {"max_value": value, "min_factor": 2, "max_factor": factor, "styles": ("plain",)}


TASKS: dict[str, GymTask] = {
    task.name: task
    for task in (
        GymTask("basic_arithmetic", work_out_expression, {
            "easy": _numbers((2, 2), (1, 2)),
            "medium": _numbers((3, 3), (1, 2)),
            "hard": _numbers((4, 5), (2, 3)),
        }),
        GymTask("chain_sum", work_out_expression, {
            "easy": _numbers((2, 2), (2, 2)),
            "medium": _numbers((3, 3), (2, 3)),
            "hard": _numbers((4, 5), (3, 4)),
        }),
        GymTask("products", multiply_digit_by_digit, {
            "easy": _numbers((2, 2), (2, 2)),
            "medium": _numbers((2, 2), (3, 3)),
            "hard": _numbers((2, 2), (4, 4)),
        }),
        GymTask("simple_equations", solve_linear_equation, {
            "easy": _equations(2, 20, "+-*"),
            "medium": _equations(3, 50, "+-*"),
            "hard": _equations(4, 100, "+-*"),
        }),
        GymTask("leg_counting", count_legs, {
            "easy": _animals((2, 2), 9),
            "medium": _animals((3, 4), 12),
            "hard": _animals((5, 8), 15),
        }),
        GymTask("fraction_simplification", simplify_fraction, {
            "easy": _fractions(20, 10), "medium": _fractions(50, 20), "hard": _fractions(200, 50),
        }),
        GymTask("gcd", find_common_divisor, {
            "easy": {"max_value": 100}, "medium": {"max_value": 300}, "hard": {"max_value": 1000},
        }),
        GymTask("lcm", find_common_multiple, {
            "easy": {"max_value": 50}, "medium": {"max_value": 100}, "hard": {"max_value": 300},
        }),
        GymTask("gsm_symbolic", as_given, lines={
            "easy": range(4), "medium": range(4, 5), "hard": range(5, 100),
        }),
    )
}
# Those that are answered without a tool. Not gcd: who always says 2 is right in three of ten.
REASONING_TASKS = tuple(TASKS[name] for name in TASKS if name != "gcd")
assert all(set(task.parameters or task.lines) == set(LEVELS) for task in TASKS.values())


def gym_problems(task: GymTask, level: str, seed: int) -> Iterator[GymProblem]:
    """Yield problems of a task at a level without end, the same for the same seed."""
    import reasoning_gym  # most of a second, and not needed where the documents are in the cache

    for block in itertools.count():
        drawn = derived_seed(f"{task.name}/{level}/{seed}/{block}")
        entries = reasoning_gym.create_dataset(
            task.name, size=BLOCK, seed=drawn, **task.parameters.get(level, {})
        )
        for entry in entries:
            worked = task.solve(entry)
            if worked is None:
                continue
            if task.lines and len(worked.splitlines()) not in task.lines[level]:
                continue
            yield GymProblem(task.name, level, entry["question"].strip(), worked, entry)


def derived_seed(text: str) -> int:
    """Return a seed that is far from that of any other text.

    The library adds a problem's number to the seed: neighbouring seeds give the same problems.
    """
    return xxhash.xxh3_64_intdigest(text.encode()) >> 16
