"""What a source yields: a conversation, or a plain text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

import xxhash


class Role(Enum):
    """Who speaks in a message; TEXT is running text that nobody speaks.

    TOOLS is the declaration of the tools that may be called, a JSON list; TOOL_CALL is one call, a
    JSON object of name and arguments; TOOL is what it returned.
    """

    SYSTEM = "system"
    TOOLS = "tools"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL_CALL = "tool_call"
    TOOL = "tool"
    TEXT = "text"


class Kind(Enum):
    """The kinds of data that a mix is made of."""

    REASONING = "reasoning"
    TOOL_USE = "tool_use"
    GENERAL = "general"


# What the model says; the rest is said to it.
SPOKEN_BY_MODEL = (Role.ASSISTANT, Role.TOOL_CALL)


@dataclass(frozen=True, slots=True)
class Message:
    """What is said in one role."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One training example."""

    messages: tuple[Message, ...]

    @property
    def question_digest(self) -> int:
        """64 bits of a hash of what is asked, by which train and held-out parts are kept apart.

        Whitespace and case do not count, so that trivial variants fall on the same side.
        """
        asked = [m.content for m in self.messages if m.role in (Role.USER, Role.TEXT)]
        return _digest(" ".join(" ".join(asked).lower().split()))

    @property
    def text_bytes(self) -> int:
        """The size of its text in UTF-8, control tokens not counted."""
        return sum(len(message.content.encode()) for message in self.messages)

    @property
    def digest(self) -> int:
        """64 bits of a hash of the whole document, by which exact duplicates are found."""
        parts = [part for m in self.messages for part in (m.role.name, m.content)]
        return _digest("\0".join(parts))


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def dump_json(value: Any) -> str:
    """Return JSON as every document has it, and as a chat template's `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


def conversation(*turns: tuple[Role, str]) -> Document:
    """Return a document of these turns."""
    return Document(tuple(Message(role, content) for role, content in turns))
