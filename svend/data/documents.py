"""What a source yields: a conversation, or a plain text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum


class Role(Enum):
    """Who speaks in a message; TEXT is running text that nobody speaks."""

    SYSTEM = "system"
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


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One training example."""

    messages: tuple[Message, ...]

    @property
    def question_digest(self) -> bytes:
        """A hash of what is asked, by which train and held-out parts are kept apart.

        Whitespace and case do not count, so that trivial variants fall on the same side.
        """
        asked = [m.content for m in self.messages if m.role in (Role.USER, Role.TEXT)]
        normalized = " ".join(" ".join(asked).lower().split())
        return hashlib.sha256(normalized.encode()).digest()


def conversation(*turns: tuple[Role, str]) -> Document:
    """Return a document of these turns."""
    return Document(tuple(Message(role, content) for role, content in turns))
