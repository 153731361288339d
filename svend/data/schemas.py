"""How a record of each known schema becomes a document.

A function takes a record and returns a Document. KeyError, TypeError, AttributeError and ValueError
mean that the record is not in the schema; the message is shown with the record's place.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from svend.data.documents import Document, Message, Role, conversation, dump_json
from svend.data.records import Record, file_digest
from svend.errors import ConfigError

ToDocument = Callable[[Record], Document]
OWN_MODULES = "svend."
SPEAKERS = {"system": Role.SYSTEM, "human": Role.USER, "user": Role.USER, "gpt": Role.ASSISTANT,
            "assistant": Role.ASSISTANT, "tool": Role.TOOL}


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


def slimorca_document(record: Record) -> Document:
    """Open-Orca/SlimOrca: conversations, a list of from (system, human, gpt) and value."""
    return Document(tuple(
        Message(_speaker(turn["from"]), turn["value"]) for turn in record["conversations"]
    ))


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
    """Messages as chat APIs have them: role, content, tool_calls; tools beside them."""
    messages = []
    if record.get("tools"):
        messages.append(Message(Role.TOOLS, dump_json(record["tools"])))
    for message in record["messages"]:
        if message.get("content") or not message.get("tool_calls"):
            messages.append(Message(_speaker(message["role"]), message["content"]))
        for call in message.get("tool_calls") or ():
            function, arguments = call["function"], call["function"]["arguments"]
            decoded = json.loads(arguments) if isinstance(arguments, str) else arguments
            messages.append(_call(function["name"], decoded))
    return Document(tuple(messages))


def prompt_document(record: Record) -> Document:
    """A prompt and its completion."""
    return conversation((Role.USER, record["prompt"]), (Role.ASSISTANT, record["completion"]))


def text_document(record: Record) -> Document:
    """Running text under the key `text`."""
    return conversation((Role.TEXT, record["text"]))


def find_schema(reference: str) -> ToDocument:
    """Return the function that `module:function` or `file.py:function` names.

    Of a user's module as its file is now, whatever was imported of it before.
    """
    place, _, name = reference.rpartition(":")
    try:
        if place.startswith(OWN_MODULES):
            module = importlib.import_module(place)
        else:
            spec = _spec_of(place)
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)  # its dataclasses look themselves up there
            spec.loader.exec_module(module)
        found: ToDocument = getattr(module, name)
    except Exception as error:
        raise ConfigError(
            f"training.data.own_sources: to_document = '{reference}' cannot be loaded "
            f"({type(error).__name__}: {error}); give file.py:function or module:function"
        ) from error
    return found


def schema_digest(reference: str) -> str:
    """Return what names the code that makes documents: a user's file by its content."""
    place, _, name = reference.rpartition(":")
    origin = None if place.startswith(OWN_MODULES) else _spec_of(place).origin
    return reference if origin is None else f"{file_digest(Path(origin))}:{name}"


def _spec_of(place: str) -> ModuleSpec:
    """Return where a module is, given by its file or its name; raises ImportError for none."""
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
    else:
        spec = importlib.util.find_spec(place)
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{place}'")
    return spec


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
