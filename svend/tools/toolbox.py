"""The tools that a model is offered, and its calls: read, checked and carried out.

A call is a JSON object of name and arguments. Whatever is wrong with one becomes a result that
says so, `{"error": ...}`, for the model to try again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from svend.isolation import (
    DEFAULT_MEMORY_BYTES,
    CallFailed,
    IsolatedCaller,
    IsolatedCallError,
    MemoryLimitExceeded,
    TimeLimitExceeded,
)
from svend.tools import calculator, chemistry, physics
from svend.tools.tool import Tool, ToolError, quote

TOOLS: dict[str, Tool] = {
    tool.name: tool for tool in (*calculator.TOOLS, *chemistry.TOOLS, *physics.TOOLS)
}
DEFAULT_TIMEOUT_SECONDS = 2.0
MAX_CALL_CHARACTERS = 4000
MAX_RESULT_CHARACTERS = 500
MAX_ERROR_CHARACTERS = 200
ERROR_PREFIX = '{"error": '


@dataclass(frozen=True)
class Call:
    """A call that can be carried out: the tool is there, and the arguments fit its schema."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class InvalidCall:
    """A call that cannot be carried out, and why."""

    reason: str


class Toolbox:
    """A choice of tools, whose calls are carried out in this process.

    For calls that are known to be sound, as in training data; see IsolatedToolbox for a model's.
    """

    def __init__(self, tools: Iterable[Tool] = tuple(TOOLS.values())) -> None:
        self.tools = {tool.name: tool for tool in tools}

    def declarations(self) -> list[dict[str, Any]]:
        """Return what the prompt declares: each tool's name, description and JSON schema."""
        return [
            {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}
            for t in self.tools.values()
        ]

    def parse_call(self, content: str) -> Call | InvalidCall:
        """Return the call that the model wrote, checked against the tool's schema."""
        call = read_call(content)
        if isinstance(call, InvalidCall):
            return call
        if call.name not in self.tools:
            offered = ", ".join(self.tools) or "none"
            return InvalidCall(f"unknown tool {quote(call.name)}; there are {offered}")
        try:
            self.tools[call.name].check_arguments(call.arguments)
        except ToolError as error:
            return InvalidCall(str(error))
        return call

    def call(self, content: str) -> str:
        """Return what the call's tool returns, or the error as JSON, as the model reads it."""
        call = self.parse_call(content)
        if isinstance(call, InvalidCall):
            return error_result(call.reason)
        try:
            result = self._carry_out(self.tools[call.name], call.arguments)
        except ToolError as error:
            return error_result(f"{call.name}: {error}")
        if len(result) > MAX_RESULT_CHARACTERS:
            return f"{result[:MAX_RESULT_CHARACTERS]}..."
        return result

    def _carry_out(self, tool: Tool, arguments: Mapping[str, Any]) -> str:
        return tool.function(**arguments)


class IsolatedToolbox(Toolbox):
    """A toolbox whose calls are carried out in a process of their own, with limits.

    For calls that a model writes: whatever their arguments, an answer comes within the time limit.
    The functions of its tools must be importable by their module and name.
    """

    def __init__(
        self,
        tools: Iterable[Tool] = tuple(TOOLS.values()),
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        super().__init__(tools)
        self.timeout_seconds = timeout_seconds
        self._caller = IsolatedCaller(memory_bytes, prepare=(f"{__name__}:load_libraries",))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._caller.close()

    def _carry_out(self, tool: Tool, arguments: Mapping[str, Any]) -> str:
        function = f"{tool.function.__module__}:{tool.function.__qualname__}"
        try:
            return str(self._caller.call(function, arguments, self.timeout_seconds))
        except TimeLimitExceeded:
            raise ToolError(f"took longer than {self.timeout_seconds:g} s") from None
        except MemoryLimitExceeded:
            raise ToolError("needs too much memory") from None
        except CallFailed as error:
            raise ToolError(
                error.message if error.kind == ToolError.__name__ else f"failed ({error})"
            ) from None
        except IsolatedCallError:
            raise ToolError("failed") from None


def read_call(content: str) -> Call | InvalidCall:
    """Return the call that the model wrote, of whatever tool, by its form alone."""
    try:
        value = _read_json(content)
    except ToolError as error:
        return InvalidCall(str(error))
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return InvalidCall('a call is an object {"name": ..., "arguments": {...}} and no more')
    if not isinstance(value["name"], str):
        return InvalidCall("the name of a call must be a string")
    if not isinstance(value["arguments"], dict):
        return InvalidCall("the arguments of a call must be an object")
    return Call(value["name"], value["arguments"])


def _read_json(content: str) -> Any:
    if len(content) > MAX_CALL_CHARACTERS:
        raise ToolError(f"the call is longer than {MAX_CALL_CHARACTERS} characters")
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except ValueError as error:  # NaN; an integer too long for Python to read
        reason = str(error)
    except RecursionError:
        reason = "nested too deeply"
    raise ToolError(f"the call is not valid JSON: {reason}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def error_result(reason: str) -> str:
    """Return the text of a TOOL message that says what is wrong: one line, valid UTF-8."""
    line = " ".join(reason.split())
    if len(line) > MAX_ERROR_CHARACTERS:
        line = f"{line[:MAX_ERROR_CHARACTERS]}..."
    # The model may have written half of a surrogate pair, which UTF-8 has no bytes for.
    encodable = line.encode("utf-8", "replace").decode()
    return json.dumps({"error": encodable}, ensure_ascii=False)


def is_error(result: str) -> bool:
    """Return whether a call's result says that it failed."""
    return result.startswith(ERROR_PREFIX)


def load_libraries() -> None:
    """Load what the tools use, so that the first call takes no longer than the next."""
    chemistry.molar_mass("H2O")
    chemistry.balance_equation("H2 + O2 -> H2O")
    physics.convert_units(1, "km", "m")
