"""The tools: the calculator, chemistry and physics are right, and say what is wrong."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from svend.tools.calculator import calculate
from svend.tools.chemistry import balance_equation, molar_mass, stoichiometry
from svend.tools.formatting import format_number
from svend.tools.physics import CONSTANTS, convert_units, physical_constant
from svend.tools.tool import ToolError

# The calculator.

@pytest.mark.parametrize(("expression", "value"), [
    ("0.1 + 0.2", "0.3"),
    ("7/2", "3.5"),
    ("1/3", "0.333333333333"),
    ("2/3 + 1/3", "1"),
    ("-7 // 2", "-4"),
    ("-7 % 3", "2"),
    ("-2**2", "-4"),
    ("2^-2", "0.25"),
    ("2**3**2", "512"),
    ("1.50 * 2", "3"),
    ("6.02e23 * 2", "1204000000000000000000000"),
    ("123456789012.345 * 1", "123456789012.345"),
    ("12 \N{MULTIPLICATION SIGN} 3 \N{DIVISION SIGN} 4 \N{MINUS SIGN} 1", "8"),
    ("sqrt(9/4)", "1.5"),
    ("sqrt(2)**2", "2"),
    ("8 ** 0.5", "2.82842712475"),
    ("factorial(20)", "2432902008176640000"),
    ("gcd(12, 18) + lcm(4, 6)", "18"),
    ("max(1, 2.5) - min(3, 4, 0)", "2.5"),
    ("round(2.5) + round(-2.345, 2)", "0.65"),
    ("floor(-1.5) + ceil(1.2)", "0"),
    ("log(8, 2) + ln(e) + log10(1000)", "7"),
    ("sin(pi) + cos(0) + sin(pi / 6)", "1.5"),
    ("degrees(pi)", "180"),
    ("comb(5, 2) * perm(4, 2)", "120"),
    ("exp(-20)", "2.06115362244e-9"),
    ("2 ** 200", "1.60693804426e60"),
])
def test_the_calculator_writes_a_value_as_a_person_would(expression: str, value: str) -> None:
    assert calculate(expression) == value


Expression = tuple[str, Fraction]
LITERALS = st.integers(0, 10**6).map(lambda n: (str(n), Fraction(n))) | st.decimals(
    0, 1000, places=3
).map(lambda d: (str(d), Fraction(d)))
OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction | int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "//": operator.floordiv, "%": operator.mod,
}


def _combine(left: Expression, symbol: str, right: Expression) -> Expression:
    assume(right[1] != 0 or symbol in ("+", "-", "*"))
    return f"({left[0]}) {symbol} ({right[0]})", Fraction(OPERATIONS[symbol](left[1], right[1]))


EXPRESSIONS = st.recursive(
    LITERALS,
    lambda inner: st.builds(_combine, inner, st.sampled_from(list(OPERATIONS)), inner)
    | inner.map(lambda of: (f"-({of[0]})", -of[1])),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS)
def test_the_calculator_agrees_with_rational_arithmetic(expression: Expression) -> None:
    text, exact = expression
    shown = Fraction(calculate(text))
    if exact.denominator == 1:
        assert shown == exact
    assert abs(shown - exact) <= abs(exact) * Fraction(1, 10**11)


@settings(max_examples=300, deadline=None)
@given(st.fractions() | st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_a_formatted_number_reads_as_the_number(number: Fraction | float) -> None:
    text = format_number(number)
    assert re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*[1-9])?(e-?[1-9]\d*)?", text)
    assert abs(Fraction(text) - Fraction(number)) <= abs(Fraction(number)) * Fraction(1, 10**11)


@pytest.mark.parametrize(("expression", "reason"), [
    ("", "empty"),
    ("1/0", "division by zero"),
    ("0 ** -1", "division by zero"),
    ("(1 + 2", "parentheses do not match"),
    ("1 +", "not an arithmetic expression"),
    ("2x", r"write \* between a number and a name"),
    ("1,234 + 1", "without thousands separators"),
    ("x + 1", "unknown name 'x'"),
    ("root(4)", "unknown function 'root'; there are sqrt"),
    ("sqrt(-1)", "square root of a negative number"),
    ("(-8) ** (1/3)", "not real"),
    ("factorial(0.5)", "takes integers"),
    ("factorial(10**6)", "integers up to 1000"),
    ("sqrt(1, 2)", "takes 1 argument"),
    ("log(0)", "positive"),
    ("acos(2)", "not defined"),
    ("exp(10**4)", "too large"),
    ("__import__('os')", "unexpected character"),
    ("a.b", "only numbers"),
    ("1 if 1 else 2", "only numbers"),
    ("2 + 2 = 4", "unexpected character '='"),
    ("0x10", "write"),
    ("9" * 501, "longer than 500 characters"),
])
def test_the_calculator_says_what_is_wrong(expression: str, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        calculate(expression)


# Chemistry.

@pytest.mark.parametrize(("formula", "mass"), [
    ("H2O", "18.015 g/mol"),
    ("Ca(OH)2", "74.093 g/mol"),
    ("CuSO4.5H2O", "249.685 g/mol"),
    ("CuSO4\N{MIDDLE DOT}5H2O", "249.685 g/mol"),
    ("C\N{SUBSCRIPT SIX}H\N{SUBSCRIPT ONE}\N{SUBSCRIPT TWO}O\N{SUBSCRIPT SIX}", "180.156 g/mol"),
    ("SO4^2-", "96.064 g/mol"),
    ("NaCl(aq)", "58.443 g/mol"),
    ("Co", "58.933 g/mol"),
    ("CO", "28.01 g/mol"),
    ("[Fe(CN)6]4-", "211.952 g/mol"),
    ("Fe3+", "55.843 g/mol"),
])
def test_molar_masses(formula: str, mass: str) -> None:
    assert molar_mass(formula) == mass


@pytest.mark.parametrize("formula", [
    "", "h2o", "glucose", "Xx", "Me", "2H2O", "H2O)", "(H2O", "SO42-", "H0", "H99999",
    "((((((((H))))))))", "H" * 100, "e-", "H2O + CO2", "Cu.5", "()",
])
def test_what_is_no_formula_has_no_molar_mass(formula: str) -> None:
    with pytest.raises(ToolError):
        molar_mass(formula)


@pytest.mark.parametrize(("equation", "balanced"), [
    ("C3H8 + O2 -> CO2 + H2O", "C3H8 + 5 O2 -> 3 CO2 + 4 H2O"),
    ("2H2+O2=H2O", "2 H2 + O2 -> 2 H2O"),
    ("Fe(s) + O2(g) --> Fe2O3(s)", "4 Fe + 3 O2 -> 2 Fe2O3"),
    ("MnO4- + Fe2+ + H+ -> Mn2+ + Fe3+ + H2O",
     "MnO4^- + 5 Fe^2+ + 8 H^+ -> Mn^2+ + 5 Fe^3+ + 4 H2O"),
    ("Cr2O7^2- + H+ + e- -> Cr3+ + H2O", "Cr2O7^2- + 14 H^+ + 6 e- -> 2 Cr^3+ + 7 H2O"),
    ("CuSO4.5H2O -> CuSO4 + H2O", "CuSO4.5H2O -> CuSO4 + 5 H2O"),
    ("K4Fe(CN)6 + KMnO4 + H2SO4 -> KHSO4 + Fe2(SO4)3 + MnSO4 + HNO3 + CO2 + H2O",
     "10 K4Fe(CN)6 + 122 KMnO4 + 299 H2SO4 -> "
     "162 KHSO4 + 5 Fe2(SO4)3 + 122 MnSO4 + 60 HNO3 + 60 CO2 + 188 H2O"),
])
def test_equations_are_balanced(equation: str, balanced: str) -> None:
    assert balance_equation(equation) == balanced


Substance = tuple[str, Counter[str]]


def _substance(
    plain: dict[str, int], group: dict[str, int], multiple: int
) -> Substance:
    def write(atoms: dict[str, int]) -> str:
        return "".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in atoms.items())

    atoms = Counter(plain)
    for symbol, n in group.items():
        atoms[symbol] += n * multiple
    return f"{write(plain)}({write(group)}){multiple}", atoms


ATOMS = st.dictionaries(
    st.sampled_from(["H", "C", "N", "O", "Na", "Cl"]), st.integers(1, 9), min_size=1, max_size=3
)
SUBSTANCES = st.builds(_substance, ATOMS, ATOMS, st.integers(2, 4))


def _count(side: str, atoms_of: dict[str, Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for term in side.split(" + "):
        *coefficient, formula = term.split(" ")
        for symbol, n in atoms_of[formula].items():
            total[symbol] += n * int(coefficient[0] if coefficient else 1)
    return total


@settings(max_examples=100, deadline=None)
@given(st.lists(SUBSTANCES, min_size=2, max_size=3, unique_by=lambda s: s[0]),
       st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_balancing_conserves_every_element(
    reactants: list[Substance], coefficients: list[int]
) -> None:
    product: Counter[str] = Counter()
    for (_, atoms), coefficient in zip(reactants, coefficients, strict=False):
        for symbol, n in atoms.items():
            product[symbol] += n * coefficient
    name = "".join(f"{symbol}{n}" for symbol, n in product.items())
    equation = f"{' + '.join(formula for formula, _ in reactants)} -> {name}"
    try:
        balanced = balance_equation(equation)
    except ToolError as error:
        # Of reactants that are made of one another there is more than one mixture.
        assert "more than one way" in str(error)
        assume(False)
    left, right = balanced.split(" -> ")
    atoms_of = {**dict(reactants), name: product}
    assert _count(left, atoms_of) == _count(right, atoms_of)
    numbers = [int(n) for n in re.findall(r"(?:^| )(\d+) ", balanced)]
    all_have_one = len(numbers) == len(reactants) + 1
    assert not all_have_one or math.gcd(*numbers) == 1


@pytest.mark.parametrize(("equation", "reason"), [
    ("H2 + O2", "reactants -> products"),
    ("H2 -> O2 -> H2O", "reactants -> products"),
    ("-> H2O", "reactants -> products"),
    ("H2 -> O2", "H, O is on one side only"),
    ("CO -> C2O2 + CO2", "every substance on its side"),
    ("H2 + O2 -> H2O + H2O2", "more than one way"),
    ("H2O -> H2O", "more than once"),
    ("Na -> Na+", "cannot be balanced"),
    ("water -> H2 + O2", "'water' is not a chemical formula"),
    (" + ".join(f"C{n}H4" for n in range(1, 13)) + " -> CH4O", "more than 12 substances"),
    ("H" * 301, "longer than 300 characters"),
])
def test_what_cannot_be_balanced_is_said(equation: str, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        balance_equation(equation)


@pytest.mark.parametrize(("given", "amount", "unit", "wanted", "wanted_unit", "result"), [
    ("C3H8", 2, "mol", "O2", None, "10 mol"),
    ("C3H8", 44.0952, "g", "CO2", None, "132.027 g"),
    ("O2", 5, "mol", "H2O", "g", "72.0611 g"),
    ("H2O", 18.015287, "g", "C3H8", "mol", "0.25 mol"),
])
def test_amounts_follow_the_balanced_equation(
    given: str, amount: float, unit: str, wanted: str, wanted_unit: str | None, result: str
) -> None:
    equation = "C3H8 + O2 -> CO2 + H2O"
    assert stoichiometry(equation, given, amount, unit, wanted, wanted_unit) == result


def test_an_amount_needs_substances_of_the_equation_and_must_be_positive() -> None:
    with pytest.raises(ToolError, match="'N2' is not in the equation, which has H2, O2, H2O"):
        stoichiometry("H2 + O2 -> H2O", "H2", 1, "g", "N2")
    with pytest.raises(ToolError, match="positive"):
        stoichiometry("H2 + O2 -> H2O", "H2", 0, "g", "O2")


# Physics.

@pytest.mark.parametrize(("value", "unit", "other", "result"), [
    (5, "km", "m", "5000 m"),
    (72, "km/h", "m/s", "20 m/s"),
    (60, "miles per hour", "km/h", "96.56064 km/h"),
    (100, "degC", "degF", "212 degF"),
    (0.1, "m", "cm", "10 cm"),
    (1, "J/(mol*K)", "cal/(mol*K)", "0.239005736138 cal/(mol*K)"),
    (1, "m^3", "L", "1000 L"),
    (1, "m\N{SUPERSCRIPT TWO}", "cm**2", "10000 cm**2"),
    (50, "%", "ppm", "500000 ppm"),
])
def test_units_are_converted(value: float, unit: str, other: str, result: str) -> None:
    assert convert_units(value, unit, other) == result


UNIT_FAMILIES = [
    ["m", "km", "mile", "inch", "ly"], ["s", "hour", "day", "ms"], ["K", "degC", "degF"],
    ["J", "kcal", "eV", "kWh"], ["km/h", "m/s", "knot"], ["Pa", "atm", "psi", "mmHg"],
]
UNIT_PAIRS = st.sampled_from(UNIT_FAMILIES).flatmap(
    lambda family: st.tuples(st.sampled_from(family), st.sampled_from(family))
)


@settings(max_examples=150, deadline=None)
@given(st.floats(0.01, 1e6), UNIT_PAIRS)
def test_a_conversion_there_and_back_gives_the_value(value: float, units: tuple[str, str]) -> None:
    there, _ = convert_units(value, units[0], units[1]).split(" ")
    back, unit = convert_units(float(there), units[1], units[0]).split(" ")
    assert unit == units[0]
    # Scales of temperature do not share their zero: what is lost is of the size of its distance.
    assert math.isclose(float(back), value, rel_tol=1e-9, abs_tol=1e-8)


@pytest.mark.parametrize(("unit", "other", "reason"), [
    ("m", "s", "'m' cannot be converted to 's'"),
    ("smoot_unit", "m", "unknown unit 'smoot_unit'"),
    ("5 m", "m", "cannot read '5 m' as a unit"),
    ("m/", "m", "cannot read"),
    ("()", "m", "cannot read"),
    ("(m", "m", "parentheses"),
    ("", "m", "empty"),
    ("km + m", "m", "cannot read"),
    ("Ym**30", "ym**30", "too large"),
])
def test_what_cannot_be_converted_is_said(unit: str, other: str, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        convert_units(1, unit, other)


@pytest.mark.parametrize(("name", "result"), [
    ("speed of light", "299792458 m/s"),
    ("c", "299792458 m/s"),
    ("The Speed_of_light", "299792458 m/s"),
    ("Planck's constant", "6.62607015e-34 J*s"),
    ("G", "6.6743e-11 m^3/(kg*s^2)"),
    ("g", "9.80665 m/s^2"),
    ("gas constant", "8.31446261815 J/(mol*K)"),
    ("fine-structure constant", "0.00729735256434"),
])
def test_physical_constants(name: str, result: str) -> None:
    assert physical_constant(name) == result


def test_every_constant_has_a_value_and_an_unknown_one_a_hint() -> None:
    for name in CONSTANTS:
        assert float(physical_constant(name).split(" ")[0]) > 0
    with pytest.raises(ToolError, match="did you mean proton mass"):
        physical_constant("protons mass")
