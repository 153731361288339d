"""How a record of each known schema becomes a document.

A function takes a record and returns a Document. KeyError, TypeError, AttributeError and ValueError
mean that the record is not in the schema; the message is shown with the record's place.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from typing import Any

from svend.data.documents import Document, Message, Role, conversation, dump_json
from svend.data.records import Record, file_digest
from svend.own_code import load_function, source_file

ToDocument = Callable[[Record], Document]
# As chat APIs call them, and as ShareGPT's files do.
SPEAKERS = {
    "system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "human": Role.USER,
    "assistant": Role.ASSISTANT, "gpt": Role.ASSISTANT, "tool": Role.TOOL, "function": Role.TOOL,
    "observation": Role.TOOL,
}


def gsm8k_document(record: Record) -> Document:
    """openai/gsm8k: question; answer with <<calculator>> marks and `#### result`."""
    return conversation((Role.USER, record["question"]), (Role.ASSISTANT, record["answer"]))


def openmath_document(record: Record) -> Document:
    """nvidia/OpenMathInstruct-2: problem, generated_solution, expected_answer."""
    solution, expected = record["generated_solution"], record["expected_answer"]
    if not isinstance(solution, str) or not isinstance(expected, str):
        raise ValueError("generated_solution and expected_answer must be text")
    answer = f"{solution}\n#### {expected}"
    return conversation((Role.USER, record["problem"]), (Role.ASSISTANT, answer))


def xlam_document(record: Record) -> Document:
    """Salesforce/xlam-function-calling-60k: query; tools and answers, each a list as JSON text."""
    tools, calls = (_json_list(record, key) for key in ("tools", "answers"))
    return Document((
        Message(Role.TOOLS, dump_json(tools)),
        Message(Role.USER, record["query"]),
        *(_call(call["name"], call["arguments"]) for call in calls),
    ))


def toolace_document(record: Record) -> Document:
    """Team-ACE/ToolACE: system, with the tools as JSON in it, and conversations of from and value.

    A call is written `[name(key=value), ...]` there. What does not parse as that is an answer.
    """
    turns = [Message(_speaker(turn["from"]), turn["value"]) for turn in record["conversations"]]
    messages = [_toolace_system(record["system"])]
    for turn in turns:
        calls = _toolace_calls(turn.content) if turn.role is Role.ASSISTANT else []
        messages.extend(calls or [turn])
    return Document(tuple(messages))


def chat_document(record: Record) -> Document:
    """A chat: `messages` of role and content, or `conversations` of from and value.

    The first is what chat APIs have, with `tool_calls` in a message, the second ShareGPT's form,
    with a call as JSON from `function_call`. Beside them may stand `tools` and `system`.
    """
    turns = record["messages"] if "messages" in record else record.get("conversations")
    if not isinstance(turns, list):
        raise ValueError(
            "a chat has messages, a list of role and content, or conversations, of from and value; "
            f"found {', '.join(map(str, record))}"
        )
    messages = []
    if record.get("tools"):
        tools = record["tools"]
        messages.append(Message(Role.TOOLS, dump_json(
            _from_json(tools, "tools") if isinstance(tools, str) else tools
        )))
    if record.get("system"):
        messages.append(Message(Role.SYSTEM, record["system"]))
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not turn.keys() & {"role", "from"}:
            found = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
            raise ValueError(f"message {number} has no role: found {found}")
        messages += _chat_turn(turn)
    return Document(tuple(messages))


def _chat_turn(turn: dict[str, Any]) -> list[Message]:
    """Return what one turn of a chat says, and calls."""
    speaker = turn["role"] if "role" in turn else turn["from"]
    content: Any = turn.get("content") if "content" in turn else turn.get("value")
    if speaker == "function_call":
        return [_chat_call(_from_json(content, "function_call"))]
    role = _speaker(speaker)
    calls = turn.get("tool_calls") or ()
    if turn.get("function_call"):  # as the APIs had it when there was one call a message
        calls = [turn["function_call"]]
    if isinstance(content, list):
        content = "".join(map(_text_of_part, content))
    spoken = [Message(role, content)] if content or not calls else []
    return spoken + [_chat_call(call.get("function") or call) for call in calls]


def _text_of_part(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise ValueError(f"a part of a message is '{kind}'; only text can be read")
    text: str = part["text"]
    return text


def _chat_call(function: dict[str, Any]) -> Message:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = _from_json(arguments, "arguments")
    return _call(function["name"], arguments)


def _from_json(text: Any, name: str) -> Any:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {type(text).__name__}, not JSON as text")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def prompt_document(record: Record) -> Document:
    """A prompt and its completion."""
    return conversation((Role.USER, record["prompt"]), (Role.ASSISTANT, record["completion"]))


def text_document(record: Record) -> Document:
    """Running text under the key `text`."""
    return conversation((Role.TEXT, record["text"]))


# Those above, by the names that a configuration gives them.
BUILT_IN = frozenset(
    f"{__name__}:{function.__name__}" for function in (
        gsm8k_document, openmath_document, xlam_document, toolace_document, chat_document,
        prompt_document, text_document,
    )
)


def find_schema(reference: str) -> ToDocument:
    """Return the function that `module:function` or `file.py:function` names.

    Of a user's module as its file is now, whatever was imported of it before.
    """
    found: ToDocument = load_function(
        reference, "training.data.own_sources: to_document", anew=reference not in BUILT_IN
    )
    return found


def schema_digest(reference: str) -> str:
    """Return what names the code that makes documents: a user's file by its content."""
    file = None if reference in BUILT_IN else source_file(reference)
    return reference if file is None else f"{file_digest(file)}:{reference.rpartition(':')[2]}"


def _speaker(name: str) -> Role:
    if name not in SPEAKERS:
        raise ValueError(f"unknown speaker '{name}'; known: {', '.join(SPEAKERS)}")
    return SPEAKERS[name]


def _json_list(record: Record, key: str) -> list[dict[str, Any]]:
    decoded = json.loads(record[key])
    if not isinstance(decoded, list) or not all(isinstance(item, dict) for item in decoded):
        raise ValueError(f"{key} must be a JSON list of objects")
    return decoded


def _call(name: str, arguments: dict[str, Any]) -> Message:
    return Message(Role.TOOL_CALL, dump_json({"name": name, "arguments": arguments}))


def _toolace_system(system: str) -> Message:
    start = system.find("[{")
    if start >= 0:
        try:
            tools, _ = json.JSONDecoder().raw_decode(system[start:])
        except ValueError:
            return Message(Role.SYSTEM, system)
        return Message(Role.TOOLS, dump_json(tools))
    return Message(Role.SYSTEM, system)


def _toolace_calls(text: str) -> list[Message]:
    """Return the calls in `[Name of Tool(key="value"), other(n=1)]`, or nothing."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith(")]")):
        return []
    calls, rest = [], text[1:-1]
    while rest:
        name, bracket, rest = rest.partition("(")
        end = _closing(rest)
        if not bracket or end is None:
            return []
        try:
            parsed = ast.parse(f"f({rest[:end]})", mode="eval").body
            assert isinstance(parsed, ast.Call)
            keywords = {k.arg or "": ast.literal_eval(k.value) for k in parsed.keywords}
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return []
        if parsed.args or "" in keywords or not name.strip():
            return []
        calls.append(_call(name.strip(), keywords))
        rest = rest[end + 1:].lstrip(", ")
    return calls


def _closing(text: str) -> int | None:
    """Where the bracket that is open closes; brackets within quotes do not count."""
    depth, quote, escaped = 1, "", False
    for index, character in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return None
