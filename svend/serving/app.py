"""The server: `/v1/chat/completions`, `/v1/models` and `/health`, on FastAPI."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from svend.errors import UserError
from svend.serving import openai_chat
from svend.serving.engine import Engine, EngineStopped, Finish, QueueFull, Reply, Ticket
from svend.serving.openai_chat import Limits, RequestError

MAX_BODY_BYTES = 2 * 2**20
RETRY_AFTER_SECONDS = "1"
GRACE_SECONDS = 0.5  # for the engine to say so first


def make_app(
    engine: Engine, model: str, *, limits: Limits, token: str | None, tools: bool
) -> FastAPI:
    """Return the application that answers by an engine.

    token: what a client must show; None for none. tools: whether calls are carried out here.
    """
    app = FastAPI(title=f"Svend: {model}", docs_url=None, redoc_url=None, openapi_url=None)
    own_tools = engine.tool_declarations if tools else None

    @app.get("/health")
    async def health() -> JSONResponse:
        told = {"status": "ok" if engine.is_alive else "ended", "waiting": engine.waiting,
                "answering": engine.answering, "answered": engine.answered,
                "new_tokens": engine.new_tokens}
        return JSONResponse(told, 200 if engine.is_alive else 503)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return _refuse_stranger(request, token) or JSONResponse(
            {"object": "list", "data": [{"id": model, "object": "model", "created": 0,
                                         "owned_by": "svend"}]}
        )

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        refusal = _refuse_stranger(request, token)
        if refusal is not None:
            return refusal
        try:
            body = await _read_body(request)
            asked = openai_chat.read_request(body, limits, engine.context, own_tools)
            events = Events(asyncio.get_running_loop())
            ticket = engine.submit(asked.chat, events.text, events.end)
        except UserError as error:
            return _refusal(error)
        if asked.stream:
            return StreamingResponse(
                _stream(events, ticket, model, asked.include_usage),
                media_type="text/event-stream", headers={"Cache-Control": "no-cache"},
            )
        return await _whole(request, events, ticket, model)

    return app


class Events:
    """What the engine's thread tells about one chat, handed to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[str | Reply | Exception] = asyncio.Queue()
        self.text: Callable[[str], None] = self._put
        self.end: Callable[[Reply | Exception], None] = self._put

    async def next(self, ticket: Ticket) -> str | Reply | Exception:
        """Return the next piece of text, or how the chat ended.

        The engine looks at the time with each token of a chat. For one that still waits nobody
        does but here.
        """
        left_seconds = ticket.deadline_seconds - time.monotonic() + GRACE_SECONDS
        try:
            return await asyncio.wait_for(self._queue.get(), max(0.0, left_seconds))
        except TimeoutError:
            return ticket.reply_unanswered()

    def _put(self, event: str | Reply | Exception) -> None:
        # At the end of the server the loop may be gone before the engine.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)


async def _whole(request: Request, events: Events, ticket: Ticket, model: str) -> Response:
    """Wait for the reply, or until the client has gone, which frees the lane."""
    gone = asyncio.create_task(_until_gone(request))
    try:
        while True:
            waiting = asyncio.create_task(events.next(ticket))
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                ticket.cancel()
                return Response(status_code=499)
            event = waiting.result()
            if isinstance(event, Reply):
                if event.finish is Finish.TIMEOUT:
                    ticket.cancel()
                    return _error(
                        504, f"timeout: {ticket.chat.timeout_seconds:g} s have passed after "
                        f"{event.new_tokens} tokens", "timeout_error",
                    )
                return JSONResponse(openai_chat.completion(event, model))
            if isinstance(event, Exception):
                return _error(503, str(event), "server_error")
    finally:
        gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    events: Events, ticket: Ticket, model: str, include_usage: bool
) -> AsyncIterator[str]:
    """Yield the reply as server-sent events; where the client goes, so does the chat."""
    name = openai_chat.new_name()

    def line(told: dict[str, Any]) -> str:
        return f"data: {json.dumps(told)}\n\n"

    try:
        yield line(openai_chat.chunk(model, name, {"role": "assistant", "content": ""}))
        while True:
            event = await events.next(ticket)
            if isinstance(event, str):
                yield line(openai_chat.chunk(model, name, {"content": event}))
                continue
            if isinstance(event, Exception):
                yield line(openai_chat.error_body(str(event), "server_error"))
                return
            if event.finish is Finish.TIMEOUT:
                yield line(openai_chat.error_body("timeout: the answer took too long",
                                                  "timeout_error"))
                return
            calls = openai_chat.tool_calls(event.calls)
            if calls:
                numbered = [{"index": place, **call} for place, call in enumerate(calls)]
                yield line(openai_chat.chunk(model, name, {"tool_calls": numbered}))
            yield line(openai_chat.chunk(model, name, {}, openai_chat.finish_reason(event)))
            if include_usage:
                yield line(openai_chat.chunk(model, name, None, used=openai_chat.usage(event)))
            yield "data: [DONE]\n\n"
            return
    finally:
        ticket.cancel()


async def _read_body(request: Request) -> Any:
    """Return the JSON of a body. Raises RequestError where it is too long, or none."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError("body", f"more than {MAX_BODY_BYTES} bytes")
    try:
        told = json.loads(body)
        json.dumps(told, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise RequestError("body", f"is no JSON ({str(error)[:100]})") from None
    return told


def _refuse_stranger(request: Request, token: str | None) -> JSONResponse | None:
    if token is None:
        return None
    shown = request.headers.get("authorization", "")
    if hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
        return None
    return _error(401, "the bearer token is missing or wrong", "authentication_error")


def _refusal(error: UserError) -> JSONResponse:
    """Return what a client is told of a request that is not taken."""
    if isinstance(error, QueueFull):
        return _error(429, str(error), "rate_limit_error", retry=True)
    if isinstance(error, EngineStopped):
        return _error(503, str(error), "server_error")
    parameter = error.parameter if isinstance(error, RequestError) else "messages"
    return _error(400, str(error), "invalid_request_error", parameter)


def _error(
    status: int, message: str, kind: str, parameter: str | None = None, *, retry: bool = False
) -> JSONResponse:
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if retry else None
    return JSONResponse(openai_chat.error_body(message, kind, parameter), status, headers)
