"""Problems that a tool solves: the question, the right call, and how an answer is checked.

The calculator's problems are reasoning-gym's; those of chemistry and physics are drawn here from
formulas, reactions, units and constants. The wording follows from what is asked, so that what is
held out is not in the train part in other words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svend.data.gym_problems import LEVELS, TASKS, GymProblem, derived_seed, gym_problems
from svend.data.worked_answers import leg_counts, linear_terms

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class ToolProblem:
    """One problem, and the call that solves it; `gym` is there for the library's problems."""

    task: str
    level: str
    question: str
    tool: str
    arguments: Mapping[str, Any]
    gym: GymProblem | None = None


def tool_problems(task: str, level: str, seed: int) -> Iterator[ToolProblem]:
    """Yield problems of a task at a level without end, the same for the same seed."""
    if task in CALCULATIONS:
        for problem in gym_problems(TASKS[task], level, seed):
            arguments = {"expression": CALCULATIONS[task](problem)}
            yield ToolProblem(task, level, problem.question, "calculate", arguments, problem)
        return
    rng = random.Random(derived_seed(f"{task}/{level}/{seed}"))
    draw = DRAWN_TASKS[task][level]
    while True:
        tool, arguments, wordings, asked = draw(rng)
        content = "|".join(map(str, arguments.values()))
        wording = wordings[derived_seed(content) % len(wordings)]
        yield ToolProblem(task, level, wording.format(**asked), tool, arguments)


def _metadata_expression(problem: GymProblem) -> str:
    return str(problem.entry["metadata"]["expression"])


def _of_numbers(function: str) -> Callable[[GymProblem], str]:
    def expression(problem: GymProblem) -> str:
        return f"{function}({', '.join(map(str, problem.entry['metadata']['numbers']))})"

    return expression


def _leg_sum(problem: GymProblem) -> str:
    return " + ".join(f"{number} * {legs}" for number, legs in leg_counts(problem.entry))


def _solved_equation(problem: GymProblem) -> str:
    coefficient, constant, right = linear_terms(problem.entry)
    difference = f"{right} {'+' if constant < 0 else '-'} {abs(constant)}"
    return f"({difference}) / {coefficient}" if constant else f"{right} / {coefficient}"


# What the calculator is asked, by the task of reasoning-gym.
CALCULATIONS: dict[str, Callable[[GymProblem], str]] = {
    "basic_arithmetic": _metadata_expression,
    "chain_sum": _metadata_expression,
    "products": _metadata_expression,
    "simple_equations": _solved_equation,
    "leg_counting": _leg_sum,
    "gcd": _of_numbers("gcd"),
    "lcm": _of_numbers("lcm"),
}

# A tool, its arguments, wordings of the question, and what they are filled in with.
Drawn = tuple[str, dict[str, Any], Sequence[str], dict[str, Any]]
Draw = Callable[[random.Random], Drawn]


def _formula(carbon: int, hydrogen: int, oxygen: int) -> str:
    parts = (("C", carbon), ("H", hydrogen), ("O", oxygen))
    return "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in parts if count)


def _draw_fuel(rng: random.Random, largest: int) -> str:
    """Draw a compound of carbon, hydrogen and perhaps oxygen, that takes oxygen to burn."""
    carbon = rng.randint(1, largest)
    return _formula(carbon, 2 * rng.randint(1, carbon + 1), rng.randint(0, carbon))


ELEMENTS = ("H", "C", "N", "O", "F", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "K", "Ca", "Fe", "Cu",
            "Zn", "Br", "Ag", "I")


def _molar_mass(elements: int) -> Draw:
    def draw(rng: random.Random) -> Drawn:
        symbols = rng.sample(ELEMENTS, elements)
        counts = [rng.randint(1, 9) for _ in symbols]
        formula = "".join(f"{symbol}{count if count > 1 else ''}"
                          for symbol, count in zip(symbols, counts, strict=True))
        wordings = ("What is the molar mass of {formula}?", "Find the molar mass of {formula}.",
                    "How many grams does one mole of {formula} have?")
        return "molar_mass", {"formula": formula}, wordings, {"formula": formula}

    return draw


def _combustion(rng: random.Random, largest: int) -> tuple[str, str]:
    fuel = _draw_fuel(rng, largest)
    return fuel, f"{fuel} + O2 -> CO2 + H2O"


def _balance(largest: int) -> Draw:
    def draw(rng: random.Random) -> Drawn:
        _, equation = _combustion(rng, largest)
        wordings = ("Balance {equation}", "Balance the reaction {equation}",
                    "What are the coefficients of {equation}?")
        return "balance_equation", {"equation": equation}, wordings, {"equation": equation}

    return draw


def _stoichiometry(largest: int) -> Draw:
    def draw(rng: random.Random) -> Drawn:
        fuel, equation = _combustion(rng, largest)
        amount, wanted = rng.randint(1, 10 * largest), rng.choice(("O2", "CO2", "H2O"))
        arguments = {"equation": equation, "given": fuel, "amount": amount, "unit": "mol",
                     "wanted": wanted}
        wordings = ("In {equation}, how many mol of {wanted} go with {amount} mol of {given}?",
                    "How much {wanted} belongs to {amount} mol of {given} in {equation}?")
        return "stoichiometry", arguments, wordings, arguments

    return draw


UNITS = (
    ("km", "m", "cm", "mm", "mile", "foot", "inch"), ("kg", "g", "mg", "pound", "ounce"),
    ("hour", "minute", "second", "day"), ("liter", "milliliter", "gallon"),
    ("joule", "kilojoule", "calorie"), ("pascal", "bar", "atm"),
)


def _conversion(low: int, high: int, digits: int) -> Draw:
    def draw(rng: random.Random) -> Drawn:
        from_unit, to_unit = rng.sample(rng.choice(UNITS), 2)
        value: float = rng.randint(low, high)
        if digits:
            value = round(value + rng.random(), digits)
        arguments = {"value": value, "from_unit": from_unit, "to_unit": to_unit}
        wordings = ("Convert {value} {from_unit} to {to_unit}.",
                    "How many {to_unit} are {value} {from_unit}?",
                    "What is {value} {from_unit} in {to_unit}?")
        return "convert_units", arguments, wordings, arguments

    return draw


DRAWN_TASKS: dict[str, dict[str, Draw]] = {
    "molar_mass": dict(zip(LEVELS, map(_molar_mass, (2, 3, 4)), strict=True)),
    "balancing": dict(zip(LEVELS, map(_balance, (12, 30, 90)), strict=True)),
    "stoichiometry": dict(zip(LEVELS, map(_stoichiometry, (12, 30, 90)), strict=True)),
    "conversion": {
        "easy": _conversion(2, 99, 0), "medium": _conversion(100, 9999, 0),
        "hard": _conversion(100, 9999, 2),
    },
}
TOOL_TASKS = (*CALCULATIONS, *DRAWN_TASKS)
