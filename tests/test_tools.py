"""The tools: they calculate rightly, and whatever a model writes gets an answer in time."""

from __future__ import annotations

import json
import math
import operator
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from svend.tools.calculator import calculate
from svend.tools.chemistry import balance_equation, molar_mass, stoichiometry
from svend.tools.formatting import format_number
from svend.tools.physics import CONSTANTS, convert_units, physical_constant
from svend.tools.tool import Tool, ToolError, define_tool
from svend.tools.toolbox import (
    MAX_CALL_CHARACTERS,
    MAX_RESULT_CHARACTERS,
    TOOLS,
    Call,
    InvalidCall,
    IsolatedToolbox,
    Toolbox,
    is_error,
    load_libraries,
    read_call,
)
from tests.conftest import ROOT


def hang(text: str) -> str:
    while True:
        text = text[::-1]


def hog(text: str) -> str:
    return text * (1 << 40)


def crash(text: str) -> str:
    raise ZeroDivisionError(text)


def repeat(text: str) -> str:
    return text * 1000


OWN_TOOLS = [define_tool(tool, "", {"text": "string"}) for tool in (hang, hog, crash, repeat)]


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedToolbox]:
    with IsolatedToolbox([*TOOLS.values(), *OWN_TOOLS], timeout_seconds=1.0) as toolbox:
        yield toolbox


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    load_libraries()  # so that no example of hypothesis waits for an import


def _call(tool: str, /, **arguments: Any) -> str:
    return json.dumps({"name": tool, "arguments": arguments})


def _error(result: str) -> str:
    assert is_error(result), result
    assert "\n" not in result
    message: str = json.loads(result)["error"]
    return message


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


# Calls.

def test_a_declaration_is_what_a_prompt_holds_and_short() -> None:
    [declaration] = Toolbox([TOOLS["calculate"]]).declarations()
    assert declaration == {
        "name": "calculate", "description": "Arithmetic",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}},
                       "required": ["expression"]},
    }
    for tool in Toolbox().declarations():
        assert len(json.dumps(tool)) < 450


@pytest.mark.parametrize(("content", "reason"), [
    ("", "not valid JSON"),
    ("calculate(1)", "not valid JSON: Expecting value at character 0"),
    ('{"name": "calculate", "arguments": {"expression": "1"}', "not valid JSON"),
    ('{"name": "calculate", "arguments": {"expression": NaN}}', "NaN is no number"),
    ("[1]", 'a call is an object {"name": ..., "arguments": {...}} and no more'),
    ('{"name": "calculate"}', "a call is an object"),
    ('{"name": "calculate", "arguments": {}, "id": 1}', "and no more"),
    ('{"name": 1, "arguments": {}}', "the name of a call must be a string"),
    ('{"name": "calculate", "arguments": "1"}', "the arguments of a call must be an object"),
    (_call("calc", expression="1"), "unknown tool 'calc'; there are calculate, molar_mass"),
    (_call("calculate"), "calculate: missing argument 'expression'"),
    (_call("calculate", expression="1", x=1),
     "calculate: unexpected argument 'x'; it takes expression"),
    (_call("calculate", expression=1),
     "calculate: 'expression' must be a string, not a number"),
    (_call("calculate", expression=None), "must be a string, not null"),
    (_call("calculate", expression=["1"]), "must be a string, not an array"),
    (_call("calculate", expression={}), "must be a string, not an object"),
    (_call("convert_units", value=True, from_unit="m", to_unit="m"),
     "'value' must be a number, not a boolean"),
    (_call("convert_units", value="5", from_unit="m", to_unit="m"),
     "'value' must be a number, not a string"),
    ('{"name": "convert_units", "arguments": {"value": 1e999, "from_unit": "m", "to_unit": "m"}}',
     "'value' is too large"),
    (_call("convert_units", value=10**400, from_unit="m", to_unit="m"), "'value' is too large"),
    (_call("stoichiometry", equation="", given="", amount=1, unit="kg", wanted=""),
     "'unit' must be one of g, mol"),
])
def test_a_wrong_call_gets_an_error_that_says_what_is_wrong(content: str, reason: str) -> None:
    parsed = Toolbox().parse_call(content)
    assert isinstance(parsed, InvalidCall)
    assert reason in parsed.reason
    assert reason in _error(Toolbox().call(content))


