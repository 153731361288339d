"""Arithmetic, exact for rational numbers: 0.1 + 0.2 is 0.3."""

from __future__ import annotations

import ast
import itertools
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from svend.tools.formatting import format_number
from svend.tools.tool import ToolError, define_tool, quote

# An exact number, or the float that stands for an irrational one.
Number = Fraction | float

MAX_CHARACTERS = 500
MAX_DEPTH = 50
# Of the numerator or denominator of every value on the way: about 3000 decimal digits.
MAX_BITS = 10_000
MAX_COMBINATORIAL = 1000
SYMBOLS = str.maketrans({
    "\N{MULTIPLICATION SIGN}": "*", "\N{MIDDLE DOT}": "*", "\N{DIVISION SIGN}": "/",
    "\N{MINUS SIGN}": "-", "^": "**",
})
CHARACTERS = re.compile(r"[0-9A-Za-z_.+\-*/%(), ]*")
# A number that runs into a name, as in 2x; 1e5 is a number.
JUXTAPOSED = re.compile(r"(?<![A-Za-z_0-9.])[\d.]+(?![eE][+-]?\d)[A-Za-z_]")
LITERAL = re.compile(r"(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression.

    It is made of numbers (12, 0.5, 1e-3), + - * / // % ** (or ^), parentheses, pi, e, and the
    functions of FUNCTIONS; the printed signs of multiplication, division and minus will do. % is
    the remainder, which like // goes by the floor; log is natural, or to the base of a second
    argument; angles are in radians; round goes away from zero at a half. Raises ToolError.
    """
    source = " ".join(expression.translate(SYMBOLS).split())
    _check_text(source)
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError:
        raise ToolError(f"not an arithmetic expression: {quote(source)}") from None
    try:
        return format_number(_evaluate(tree.body, source))
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the number is too large") from None


def _check_text(source: str) -> None:
    """Refuse cheaply what would be costly or misleading to parse."""
    if not source:
        raise ToolError("the expression is empty")
    if len(source) > MAX_CHARACTERS:
        raise ToolError(f"the expression is longer than {MAX_CHARACTERS} characters")
    known = CHARACTERS.match(source)
    assert known is not None
    if known.end() < len(source):
        raise ToolError(f"unexpected character {quote(source[known.end()])}")
    depths = list(itertools.accumulate((c == "(") - (c == ")") for c in source))
    if depths[-1] != 0 or min(depths) < 0:
        raise ToolError("the parentheses do not match")
    if max(depths) > MAX_DEPTH:
        raise ToolError(f"parentheses are nested deeper than {MAX_DEPTH}")
    if juxtaposed := JUXTAPOSED.search(source):
        raise ToolError(f"write * between a number and a name, at {quote(juxtaposed[0])}")


def _evaluate(node: ast.expr, source: str) -> Number:
    match node:
        case ast.Constant(value=int() | float()):
            value: Number = _literal(source[node.col_offset:node.end_col_offset])
        case ast.Name(id=name):
            if name not in CONSTANTS:
                raise ToolError(f"unknown name {quote(name)}; there are {', '.join(CONSTANTS)}")
            value = CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _evaluate(operand, source)
            value = -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_evaluate(left, source), _evaluate(right, source))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if name not in FUNCTIONS:
                raise ToolError(f"unknown function {quote(name)}; there are {', '.join(FUNCTIONS)}")
            value = _apply(name, [_evaluate(argument, source) for argument in arguments])
        case ast.Tuple():
            raise ToolError("write numbers without thousands separators, and one expression")
        case _:
            raise ToolError("only numbers, + - * / // % **, parentheses and functions are allowed")
    return _checked(value)


def _literal(text: str) -> Fraction:
    # From the text, for a float would have lost digits.
    if not LITERAL.fullmatch(text):
        raise ToolError(f"{quote(text)} is not a decimal number")
    return Fraction(text)


def _checked(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ToolError("the number is too large")
    elif max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ToolError("the number is too large")
    return value


def _apply(name: str, arguments: list[Number]) -> Number:
    function, fewest, most = FUNCTIONS[name]
    if not fewest <= len(arguments) <= most:
        wanted = f"{fewest}" if fewest == most else f"at least {fewest}"
        raise ToolError(f"{name} takes {wanted} argument(s), not {len(arguments)}")
    try:
        return function(*arguments)
    except ToolError as error:
        raise ToolError(f"{name}: {error}") from None
    except ValueError:  # from the math module: outside of the function's domain
        raise ToolError(f"{name} is not defined for that argument") from None


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) not in (0, 1) and abs(exponent) * (bits - 1) > MAX_BITS:
            raise ToolError("the number is too large")
        if abs(base) == 1:
            return base if exponent.numerator % 2 else Fraction(1)
        return base ** exponent.numerator if base or exponent >= 0 else base / 0
    if exponent == Fraction(1, 2) and base >= 0:
        return _square_root(base)
    if base < 0:
        raise ToolError("a negative number to a fractional power is not real")
    return float(float(base) ** float(exponent))


def _square_root(value: Number) -> Number:
    if value < 0:
        raise ToolError("the square root of a negative number is not real")
    if isinstance(value, float):
        return math.sqrt(value)
    roots = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    return roots if roots * roots == value else math.sqrt(value)


def _integers(*values: Number) -> list[int]:
    if any(isinstance(value, float) or value.denominator != 1 for value in values):
        raise ToolError("takes integers")
    return [int(value) for value in values]


def _of_integers(function: Callable[..., int], largest: int | None = None) -> Function:
    def apply(*values: Number) -> Fraction:
        integers = _integers(*values)
        if largest is not None and max(integers) > largest:
            raise ToolError(f"takes integers up to {largest}")
        return Fraction(function(*integers))

    return apply


def _of_float(function: Callable[[float], float], decimals: int | None = None) -> Function:
    def apply(value: Number) -> float:
        result = function(float(value))
        return result if decimals is None else round(result, decimals)

    return apply


def _logarithm(value: Number, base: Number | None = None) -> float:
    # Of numerator and denominator, which may be too large for a float.
    if value <= 0 or (base is not None and (base <= 0 or base == 1)):
        raise ToolError("takes a positive number, and a positive base other than 1")
    exact = Fraction(value)
    natural = math.log(exact.numerator) - math.log(exact.denominator)
    return natural if base is None else natural / _logarithm(base)


def _round(value: Number, decimals: Number = Fraction(0)) -> Fraction:
    [places] = _integers(decimals)
    if abs(places) > 100:
        raise ToolError("takes up to 100 decimals")
    scale = Fraction(10) ** places
    scaled = abs(Fraction(value)) * scale
    rounded = math.floor(scaled + Fraction(1, 2)) / scale
    return -rounded if value < 0 else rounded


def _floor(value: Number) -> Fraction:
    return Fraction(math.floor(value))


def _ceiling(value: Number) -> Fraction:
    return Fraction(math.ceil(value))


Function = Callable[..., Number]
CONSTANTS: dict[str, float] = {"pi": math.pi, "e": math.e}
OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: _floor(a / b),
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
ANY = MAX_CHARACTERS
# Each function, and the fewest and most arguments that it takes. A multiple of pi is a float only
# nearly, so the circular functions are rounded to what is true of them: sin(pi) is 0.
FUNCTIONS: dict[str, tuple[Function, int, int]] = {
    "sqrt": (_square_root, 1, 1),
    "abs": (abs, 1, 1),
    "round": (_round, 1, 2),
    "floor": (_floor, 1, 1),
    "ceil": (_ceiling, 1, 1),
    "min": (min, 2, ANY),
    "max": (max, 2, ANY),
    "gcd": (_of_integers(math.gcd), 1, ANY),
    "lcm": (_of_integers(math.lcm), 1, ANY),
    "factorial": (_of_integers(math.factorial, MAX_COMBINATORIAL), 1, 1),
    "comb": (_of_integers(math.comb, MAX_COMBINATORIAL), 2, 2),
    "perm": (_of_integers(math.perm, MAX_COMBINATORIAL), 2, 2),
    "exp": (_of_float(math.exp), 1, 1),
    "log": (_logarithm, 1, 2),
    "ln": (_logarithm, 1, 1),
    "log2": (lambda value: _logarithm(value, Fraction(2)), 1, 1),
    "log10": (lambda value: _logarithm(value, Fraction(10)), 1, 1),
    "sin": (_of_float(math.sin, 15), 1, 1),
    "cos": (_of_float(math.cos, 15), 1, 1),
    "tan": (_of_float(math.tan, 15), 1, 1),
    "asin": (_of_float(math.asin), 1, 1),
    "acos": (_of_float(math.acos), 1, 1),
    "atan": (_of_float(math.atan), 1, 1),
    "degrees": (_of_float(math.degrees), 1, 1),
    "radians": (_of_float(math.radians), 1, 1),
}

TOOLS = (define_tool(calculate, "Arithmetic", {"expression": "string"}),)
