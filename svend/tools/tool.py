"""What a tool is: a declared name and parameters, and the function that carries out a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# The part of JSON Schema that declarations may use; arguments that are not declared are refused.
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
}
KEYWORDS = {"type", "enum", "items", "description"}
# Beyond this a number does not fit a float.
LARGEST_NUMBER = 1e300
QUOTED_CHARACTERS = 40


class ToolError(ValueError):
    """What is wrong with a call, in a line by which the model can try again."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call by name, with the JSON schema of its arguments.

    parameters: a schema of type object, as in a declaration. function: a module's own function
    of these parameters by keyword; returns the text that the model reads, or raises ToolError.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., str]

    def __post_init__(self) -> None:
        """Refuse a schema of which `check_arguments` would not check every keyword."""
        if self.parameters.keys() - {"type", "properties", "required"}:
            raise ValueError(f"{self.name}: parameters are type, properties and required")
        for name, schema in self.parameters["properties"].items():
            _check_schema(f"{self.name}: {name}", schema)

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise ToolError unless the arguments are those that the schema declares."""
        properties: Mapping[str, Any] = self.parameters["properties"]
        for name in arguments:
            if name not in properties:
                raise ToolError(
                    f"{self.name}: unexpected argument {quote(name)}; it takes "
                    f"{', '.join(properties)}"
                )
        for name in self.parameters["required"]:
            if name not in arguments:
                raise ToolError(f"{self.name}: missing argument '{name}'")
        for name, value in arguments.items():
            _check_value(f"{self.name}: '{name}'", properties[name], value)


def define_tool(
    function: Callable[..., str], description: str, required: Mapping[str, Any],
    optional: Mapping[str, Any] | None = None,
) -> Tool:
    """Return the tool of a function's name, from its arguments' types or schemas."""
    properties = {
        name: schema if isinstance(schema, dict) else {"type": schema}
        for name, schema in {**required, **(optional or {})}.items()
    }
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return Tool(function.__name__, description, parameters, function)


def quote(text: str) -> str:
    """Return what the model wrote, in quotes, cut to a length that a message can hold."""
    return f"'{text[:QUOTED_CHARACTERS]}{'...' if len(text) > QUOTED_CHARACTERS else ''}'"


def _check_schema(where: str, schema: Mapping[str, Any]) -> None:
    if schema.keys() - KEYWORDS or schema["type"] not in TYPES:
        raise ValueError(
            f"{where}: a schema has {', '.join(sorted(KEYWORDS))}, and a type of {', '.join(TYPES)}"
        )
    if (schema["type"] == "array") != ("items" in schema):
        raise ValueError(f"{where}: an array has items, and nothing else has")
    if "items" in schema:
        _check_schema(f"{where}[]", schema["items"])


def _check_value(where: str, schema: Mapping[str, Any], value: Any) -> None:
    wanted = schema["type"]
    # JSON Schema: 5.0 is an integer; a boolean is no number, though Python takes it for one.
    whole = wanted == "integer" and isinstance(value, float) and value.is_integer()
    fits = isinstance(value, TYPES[wanted]) and isinstance(value, bool) == (wanted == "boolean")
    if not (fits or whole):
        got = _with_article(_name(value))
        raise ToolError(f"{where} must be {_with_article(wanted)}, not {got}")
    # Not the other way round, so that NaN is refused.
    if isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:
        raise ToolError(f"{where} is too large")
    if "enum" in schema and value not in schema["enum"]:
        raise ToolError(f"{where} must be one of {', '.join(map(str, schema['enum']))}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(f"{where}[{index}]", schema["items"], item)


def _name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return next((name for name, types in TYPES.items() if isinstance(value, types)), "object")


def _with_article(name: str) -> str:
    if name == "null":
        return name
    return f"an {name}" if name[0] in "aio" else f"a {name}"