def test_arguments_are_checked_by_every_keyword_of_a_schema() -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    toolbox = Toolbox([Tool(
        "total", "", {"type": "object", "properties": {"numbers": schema}, "required": []},
        lambda numbers=(): str(sum(numbers)),
    )])
    assert toolbox.call(_call("total", numbers=[1, 2.0])) == "3.0"
    assert toolbox.call(_call("total")) == "0"
    assert "'numbers'[1] must be an integer, not a number" in _error(
        toolbox.call(_call("total", numbers=[1, 2.5]))
    )
    with pytest.raises(ValueError, match="a schema has"):
        define_tool(hang, "", {"text": {"type": "string", "pattern": "a"}})


def test_a_valid_call_is_read_and_carried_out() -> None:
    content = '{"name": "calculate", "arguments": {"expression": "12 * 3"}}'
    assert Toolbox().parse_call(content) == Call("calculate", {"expression": "12 * 3"})
    assert Toolbox().call(content) == "36"
    assert not is_error("36")
    other = read_call('{"name": "get_weather", "arguments": {"city": "Rome"}}')
    assert other == Call("get_weather", {"city": "Rome"})


def test_the_error_of_a_tool_names_it() -> None:
    assert _error(Toolbox().call(_call("calculate", expression="1/0"))) == (
        "calculate: division by zero"
    )


# What a model may write, near enough to valid calls to reach the tools.
SCRIBBLE = st.text(
    "0123456789+-*/^%().,=<>[]{}_ \t\n\u00b2\u207b\u2082\ud800eHONaCmskgdpi", max_size=40
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(TOOLS)), st.lists(SCRIBBLE, min_size=4, max_size=4), st.floats())
def test_no_argument_makes_a_toolbox_raise(name: str, texts: list[str], number: float) -> None:
    remaining = iter(texts)
    properties = TOOLS[name].parameters["properties"]
    arguments = {
        parameter: number if schema["type"] == "number"
        else schema["enum"][0] if "enum" in schema else next(remaining)
        for parameter, schema in properties.items()
    }
    result = Toolbox().call(json.dumps({"name": name, "arguments": arguments}))
    assert len(result.encode()) <= 4 * MAX_RESULT_CHARACTERS


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=50) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["name", "arguments", "expression", "value"]), inner, max_size=3),
).map(json.dumps))
def test_no_text_makes_a_toolbox_raise(content: str) -> None:
    Toolbox().call(content).encode()


# Calls that a model makes, in a process of their own.

