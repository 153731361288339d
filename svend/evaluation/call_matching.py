"""Whether calls are the accepted ones, by their structure, as BFCL's AST checker decides it.

Patil et al. 2025, "The Berkeley Function Calling Leaderboard", ICML. For each parameter the data
names the values that are accepted; "" among them says that the parameter may be left out, or left
empty. It differs from the checker in what follows:

- text is normalised wherever it stands in a value, and an array's types are checked at every depth;
- an integer passes for a float within arrays too, for JSON need not write 1.0;
- calls are assigned to accepted ones by a matching, so that no order of them is at fault;
- true is not 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svend.data.documents import dump_json
from svend.tools.toolbox import Call

IGNORED_IN_TEXT = re.compile(r"[ ,./\-_*^]")
LEFT_OUT = ""
# The Python types that JSON has for BFCL's type names; others allow any.
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "float": (int, float), "boolean": (bool,),
    "array": (list,), "tuple": (list,), "dict": (dict,),
}
SHOWN_CHARACTERS = 60

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class AcceptedCall:
    """A call that is expected: the function, and the accepted values of each parameter.

    parameters: the function's declaration, a schema with BFCL's type names.
    """

    name: str
    values: Mapping[str, Sequence[Any]]
    parameters: Schema

    def __str__(self) -> str:
        shown = (
            f"{name}={' | '.join('left out' if v == LEFT_OUT else _shown(v) for v in values)}"
            for name, values in self.values.items()
        )
        return f"{self.name}({', '.join(shown)})"


def calls_fault(calls: Sequence[Call], accepted: Sequence[AcceptedCall]) -> str:
    """Return why the calls are not the accepted ones in some order; "" if they are."""
    if len(calls) != len(accepted):
        return f"{len(calls)} calls where {len(accepted)} are expected"
    faults = [[call_fault(call, one) for call in calls] for one in accepted]
    unmatched = _first_unmatched([[not fault for fault in row] for row in faults])
    if unmatched is None:
        return ""
    # Of the calls, the one that got furthest tells most: to the function, at least.
    row = zip(calls, faults[unmatched], strict=True)
    same_name = [fault for call, fault in row if call.name == accepted[unmatched].name]
    return next((fault for fault in same_name if fault), faults[unmatched][0]) or (
        f"{accepted[unmatched].name}: called once where more calls are expected"
    )


def call_fault(call: Call, accepted: AcceptedCall) -> str:
    """Return why a call is not the accepted one; "" if it is."""
    if call.name != accepted.name:
        return f"{call.name} called where {accepted.name} is expected"
    for name in accepted.parameters.get("required", ()):
        if name not in call.arguments:
            return f"{call.name}: required {name} is missing"
    for name, value in call.arguments.items():
        if fault := _argument_fault(name, value, accepted):
            return f"{call.name}: {fault}"
    for name, values in accepted.values.items():
        if name not in call.arguments and LEFT_OUT not in values:
            return f"{call.name}: {name} is missing"
    return ""


def matches(value: Any, accepted: Any, schema: Schema | None) -> bool:
    """Return whether a value is the accepted one, for a parameter or a part of one.

    schema: the declaration of its type; None where only the value counts. A value of the accepted
    one's own type matches, whatever is declared, as where a variable stands for an array.
    """
    declared = schema.get("type") if schema else None
    if isinstance(accepted, str):
        if accepted == LEFT_OUT and declared in ("array", "tuple"):
            return bool(value == [])
        text_allowed = accepted != LEFT_OUT or declared in ("string", "any", None)
        return text_allowed and isinstance(value, str) and normalise(value) == normalise(accepted)
    if isinstance(accepted, list):
        return isinstance(value, list) and _items_match(value, accepted, schema)
    if isinstance(accepted, dict):
        return isinstance(value, dict) and _fields_match(value, accepted)
    if accepted is None or isinstance(accepted, bool) or isinstance(value, bool):
        return value is accepted
    own_type = type(value) is type(accepted) or _of_type(value, schema)
    return bool(own_type and value == accepted)


def normalise(text: str) -> str:
    """Return text as BFCL compares it: lower case, without spaces and `,./-_*^`, one quote sign."""
    return IGNORED_IN_TEXT.sub("", text).lower().replace("'", '"')


def _items_match(value: Sequence[Any], accepted: Sequence[Any], schema: Schema | None) -> bool:
    """Compare arrays, item by item; "" is an item like any other there."""
    items = schema.get("items") if schema else None
    return len(value) == len(accepted) and all(
        part == one if one == LEFT_OUT else matches(part, one, items)
        for part, one in zip(value, accepted, strict=True)
    )


def _fields_match(value: Mapping[str, Any], accepted: Mapping[str, Any]) -> bool:
    """Compare objects. Each field has a list of accepted values, or one where it is nested."""
    listed = {key: one if isinstance(one, list) else [one] for key, one in accepted.items()}
    return all(
        key in listed and any(matches(part, one, None) for one in listed[key])
        for key, part in value.items()
    ) and all(key in value or LEFT_OUT in values for key, values in listed.items())


def _argument_fault(name: str, value: Any, accepted: AcceptedCall) -> str:
    properties = accepted.parameters.get("properties", {})
    if name not in properties or name not in accepted.values:
        return f"unexpected {name}"
    schema = properties[name]
    if any(matches(value, one, schema) for one in accepted.values[name]):
        return ""
    wrong = "not an accepted value" if _of_type(value, schema) else f"no {schema['type']}"
    return f"{name} = {_shown(value)} is {wrong}"


def _of_type(value: Any, schema: Schema | None) -> bool:
    allowed = JSON_TYPES.get(str(schema.get("type")) if schema else "")
    return allowed is None or (
        isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
    )


def _first_unmatched(edges: Sequence[Sequence[bool]]) -> int | None:
    """Return the first row that no matching of rows to columns can take in; None if all fit.

    Augmenting paths (Kuhn 1955).
    """
    row_of: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, edge in enumerate(edges[row]):
            if edge and column not in tried:
                tried.add(column)
                if column not in row_of or place(row_of[column], tried):
                    row_of[column] = row
                    return True
        return False

    return next((row for row in range(len(edges)) if not place(row, set())), None)


def _shown(value: Any) -> str:
    text = dump_json(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
