"""Calls of tools: whatever a model writes gets an answer, in time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.tools.tool import Tool, define_tool
from svend.tools.toolbox import (
    MAX_CALL_CHARACTERS,
    MAX_RESULT_CHARACTERS,
    TOOLS,
    Call,
    InvalidCall,
    IsolatedToolbox,
    Toolbox,
    is_error,
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


def _call(tool: str, /, **arguments: Any) -> str:
    return json.dumps({"name": tool, "arguments": arguments})


def _error(result: str) -> str:
    assert is_error(result), result
    assert "\n" not in result
    message: str = json.loads(result)["error"]
    return message


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
    "unit to a power": _call(
        "convert_units", value=1, from_unit="hour**9999999", to_unit="s**9999999"),
    "unit to powers": _call(
        "convert_units", value=1, from_unit="hour**9**9**9", to_unit="s**9**9**9"),
    "group to a power": _call(
        "convert_units", value=1, from_unit="(hour**99)**99999", to_unit="(s**99)**99999"),
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
