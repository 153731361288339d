"""One thread that owns a model and answers many chats at once.

A waiting chat joins as soon as a lane of the decoder is free, while the others go on. The decoder
is invariant: what a chat is answered does not depend on what else is in the lanes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from svend.data.documents import Message, Role, dump_json
from svend.data.tokenizer import DocumentTokenizer
from svend.errors import UserError
from svend.evaluation.dialogue import Dialogue
from svend.models.generation import Decoder, Request, Sampling
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import Precision
from svend.tools.toolbox import IsolatedToolbox

INCOMPLETE = "\ufffd"  # what the first bytes of a character decode to


class Finish(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"


class QueueFull(UserError):
    """More chats wait than the engine was told to keep."""


class EngineStopped(UserError):
    """The engine has ended, or broke."""


@dataclass(frozen=True)
class Chat:
    """What is to be answered, and how.

    stop: texts that end the answer and are no part of it. executes_tools: calls are carried out,
    and the model goes on with their results; else they are returned.
    """

    messages: tuple[Message, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()
    executes_tools: bool = False
    timeout_seconds: float = 60.0


@dataclass(frozen=True)
class Reply:
    """What the model said: its text, the calls that were not carried out, and what it took."""

    text: str
    calls: tuple[str, ...]
    finish: Finish
    prompt_tokens: int
    new_tokens: int


@dataclass
class Ticket:
    """A chat on its way. `cancel` ends it with the next token; `result` waits for the reply."""

    chat: Chat
    prompt: list[int]
    on_text: Callable[[str], None]
    on_end: Callable[[Reply | Exception], None]
    deadline_seconds: float
    cancelled: bool = False
    _ended: threading.Event = field(default_factory=threading.Event)
    _outcome: Reply | Exception | None = None

    def cancel(self) -> None:
        """Have the chat give up its lane."""
        self.cancelled = True

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more, or it has waited too long."""
        return self.cancelled or time.monotonic() > self.deadline_seconds

    def reply_unanswered(self) -> Reply:
        """Return the reply to a chat that was given up before it had a lane."""
        finish = Finish.CANCELLED if self.cancelled else Finish.TIMEOUT
        return Reply("", (), finish, len(self.prompt), 0)

    def end(self, outcome: Reply | Exception) -> None:
        """Hand the outcome to whoever waits."""
        self._outcome = outcome
        self._ended.set()
        self.on_end(outcome)

    def result(self) -> Reply:
        """Wait for the reply. Raises what ended the chat, if that was an error."""
        self._ended.wait()
        if isinstance(self._outcome, Reply):
            return self._outcome
        assert self._outcome is not None  # it has ended
        raise self._outcome


class ChatTurn:
    """The model's turn in one chat, a `Turn` of the decoder: its text is told as it comes."""

    def __init__(
        self, ticket: Ticket, tokenizer: DocumentTokenizer, carry_out: Callable[[str], str] | None
    ) -> None:
        chat = ticket.chat
        self._ticket = ticket
        self._dialogue = Dialogue(chat.messages, tokenizer, chat.max_new_tokens, carry_out)
        self._executes = carry_out is not None
        self._stream = TextStream(tokenizer)
        self._held = ""  # what may be the beginning of a stop text
        self._text = ""
        self._tokens = 0
        self._finish: Finish | None = None

    def take(self, token: int) -> Sequence[int] | None:
        self._tokens += 1
        spoke = self._dialogue.speaks
        inserted = self._dialogue.take(token)
        if spoke and self._dialogue.speaks:
            self._say(self._stream.add(token))
        elif spoke:
            self._say(self._stream.end())
        elif self._dialogue.speaks and self._text + self._held:
            self._say("\n")  # another answer after the first
        if self._finish is None and self._ticket.cancelled:
            self._finish = Finish.CANCELLED
        if self._finish is None and time.monotonic() > self._ticket.deadline_seconds:
            self._finish = Finish.TIMEOUT
        return None if self._finish is not None else inserted

    def reply(self) -> Reply:
        """Return the whole turn, once it has ended."""
        if self._finish is not Finish.STOP:
            if self._dialogue.speaks:
                self._say(self._stream.end())
            self._tell(self._held)
        answer = self._dialogue.answer()
        calls = () if self._executes else tuple(answer.calls)
        finish = self._finish or (
            Finish.LENGTH if not answer.complete
            else Finish.TOOL_CALLS if calls else Finish.STOP
        )
        return Reply(self._text, calls, finish, len(self._ticket.prompt), self._tokens)

    def _say(self, text: str) -> None:
        """Tell a piece of text, but for what may become a stop text."""
        held = self._held + text
        stops = self._ticket.chat.stop
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            self._finish = Finish.STOP
            self._held = ""
            self._tell(held[: min(found)])
            return
        kept = max((length for stop in stops for length in range(1, len(stop))
                    if held.endswith(stop[:length])), default=0)
        self._held = held[len(held) - kept :] if kept else ""
        self._tell(held[: len(held) - kept])

    def _tell(self, text: str) -> None:
        if text:
            self._text += text
            self._ticket.on_text(text)


