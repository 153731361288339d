"""Worked answers to reasoning-gym's problems: one operation a line, then `#### ` and the answer.

Each function takes an entry of the library, and returns None for the few problems that have no
such answer: an equation without its unknown, a division that leaves a remainder.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

Entry = Mapping[str, Any]
Solve = Callable[[Entry], str | None]

_OPERATIONS: dict[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.floordiv),
}
_TERM = re.compile(r"(?P<sign>[+-]?)(?P<number>\d+)?\*?(?P<unknown>[a-z])?")


def finished(steps: list[str], answer: str) -> str:
    """Return the steps, one a line, and the answer in GSM8K's format."""
    return "\n".join([*steps, f"#### {answer}"])


def work_out_expression(entry: Entry) -> str | None:
    """Carry out the operations in their order: `2 * 3 = 6`, `6 + 4 = 10`."""
    steps: list[str] = []

    def value_of(node: ast.expr) -> int:
        if isinstance(node, ast.UnaryOp):
            return -value_of(node.operand)
        if not isinstance(node, ast.BinOp):
            return int(ast.literal_eval(node))
        left, right = value_of(node.left), value_of(node.right)
        sign, operate = _OPERATIONS[type(node.op)]
        if sign == "/" and left % right:
            raise _Remainder
        steps.append(f"{left} {sign} {right} = {operate(left, right)}")
        return operate(left, right)

    expression = entry["metadata"]["expression"]
    try:
        value_of(ast.parse(expression.strip(), mode="eval").body)
    except _Remainder:
        return None
    return finished(steps, entry["answer"])


class _Remainder(Exception):
    """A division does not come out even."""


def multiply_digit_by_digit(entry: Entry) -> str | None:
    """Multiply two numbers: the first by each place of the second, then the sum."""
    left, right = entry["metadata"]["expression"].split(" * ")
    places = [int(d) * 10**p for p, d in zip(range(len(right) - 1, -1, -1), right, strict=True)]
    steps, total = [], 0
    products = [(place, int(left) * place) for place in places if place]
    steps += [f"{left} * {place} = {product}" for place, product in products]
    for number, (_, product) in enumerate(products):
        if number:
            steps.append(f"{total} + {product} = {total + product}")
        total += product
    return finished(steps, entry["answer"])


def solve_linear_equation(entry: Entry) -> str | None:
    """Solve `a*x + b = c`: bring b to the right, then divide by a."""
    coefficient, constant, rest = linear_terms(entry)
    if coefficient == 0:
        return None
    steps = []
    if constant:
        sign = "-" if constant > 0 else "+"
        steps.append(f"{rest} {sign} {abs(constant)} = {rest - constant}")
        rest -= constant
    if coefficient != 1:
        steps.append(f"{rest} / {coefficient} = {rest // coefficient}")
    unknown = entry["metadata"]["variable"]
    return finished([*steps, f"{unknown} = {rest // coefficient}"], entry["answer"])


def linear_terms(entry: Entry) -> tuple[int, int, int]:
    """Return a, b and c of a problem's equation `a*x + b = c`."""
    left, right = entry["metadata"]["equation"].split(" = ")
    coefficient = constant = 0
    for term in _TERM.finditer(left.replace(" ", "")):
        if term.group():
            value = int(term["sign"] + (term["number"] or "1"))
            if term["unknown"]:
                coefficient += value
            else:
                constant += value
    return coefficient, constant, int(right)


def count_legs(entry: Entry) -> str | None:
    """Count each animal's legs, then their sum so far."""
    steps, total = [], 0
    for number, legs in leg_counts(entry):
        step = f"{number} * {legs} = {number * legs}"
        if total:
            step += f", {total} + {number * legs} = {total + number * legs}"
        total += number * legs
        steps.append(step)
    return finished(steps, entry["answer"])


def leg_counts(entry: Entry) -> list[tuple[int, int]]:
    """Return of each kind of animal in a problem: how many there are, the legs of one."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return [(number, ANIMALS[animal]) for animal, number in entry["metadata"]["animals"].items()]


def simplify_fraction(entry: Entry) -> str | None:
    """Find the common divisor of numerator and denominator, and divide both by it."""
    numerator, denominator = entry["metadata"]["numerator"], entry["metadata"]["denominator"]
    steps, divisor = _euclid(numerator, denominator)
    if divisor > 1:
        steps += [f"{n} / {divisor} = {n // divisor}" for n in (numerator, denominator)]
    return finished(steps, entry["answer"])


def find_common_divisor(entry: Entry) -> str | None:
    """Find the greatest common divisor of two numbers by Euclid's algorithm."""
    steps, _ = _euclid(*entry["metadata"]["numbers"])
    return finished(steps, entry["answer"])


def find_common_multiple(entry: Entry) -> str | None:
    """Find the least common multiple: one number by the common divisor, times the other."""
    first, second = entry["metadata"]["numbers"]
    steps, divisor = _euclid(first, second)
    steps.append(f"{first} / {divisor} = {first // divisor}")
    steps.append(f"{first // divisor} * {second} = {first // divisor * second}")
    return finished(steps, entry["answer"])


def _euclid(first: int, second: int) -> tuple[list[str], int]:
    steps = []
    larger, smaller = max(first, second), min(first, second)
    while smaller:
        steps.append(f"{larger} % {smaller} = {larger % smaller}")
        larger, smaller = smaller, larger % smaller
    return steps, larger


def as_given(entry: Entry) -> str | None:
    """Take the library's own worked answer.

    Not for a negative answer, an age or a price that cannot be: its verifier reads no sign.
    """
    steps, mark, _ = str(entry["metadata"]["answer_cot"]).rpartition("####")
    if not mark or entry["answer"].startswith("-"):
        return None
    return finished([steps.strip()], entry["answer"])