HOSTILE = {
    "tower of powers": _call("calculate", expression="9**9**9**9"),
    "power of a power": _call("calculate", expression="((9**999)**999)**999"),
    "large literal": _call("calculate", expression="1e999999999"),
    "large factorial": _call("calculate", expression="factorial(factorial(20))"),
    "nested parentheses": _call("calculate", expression="(" * 240 + "1" + ")" * 240),
    "nested signs": _call("calculate", expression="-" * 5000 + "1"),
    "long expression": _call("calculate", expression="1+" * 10**6 + "1"),
    "many commas": _call("calculate", expression=f"lcm({','.join(['9**3000+1'] * 49)},0.5)"),
    "code": _call("calculate", expression="().__class__.__bases__[0]"),
    "null byte": _call("calculate", expression="1\0"),
    "unit to a power": _call("convert_units", value=1, from_unit="m**999999999", to_unit="m"),
    "unit to powers": _call("convert_units", value=1, from_unit="hour**9**9**9", to_unit="s"),
    "group to a power": _call(
        "convert_units", value=1, from_unit="(hour**99)**99999999", to_unit="s"),
    "unit in powers": _call(
        "convert_units", value=1, from_unit="((hour**99)**9)**9", to_unit="((s**99)**9)**9"),
    "long unit": _call("convert_units", value=1, from_unit="km" * 10000, to_unit="m"),
    "shorter long unit": _call("convert_units", value=1, from_unit="km" * 30, to_unit="m"),
    "many units": _call("convert_units", value=1, from_unit="m*" * 900 + "m", to_unit="m"),
    "nested units": _call("convert_units", value=1, from_unit="(" * 30 + "m", to_unit="m"),
    "code as unit": _call("convert_units", value=1, from_unit="__import__('os')", to_unit="m"),
    "large formula": _call("molar_mass", formula="(" * 30 + "H" + ")9" * 30),
    "large count": _call("molar_mass", formula="H9999999999999999999"),
    "long formula": _call("molar_mass", formula="CH2" * 1000),
    "long equation": _call("balance_equation", equation="H2 + " * 700 + "-> H2O"),
    "many plus signs": _call("balance_equation", equation="+" * 290 + "->" + "+" * 5),
    "long constant": _call("physical_constant", name="c" * 3900),
    "nested arrays": "[" * 10**5,
    "nested objects": '{"name":' * 10**5,
    "nested arguments": '{"name": "calculate", "arguments": ' + "[" * 1900 + "]" * 1900 + "}",
    "long number": f'{{"name": "calculate", "arguments": {"9" * 3900}}}',
    "long text": "x" * 10**7,
    "half a surrogate pair": '{"name": "\\ud800", "arguments": {}}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_call_gets_an_error_within_its_limit(
    isolated: IsolatedToolbox, content: str
) -> None:
    isolated.call(_call("calculate", expression="1"))  # the process is there
    start = time.monotonic()
    message = _error(isolated.call(content))
    assert time.monotonic() - start < isolated.timeout_seconds + 0.5
    message.encode()
    reached = re.search(r"took longer|memory|failed", message)
    assert reached is None, "the checks before the work let it through"


@pytest.mark.parametrize(("tool", "reason"), [
    ("hang", "hang: took longer than 1 s"),
    ("hog", "hog: needs too much memory"),
    ("crash", "crash: failed (ZeroDivisionError: abc)"),
])
def test_a_tool_beyond_its_limits_is_an_error_and_the_next_call_works(
    isolated: IsolatedToolbox, tool: str, reason: str
) -> None:
    assert _error(isolated.call(_call(tool, text="abc"))) == reason
    assert isolated.call(_call("calculate", expression="6*7")) == "42"


def test_a_long_result_is_cut(isolated: IsolatedToolbox) -> None:
    assert isolated.call(_call("repeat", text="ab")) == "ab" * (MAX_RESULT_CHARACTERS // 2) + "..."


@pytest.mark.parametrize("content", [
    _call("calculate", expression="12 * 3"),
    _call("calculate", expression="1/0"),
    _call("molar_mass", formula="H2O"),
    _call("balance_equation", equation="H2 + O2 -> H2O"),
    _call("stoichiometry", equation="H2 + O2 -> H2O", given="H2", amount=1, unit="mol",
          wanted="O2", wanted_unit="g"),
    _call("convert_units", value=5, from_unit="km", to_unit="mile"),
    _call("physical_constant", name="c"),
    _call("nothing"),
    "x" * (MAX_CALL_CHARACTERS + 1),
])
def test_an_isolated_toolbox_answers_as_one_in_this_process(
    isolated: IsolatedToolbox, content: str
) -> None:
    plain = Toolbox([*TOOLS.values(), *OWN_TOOLS])
    assert isolated.call(content) == plain.call(content)


def test_declaring_the_tools_loads_no_library() -> None:
    code = (
        "import sys; from svend.tools.toolbox import Toolbox; Toolbox().declarations(); "
        "print([m for m in ('pint', 'sympy', 'molmass', 'numpy', 'torch') if m in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"