class TextStream:
    """Token ids to text, piece by piece; the pieces joined are the text of all ids.

    A piece is decoded with the tokens before it, for some tokenizers write a token at the beginning
    otherwise than within a text; bytes that are no character yet wait for the next.
    """

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._told = 0

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._context : self._told])
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(INCOMPLETE):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """Return what has not been told, and begin anew."""
        before = self._tokenizer.decode(self._ids[self._context : self._told])
        rest = self._tokenizer.decode(self._ids[self._context :])[len(before) :]
        self._ids, self._context, self._told = [], 0, 0
        return rest


class Engine:
    """A model that answers chats, `lanes` at a time. Use it as a context.

    max_waiting: chats that are kept while all lanes are in use; one more is refused.
    """

    def __init__(
        self,
        model: ReasoningTransformer,
        tokenizer: DocumentTokenizer,
        precision: Precision,
        *,
        lanes: int = 8,
        max_waiting: int = 64,
        int8: bool = False,
    ) -> None:
        self.context = model.config.max_position_embeddings
        self.answered = self.new_tokens = 0
        self._tokenizer = tokenizer
        self._tools = IsolatedToolbox()
        self.tool_declarations = Message(Role.TOOLS, dump_json(self._tools.declarations()))
        self._decoder = Decoder(
            model, lanes=lanes, max_length=self.context, precision=precision, int8=int8,
            invariant=True,
        )
        self._max_waiting = max_waiting
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()  # guards `_waiting` and the engine's end
        self._answering: dict[int, tuple[Ticket, ChatTurn]] = {}
        self._stopped = threading.Event()
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="svend-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """How many chats wait for a lane."""
        return len(self._waiting)

    @property
    def answering(self) -> int:
        """How many chats are in the lanes."""
        return len(self._answering)

    @property
    def is_alive(self) -> bool:
        """Whether chats are being answered."""
        return self._thread.is_alive() and not self._stopped.is_set()

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of messages, by the template that the model was trained with."""
        return self._tokenizer.encode_prompt(messages)

    def submit(
        self,
        chat: Chat,
        on_text: Callable[[str], None] = lambda _: None,
        on_end: Callable[[Reply | Exception], None] = lambda _: None,
    ) -> Ticket:
        """Have a chat answered.

        on_text, on_end: called by the engine's thread, with each piece of text and with the reply.
        Raises QueueFull where too many wait, UserError where the prompt leaves no room, and
        EngineStopped where nothing is answered any more.
        """
        prompt = self.prompt_tokens(chat.messages)
        if len(prompt) >= self.context:
            raise UserError(
                f"messages: {len(prompt)} tokens leave no room for an answer within the model's "
                f"context of {self.context}; shorten them"
            )
        deadline_seconds = time.monotonic() + chat.timeout_seconds
        ticket = Ticket(chat, prompt, on_text, on_end, deadline_seconds)
        with self._changed:
            if not self.is_alive:
                raise self._refusal()
            given_up = [other for other in self._waiting if other.given_up]
            self._waiting = deque(other for other in self._waiting if not other.given_up)
            is_full = len(self._waiting) >= self._max_waiting
            if not is_full:
                self._waiting.append(ticket)
                self._changed.notify()
        for other in given_up:
            other.end(other.reply_unanswered())
        if is_full:
            raise QueueFull(f"{self._max_waiting} requests wait already; try again in a moment")
        return ticket

    def close(self) -> None:
        """End the thread; what is being answered is cut short, what waits is refused."""
        with self._changed:
            self._stopped.set()
            self._changed.notify()
        self._thread.join()
        self._tools.close()

    def _run(self) -> None:
        try:
            for completion in self._decoder.generate(self._arrivals()):
                ticket, turn = self._answering.pop(completion.index)
                reply = turn.reply()
                self.answered += 1
                self.new_tokens += reply.new_tokens
                ticket.end(reply)
        except Exception as error:  # noqa: BLE001 - whatever broke, nobody may wait for ever
            self._broken = error
        with self._changed:  # nobody joins those who wait from here on
            self._stopped.set()
            left = [*(ticket for ticket, _ in self._answering.values()), *self._waiting]
            self._answering.clear()
            self._waiting.clear()
        for ticket in left:
            ticket.end(self._refusal())

    def _refusal(self) -> EngineStopped:
        return EngineStopped(f"the engine has ended ({self._broken or 'it was closed'})")

    def _arrivals(self) -> Iterator[Request | None]:
        """Yield what waits; None where nothing does and lanes are in use."""
        place = 0
        while not self._stopped.is_set():
            with self._changed:
                if not self._waiting and not self._answering:
                    self._changed.wait_for(lambda: self._waiting or self._stopped.is_set())
                ticket = self._waiting.popleft() if self._waiting else None
            if ticket is None:
                yield None
            elif ticket.given_up:
                ticket.end(ticket.reply_unanswered())
                continue
            else:
                carry_out = self._tools.call if ticket.chat.executes_tools else None
                turn = ChatTurn(ticket, self._tokenizer, carry_out)
                self._answering[place] = ticket, turn
                yield Request(ticket.prompt, turn, ticket.chat.seed, ticket.chat.sampling)
            place += 1
        for ticket, _ in self._answering.values():
            ticket.cancel()
