"""The one format of conversations: for training, evaluation, serving and export.

A message is its role's control token, its text, and `<|end|>`; running text is only itself; every
document ends with `<|endoftext|>`. Tools are declared in a message of their own, a JSON list; a
call is a JSON object of name and arguments; text that imitates a control token stays text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from svend.data.documents import SPOKEN_BY_MODEL, Document, Role

END_OF_TEXT = "<|endoftext|>"
END_OF_MESSAGE = "<|end|>"
ROLE_TOKENS: dict[Role, str] = {role: f"<|{role.value}|>" for role in Role if role is not Role.TEXT}
CONTROL_TOKENS = (END_OF_TEXT, END_OF_MESSAGE, *ROLE_TOKENS.values())
# Part of a tokenised cache's identity: raise it when `render` changes what it returns.
TEMPLATE_VERSION = 2

# The same as `render`, for those who read tokenizer_config.json. Whoever fills it in with text
# that nobody checked can have control tokens imitated: it renders text, `render` renders ids.
CHAT_TEMPLATE = (
    "{%- if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.content or not message.tool_calls %}"
    "{{ '<|' + message.role + '|>' }}{{ message.content }}<|end|>"
    "{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- set called = call.function or call %}"
    '<|tool_call|>{"name": {{ called.name | tojson }}, "arguments": '
    "{{ called.arguments if called.arguments is string else called.arguments | tojson }}}<|end|>"
    "{%- endfor %}"
    "{%- endfor %}"
    # With tools the model begins by choosing between an answer and a call.
    "{%- if not add_generation_prompt %}<|endoftext|>"
    "{%- elif not tools %}<|assistant|>{% endif %}"
)


def render(
    document: Document, encoded: Iterator[Sequence[int]], control_ids: Mapping[str, int]
) -> list[Sequence[int]]:
    """Return a document's token ids, in pieces, given those of its messages' texts in order."""
    pieces: list[Sequence[int]] = []
    for message in document.messages:
        if message.role is Role.TEXT:
            pieces.append(next(encoded))
        else:
            start = control_ids[ROLE_TOKENS[message.role]]
            pieces += (start,), next(encoded), (control_ids[END_OF_MESSAGE],)
    pieces.append((control_ids[END_OF_TEXT],))
    return pieces


def speaker_marks(control_ids: Mapping[str, int]) -> npt.NDArray[np.int8]:
    """Return, by token id, 1 where the model begins to speak, 0 where another does, else -1."""
    marks = np.full(max(control_ids.values()) + 1, -1, dtype=np.int8)
    for role, token in ROLE_TOKENS.items():
        marks[control_ids[token]] = role in SPOKEN_BY_MODEL
    return marks


def spoken_by_model(
    tokens_T: npt.NDArray[np.integer], starts: Sequence[int], first_spoken: Sequence[bool],
    marks: npt.NDArray[np.int8],
) -> npt.NDArray[np.bool_]:
    """Return which tokens the model says, its own role token and the end included.

    `starts` are the places where another document, or a piece of one, begins; `first_spoken` says
    whether it begins with the model speaking, as running text does.
    """
    known_T = np.where(tokens_T < len(marks), tokens_T, 0)
    marks_T = np.where(tokens_T < len(marks), marks[known_T], -1)
    for start, spoken in zip(starts, first_spoken, strict=True):
        if marks_T[start] < 0:
            marks_T[start] = spoken
    places_T = np.where(marks_T >= 0, np.arange(len(marks_T)), 0)
    spoken_T: npt.NDArray[np.bool_] = marks_T[np.maximum.accumulate(places_T)] > 0
    return spoken_T
