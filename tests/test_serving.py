"""Serving: chats are answered as the decoder would, many at once, within limits."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.bench.serve import ask_once
from svend.data.chat import END_OF_MESSAGE, END_OF_TEXT, ROLE_TOKENS
from svend.data.documents import Message, Role, conversation
from svend.data.tokenizer import train_tokenizer
from svend.errors import UserError
from svend.evaluation.dialogue import Dialogue
from svend.models.config import TransformerConfig
from svend.models.decoding import DecodingModel
from svend.models.generation import Decoder, Request
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import Precision
from svend.serving.app import make_app
from svend.serving.engine import (
    Chat,
    ChatTurn,
    Engine,
    EngineStopped,
    Finish,
    QueueFull,
    Reply,
    TextStream,
    Ticket,
)
from svend.serving.openai_chat import Limits, RequestError, read_request
from svend.tools.toolbox import Toolbox
from tests.servers import free_port

SAID = conversation((Role.USER, "What is 3 * 4? é €"), (Role.ASSISTANT, "The answer is #### 12"))
TOKENIZER = train_tokenizer([SAID] * 3, 400)
torch.manual_seed(0)
MODEL = ReasoningTransformer(TransformerConfig(
    name="tiny", vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=64, max_position_embeddings=256,
)).eval()
with torch.no_grad():
    for parameter in MODEL.parameters():
        parameter.mul_(8 if parameter.dim() > 1 else 1)  # so that its answers differ
TOKEN = "secret"
LIMITS = Limits()
QUESTIONS = [f"What is {n} * {n + 1}?" for n in range(32)]


def _messages(text: str) -> tuple[Message, ...]:
    return (Message(Role.USER, text),)


def _directly(text: str, limit: int) -> str:
    """What the decoder, alone, answers greedily."""
    dialogue = Dialogue(_messages(text), TOKENIZER, limit, None)
    decoder = Decoder(MODEL, lanes=1, max_length=256, precision=Precision.FP32, invariant=True)
    list(decoder.generate([Request(TOKENIZER.encode_prompt(_messages(text)), dialogue)]))
    return dialogue.answer().text


@contextmanager
def _serving(
    limits: Limits = LIMITS, *, tools: bool = False, lanes: int = 4, max_waiting: int = 64,
    model: ReasoningTransformer = MODEL,
) -> Iterator[tuple[str, Engine]]:
    with Engine(
        model, TOKENIZER, Precision.FP32, lanes=lanes, max_waiting=max_waiting
    ) as engine:
        port = free_port()
        app = make_app(engine, "svend-test", limits=limits, token=TOKEN, tools=tools)
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}", engine
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Engine]]:
    with _serving() as place:
        yield place


@contextmanager
def _client(address: str, token: str = TOKEN) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=token, max_retries=0) as client:
        yield client


def _ask(client: openai.OpenAI, text: str, **options: Any) -> Any:
    return client.chat.completions.create(
        model="svend-test", messages=[{"role": "user", "content": text}], **options
    )


def test_many_clients_at_once_each_get_their_own_answer_streamed_or_not(
    served: tuple[str, Engine]
) -> None:
    with _client(served[0]) as client:

        def whole(text: str) -> str:
            return str(_ask(client, text, max_tokens=24).choices[0].message.content)

        def streamed(text: str) -> str:
            chunks = _ask(client, text, max_tokens=24, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(whole, QUESTIONS))
            pieces = list(pool.map(streamed, QUESTIONS))
    expected = [_directly(text, 24) for text in QUESTIONS]
    assert len(set(expected)) > 16
    assert answers == expected
    assert pieces == expected


def test_a_reply_says_what_it_took_and_why_it_ended(served: tuple[str, Engine]) -> None:
    with _client(served[0]) as client:
        reply = _ask(client, QUESTIONS[0], max_tokens=5)
        chunks = list(_ask(client, QUESTIONS[0], max_tokens=5, stream=True,
                           stream_options={"include_usage": True}))
        assert [model.id for model in client.models.list()] == ["svend-test"]
    prompt = len(TOKENIZER.encode_prompt(_messages(QUESTIONS[0])))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt, 5)
    assert reply.choices[0].finish_reason == "length"
    assert chunks[-1].usage == reply.usage
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_decides_what_is_drawn(served: tuple[str, Engine]) -> None:
    with _client(served[0]) as client:
        drawn = [_ask(client, QUESTIONS[0], max_tokens=16, temperature=1.5, seed=seed)
                 .choices[0].message.content for seed in (1, 1, 2)]
        unseeded = {_ask(client, QUESTIONS[0], max_tokens=16, temperature=1.5)
                    .choices[0].message.content for _ in range(3)}
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(unseeded) > 1


def test_who_shows_no_token_or_a_wrong_one_is_refused(served: tuple[str, Engine]) -> None:
    for token in ("wrong", "secret2", "s"):
        with _client(served[0], token) as client:
            with pytest.raises(openai.AuthenticationError):
                _ask(client, "Hello")
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
    answer = httpx.post(f"{served[0]}/v1/chat/completions", json={})
    assert answer.status_code == 401
    assert httpx.get(f"{served[0]}/health").json()["status"] == "ok"


@pytest.mark.parametrize(("changes", "parameter"), [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x " * 400}]}, "messages"),
    ({"n": 2}, "n"), ({"logprobs": True}, "logprobs"), ({"frequency_penalty": 0.5},
                                                        "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"temperature": "hot"}, "temperature"), ({"temperature": -1}, "sampling"),
    ({"top_p": 0}, "sampling"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"), ({"seed": 1.5}, "seed"), ({"stop": [1]}, "stop"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"typo": 1}, "typo"),
    ({"stream": "yes"}, "stream"), ({"tool_choice": "required"}, "tool_choice"),
    ({"temperature": 10**400}, "temperature"), ({"tools": [{"function": {"name": 5}}]}, "tools"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[" * 100_000}}]}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "body"), ({"\ud800": 1}, "body"),
])
def test_what_a_request_must_not_ask_is_named(
    served: tuple[str, Engine], changes: dict[str, Any], parameter: str
) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], **changes}
    # Not by httpx, which writes no half of a surrogate pair.
    answer = httpx.post(f"{served[0]}/v1/chat/completions", content=json.dumps(body),
                        headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert (told["type"], told["param"]) == ("invalid_request_error", parameter)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"[" * 100_000, b'"' + b"x" * 3_000_000 + b'"'])
def test_a_body_that_is_no_request_is_refused(served: tuple[str, Engine], content: bytes) -> None:
    answer = httpx.post(f"{served[0]}/v1/chat/completions", content=content,
                        headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "body"


def test_what_waits_is_bounded_and_more_is_refused_for_a_moment() -> None:
    with _serving(lanes=1, max_waiting=2) as (address, engine), _client(address) as client:

        def ask(text: str) -> str:
            try:
                _ask(client, text, max_tokens=120)
            except openai.RateLimitError as error:
                assert error.response.headers["retry-after"] == "1"
                return "refused"
            return "answered"

        with ThreadPoolExecutor(12) as pool:
            outcomes = list(pool.map(ask, QUESTIONS[:12]))
        assert outcomes.count("answered") >= 3
        assert outcomes.count("refused") >= 1
        assert engine.answered == outcomes.count("answered")
        assert ask("Again?") == "answered"


def test_what_takes_too_long_is_ended() -> None:
    with _serving(Limits(timeout_seconds=0.01)) as (address, engine), _client(address) as client:
        with pytest.raises(openai.APIStatusError) as raised:
            _ask(client, "Hello", max_tokens=200)
        assert raised.value.status_code == 504
        with pytest.raises(openai.APIError, match="took too long"):
            list(_ask(client, "Hello", max_tokens=200, stream=True))
        assert engine.answering == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_lane(stream: bool) -> None:
    with _serving(lanes=1) as (address, engine):
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 240,
                "stream": stream}
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(timeout=0.05) as client, pytest.raises(httpx.TimeoutException):
            if stream:
                with client.stream("POST", f"{address}/v1/chat/completions", json=body,
                                   headers=headers) as answer:
                    for number, _ in enumerate(answer.iter_lines()):
                        if number == 2:
                            raise httpx.ReadTimeout("enough")
            else:
                client.post(f"{address}/v1/chat/completions", json=body, headers=headers)
        for _ in range(200):
            if engine.answering == 0 and engine.waiting == 0:
                break
            time.sleep(0.02)
        assert engine.answering == 0
        assert engine.new_tokens < 240


def test_an_engine_that_ends_answers_nobody_and_leaves_nobody_waiting() -> None:
    engine = Engine(MODEL, TOKENIZER, Precision.FP32, lanes=1)
    tickets = [engine.submit(Chat(_messages(text), 200)) for text in QUESTIONS[:4]]
    engine.close()
    outcomes = []
    for ticket in tickets:
        try:
            outcomes.append(ticket.result().finish)
        except EngineStopped:
            outcomes.append(None)
    assert len(outcomes) == 4
    assert None in outcomes
    with pytest.raises(EngineStopped):
        engine.submit(Chat(_messages("Hello"), 8))


def test_an_engine_that_breaks_says_so_to_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(MODEL, TOKENIZER, Precision.FP32, lanes=1, max_waiting=1) as engine:

        def break_down(*_: object) -> None:
            raise RuntimeError("no more")

        monkeypatch.setattr(engine._decoder, "_step", break_down)
        with pytest.raises((EngineStopped, QueueFull), match="no more"):
            engine.submit(Chat(_messages("Hello"), 8)).result()
        assert not engine.is_alive


def _turn(messages: tuple[Message, ...], tools: bool, *parts: str, stop: tuple[str, ...] = (),
          limit: int = 99) -> tuple[list[str], Reply]:
    """Have a turn take control tokens and texts; return what it told, and its reply."""
    told: list[str] = []
    chat = Chat(messages, limit, stop=stop, executes_tools=tools)
    ticket = Ticket(chat, [1], told.append, lambda _: None, time.monotonic() + 60)
    turn = ChatTurn(ticket, TOKENIZER, Toolbox().call if tools else None)
    control = TOKENIZER.control_ids
    for part in parts:
        for token in [control[part]] if part in control else TOKENIZER.encode_text(part):
            if turn.take(token) is None:
                return told, turn.reply()
    return told, turn.reply()


ASSISTANT, CALL = ROLE_TOKENS[Role.ASSISTANT], ROLE_TOKENS[Role.TOOL_CALL]
END, END_TEXT = END_OF_MESSAGE, END_OF_TEXT
DECLARED = (Message(Role.TOOLS, "[]"), *_messages("What is 3 * 4?"))
CALLED = '{"name": "calculate", "arguments": {"expression": "3 * 4"}}'


def test_tools_are_carried_out_where_they_are_and_else_returned() -> None:
    _, carried = _turn(DECLARED, True, CALL, CALLED, END, ASSISTANT, "It is 12", END, END_TEXT)
    assert (carried.text, carried.calls, carried.finish) == ("It is 12", (), Finish.STOP)
    _, returned = _turn(DECLARED, False, CALL, CALLED, END, END_TEXT)
    assert (returned.text, returned.calls, returned.finish) == ("", (CALLED,), Finish.TOOL_CALLS)


def test_a_server_with_tools_carries_calls_out_and_answers_with_what_comes_of_them(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    control = TOKENIZER.control_ids
    # What the model says; the result, between the call and the answer, is the tools' own.
    said = [control[CALL], *TOKENIZER.encode_text(CALLED), control[END], control[ASSISTANT],
            *TOKENIZER.encode_text("It is 12"), control[END], control[END_TEXT]]
    script = iter(said)
    monkeypatch.setattr("svend.models.generation.choose_tokens",
                        lambda logits_RV, *_: [next(script) for _ in range(len(logits_RV))])
    read: list[list[int]] = []
    extend = DecodingModel.extend

    def watched(self: DecodingModel, lane: int, cached: int, tokens: list[int]) -> torch.Tensor:
        read.append(tokens)
        return extend(self, lane, cached, tokens)

    monkeypatch.setattr(DecodingModel, "extend", watched)
    model = ReasoningTransformer(replace(MODEL.config, max_position_embeddings=4096)).eval()
    with _serving(tools=True, model=model) as (address, _), _client(address) as client:
        reply = _ask(client, "What is 3 * 4?", max_tokens=400)
    assert reply.choices[0].message.content == "It is 12"
    assert reply.choices[0].finish_reason == "stop"
    prompt, after_call = (TOKENIZER.decode(tokens) for tokens in read)
    assert prompt.startswith(ROLE_TOKENS[Role.TOOLS])
    assert "calculate" in prompt
    assert f"{ROLE_TOKENS[Role.TOOL]}12{END}" in after_call


def test_the_servers_own_tools_are_offered_and_others_are_not() -> None:
    own = Message(Role.TOOLS, "[1]")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    offered = read_request(body, Limits(), 256, own).chat
    assert (offered.messages[0], offered.executes_tools) == (own, True)
    for without in ({"tools": []}, {"tool_choice": "none"}):
        assert len(read_request({**body, **without}, Limits(), 256, own).chat.messages) == 1
    with pytest.raises(RequestError, match=r"^tools: "):
        read_request({**body, "tools": [tool]}, Limits(), 256, own)
    foreign = read_request({**body, "tools": [tool]}, Limits(), 256, None).chat
    assert json.loads(foreign.messages[0].content)[0]["name"] == "f"
    assert not foreign.executes_tools


def test_earlier_calls_and_their_results_are_read_as_the_model_knows_them() -> None:
    call = {"id": "c", "type": "function",
            "function": {"name": "calculate", "arguments": '{"expression": "3 * 4"}'}}
    read = read_request({"messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "},
                                     {"type": "text", "text": "3 * 4?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "12"},
    ]}, Limits(), 256, None).chat.messages
    assert [(m.role, m.content) for m in read] == [
        (Role.SYSTEM, "Be brief."), (Role.USER, "What is 3 * 4?"), (Role.TOOL_CALL, CALLED),
        (Role.TOOL, "12"),
    ]


@pytest.mark.parametrize(("stop", "text"), [
    (("####",), "The answer is "), (("is #", "zzz"), "The answer "),
    (("12!",), "The answer is #### 12"), (("T",), ""),
])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(
    stop: tuple[str, ...], text: str
) -> None:
    told, reply = _turn(_messages("?"), False, "The answer is #### 12", END, stop=stop)
    assert reply.text == text == "".join(told)
    assert reply.finish is Finish.STOP


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40), st.integers(1, 60))
def test_the_pieces_of_a_stream_are_the_text(text: str, limit: int) -> None:
    ids = TOKENIZER.encode_text(text)[:limit]
    stream = TextStream(TOKENIZER)
    pieces = [stream.add(token) for token in ids]
    assert "".join([*pieces, stream.end()]) == TOKENIZER.decode(ids)


def test_a_prompt_that_leaves_no_room_is_refused_before_it_waits() -> None:
    with (
        Engine(MODEL, TOKENIZER, Precision.FP32, lanes=1) as engine,
        pytest.raises(UserError, match="leave no room for an answer"),
    ):
        engine.submit(Chat(_messages("x " * 400), 8))


def test_what_nobody_waits_for_any_more_keeps_no_place() -> None:
    with Engine(MODEL, TOKENIZER, Precision.FP32, lanes=1, max_waiting=2) as engine:
        running = engine.submit(Chat(_messages(QUESTIONS[0]), 200))
        while not engine.answering:
            time.sleep(0.001)
        left = [engine.submit(Chat(_messages("a"), 4)), engine.submit(Chat(_messages("b"), 4))]
        with pytest.raises(QueueFull):
            engine.submit(Chat(_messages("c"), 4))
        left[0].cancel()
        assert engine.submit(Chat(_messages("c"), 4)).result().finish is not Finish.CANCELLED
        assert left[0].result().finish is Finish.CANCELLED
        assert left[1].result().new_tokens > 0
        assert running.result().new_tokens > 0


def test_what_waits_too_long_is_told_so_while_the_lane_is_in_use(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Decoder._step

    def slow_step(self: Decoder, rows: Any) -> Any:
        time.sleep(0.05)
        return step(self, rows)

    monkeypatch.setattr(Decoder, "_step", slow_step)
    with _serving(Limits(timeout_seconds=1.0), lanes=1) as (address, engine):
        running = engine.submit(Chat(_messages("Hello"), 200, timeout_seconds=60))
        started_seconds = time.monotonic()
        with _client(address) as client, pytest.raises(openai.APIStatusError) as raised:
            _ask(client, "Hello", max_tokens=4)
        assert raised.value.status_code == 504
        assert time.monotonic() - started_seconds < 5
        running.cancel()


def test_the_benchmark_counts_an_answer_that_breaks_off_as_dropped() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, httpx.Client() as client:
        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ndata: {}\n\n")
            connection.close()

        with ThreadPoolExecutor(1) as server:
            server.submit(hang_up)
            port = listener.getsockname()[1]
            answered = ask_once(client, f"http://127.0.0.1:{port}/", {})
    assert answered.status == "RemoteProtocolError"
    assert answered.tokens == 0
