"""A model's turn: what it says, token by token, and the results that its calls get."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from svend.data.chat import END_OF_MESSAGE, ROLE_TOKENS
from svend.data.documents import Message, Role
from svend.data.tokenizer import DocumentTokenizer
from svend.evaluation.benchmark import Answer

# Carries out one call as the model wrote it, and returns the text of the tool's message.
CarryOut = Callable[[str], str]


class Dialogue:
    """The model's turn in answer to messages; a `Turn` of the decoder.

    A message begins with its role's token and ends with `<|end|>`. Where calls are carried out,
    each gets its result at once and the model goes on. Without declared tools the turn is one
    answer; with them it ends where the model begins neither an answer nor a call.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: DocumentTokenizer,
        max_new_tokens: int,
        carry_out: CarryOut | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._carry_out = carry_out
        self._offers_tools = any(m.role is Role.TOOLS for m in messages)
        self._role: Role | None = None if self._offers_tools else Role.ASSISTANT
        self._end = tokenizer.control_ids[END_OF_MESSAGE]
        self._spoken = {
            tokenizer.control_ids[ROLE_TOKENS[role]]: role
            for role in (Role.ASSISTANT, Role.TOOL_CALL)
        }
        self._control = set(tokenizer.control_ids.values())
        self._text: list[int] = []
        self._messages: list[Message] = []
        self._tokens = self._taken = 0
        self._complete = False

    def take(self, token: int) -> Sequence[int] | None:
        """Take a sampled token; return what is put after it, or None where the turn ends."""
        self._tokens += 1
        self._taken += 1
        inserted = self._follow(token)
        if inserted is None:
            return None
        self._taken += len(inserted)
        return None if self._taken >= self._max_new_tokens else inserted

    @property
    def speaks(self) -> bool:
        """Whether what comes next belongs to an answer, not to a call or the choice of one."""
        return self._role is Role.ASSISTANT

    def answer(self) -> Answer:
        """Return the turn as far as it has come."""
        messages = self._messages
        if self._role is not None and self._text:
            messages = [*messages, self._message(self._role)]
        return Answer(tuple(messages), self._tokens, self._complete)

    def _follow(self, token: int) -> Sequence[int] | None:
        if self._role is None:
            # The model chooses: it says something, or calls, or is done.
            self._role = self._spoken.get(token)
            self._complete = self._role is None
            return () if self._role is not None else None
        if token not in self._control:
            self._text.append(token)
            return ()
        role, self._role = self._role, None
        self._messages.append(self._message(role))
        self._text = []
        if token != self._end:
            return None
        if not self._offers_tools:
            self._complete = True
            return None
        if role is Role.TOOL_CALL and self._carry_out is not None:
            result = Message(Role.TOOL, self._carry_out(self._messages[-1].content))
            self._messages.append(result)
            return self._tokenizer.encode_message(result)
        return ()

    def _message(self, role: Role) -> Message:
        return Message(role, self._tokenizer.decode(self._text))
