"""Numbers as a person would write them."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

SIGNIFICANT_DIGITS = 12
# Beyond these the number is written with an exponent.
LONGEST_INTEGER = 50
LARGEST_POSITIONAL = 10**15
SMALLEST_POSITIONAL = Fraction(1, 10**6)


def format_number(value: float | Fraction, digits: int = SIGNIFICANT_DIGITS) -> str:
    """Return a finite number with so many significant digits: 2, 0.3, 0.333333333333, 1.5e-7.

    An integer, other than a float, is written out up to 50 digits; by default a number is not
    rounded where 15 significant digits hold it exactly.
    """
    exact = Fraction(value)
    size = abs(exact)
    if exact.denominator == 1 and not isinstance(value, float) and size < 10**LONGEST_INTEGER:
        return str(exact.numerator)
    rounded = _round_significant(exact, digits)
    if digits == SIGNIFICANT_DIGITS and exact == Fraction(longer := _round_significant(exact, 15)):
        rounded = longer
    if exact and not SMALLEST_POSITIONAL <= size < LARGEST_POSITIONAL:
        sign, figures, exponent = rounded.normalize().as_tuple()
        mantissa = "".join(map(str, figures))
        point = f".{mantissa[1:]}" if len(mantissa) > 1 else ""
        assert isinstance(exponent, int)
        power = exponent + len(mantissa) - 1
        return f"{'-' if sign else ''}{mantissa[0]}{point}e{power}"
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _round_significant(exact: Fraction, digits: int) -> Decimal:
    with localcontext() as context:
        context.prec = digits
        context.rounding = ROUND_HALF_EVEN
        return Decimal(exact.numerator) / Decimal(exact.denominator)
