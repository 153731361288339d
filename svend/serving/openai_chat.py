"""OpenAI's chat completions: requests read strictly, replies written in the same form.

https://platform.openai.com/docs/api-reference/chat. What would change the answer and is not
supported is refused by name, never ignored.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svend.data.documents import Message, Role, dump_json
from svend.errors import ConfigError, UserError
from svend.models.sampling import Sampling
from svend.serving.engine import Chat, Reply
from svend.tools.toolbox import InvalidCall, read_call

DEFAULT_MAX_TOKENS = 512
# What changes no answer of this model.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier",
                  "prompt_cache_key", "parallel_tool_calls", "custom_inputs"}
# What changes nothing at these values, and is not supported at others.
ONLY = {"n": (None, 1), "logprobs": (None, False), "top_logprobs": (None, 0),
        "frequency_penalty": (None, 0, 0.0), "presence_penalty": (None, 0, 0.0),
        "logit_bias": (None, {}), "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]), "tool_choice": (None, "auto", "none")}
READ = {"model", "messages", "temperature", "top_p", "top_k", "max_tokens",
        "max_completion_tokens", "seed", "stop", "stream", "stream_options", "tools"}
ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER,
         "assistant": Role.ASSISTANT, "tool": Role.TOOL}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 1024
    max_messages: int = 256
    timeout_seconds: float = 120.0


@dataclass(frozen=True)
class ChatRequest:
    """A request as it was read."""

    chat: Chat
    stream: bool
    include_usage: bool


class RequestError(UserError):
    """A request that is not what it must be; `parameter` is the name of what is wrong with it."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(f"{parameter}: {message}")
        self.parameter = parameter


def read_request(
    body: Any, limits: Limits, context: int, own_tools: Message | None
) -> ChatRequest:
    """Read a request. Raises RequestError, naming the parameter, for what is not as it must be.

    own_tools: the declaration of the tools that are carried out here; None where none are.
    """
    if not isinstance(body, dict):
        raise RequestError("body", "must be a JSON object")
    for name, value in body.items():
        if name in ONLY:
            if value not in ONLY[name]:
                raise RequestError(name, f"{json.dumps(value)[:100]} is not supported")
        elif name not in READ | WITHOUT_EFFECT:
            raise RequestError(name[:100], "is not supported")
    messages = _read_messages(body.get("messages"), limits)
    tools, executes = _read_tools(body, own_tools)
    limit = body.get("max_completion_tokens")
    limit = body.get("max_tokens") if limit is None else limit
    asked = _number(limit, "max_tokens", int, DEFAULT_MAX_TOKENS)
    if asked < 1:
        raise RequestError("max_tokens", "must be at least 1")
    temperature = _number(body.get("temperature"), "temperature", float, 0.0)
    try:
        sampling = Sampling(
            temperature, _number(body.get("top_k"), "top_k", int, None),
            _number(body.get("top_p"), "top_p", float, 1.0),
        )
    except ConfigError as error:
        raise RequestError("sampling", str(error)) from None
    seed = _number(body.get("seed"), "seed", int, None)
    stream, options = body.get("stream"), body.get("stream_options") or {}
    if stream not in (None, True, False) or not isinstance(options, dict):
        raise RequestError("stream", "must be true or false, stream_options an object")
    chat = Chat(
        messages=(*tools, *messages),
        max_new_tokens=min(asked, limits.max_tokens, context),
        sampling=sampling,
        # Drawn anew where none is given: without one, two answers may differ.
        seed=secrets.randbelow(2**32) if seed is None else seed,
        stop=_read_stop(body.get("stop")),
        executes_tools=executes,
        timeout_seconds=limits.timeout_seconds,
    )
    return ChatRequest(chat, bool(stream), bool(options.get("include_usage")))


def completion(reply: Reply, model: str, name: str | None = None) -> dict[str, Any]:
    """Return a reply as a whole `chat.completion`."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    calls = tool_calls(reply.calls)
    if calls:
        message["tool_calls"] = calls
    return {
        **_head("chat.completion", model, name),
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason(reply)}],
        "usage": usage(reply),
    }


def chunk(
    model: str, name: str, delta: Mapping[str, Any] | None, finish: str | None = None,
    used: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a `chat.completion.chunk`; without a delta it has no choice, only the usage."""
    choices = [] if delta is None else [
        {"index": 0, "delta": dict(delta), "finish_reason": finish}
    ]
    told = {**_head("chat.completion.chunk", model, name), "choices": choices}
    return told if used is None else {**told, "usage": dict(used)}


def tool_calls(calls: Sequence[str]) -> list[dict[str, Any]]:
    """Return calls as OpenAI writes them; what the model wrote that is no call has no name."""
    told = []
    for content in calls:
        call = read_call(content)
        name, arguments = (("", content) if isinstance(call, InvalidCall)
                           else (call.name, dump_json(dict(call.arguments))))
        told.append({"id": f"call_{secrets.token_hex(8)}", "type": "function",
                     "function": {"name": name, "arguments": arguments}})
    return told


def usage(reply: Reply) -> dict[str, int]:
    """Return how many tokens were read and written."""
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens,
            "total_tokens": reply.prompt_tokens + reply.new_tokens}


def finish_reason(reply: Reply) -> str:
    """Return why a reply ended, in OpenAI's words: what was cut short is `length`."""
    return reply.finish.value if reply.finish.value in ("stop", "tool_calls") else "length"


def error_body(message: str, kind: str, parameter: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": None}}


def new_name() -> str:
    """Return a name for a completion."""
    return f"chatcmpl-{secrets.token_hex(12)}"


def _head(kind: str, model: str, name: str | None) -> dict[str, Any]:
    return {"id": name or new_name(), "object": kind, "created": int(time.time()), "model": model}


def _read_messages(told: Any, limits: Limits) -> list[Message]:
    if not isinstance(told, list) or not told:
        raise RequestError("messages", "must be a list of at least one message")
    if len(told) > limits.max_messages:
        raise RequestError("messages", f"{len(told)} are too many; {limits.max_messages} at most")
    messages: list[Message] = []
    for number, message in enumerate(told):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in list(ROLES):
            raise RequestError(where, f"must have a role of {', '.join(ROLES)}")
        role, text = ROLES[message["role"]], _text(message.get("content"), where)
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise RequestError(where, "tool_calls must be a list")
        if calls and role is not Role.ASSISTANT:
            raise RequestError(where, "only an assistant calls tools")
        if text or not calls:
            messages.append(Message(role, text))
        messages += [_read_call(call, where) for call in calls]
    return messages


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RequestError(where, "content must be text, or parts of type text")


def _read_call(call: Any, where: str) -> Message:
    try:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError, RecursionError):
        raise RequestError(
            where, "a tool call must have a function with a name, and arguments in JSON"
        ) from None
    return Message(Role.TOOL_CALL, dump_json({"name": name, "arguments": arguments}))


def _read_tools(
    body: Mapping[str, Any], own_tools: Message | None
) -> tuple[list[Message], bool]:
    """Return the declaration of the tools that are offered, and whether they are carried out."""
    tools = body.get("tools")
    if body.get("tool_choice") == "none" or tools == []:
        return [], False
    if not tools:
        return ([], False) if own_tools is None else ([own_tools], True)
    if own_tools is not None:
        raise RequestError(
            "tools", "this server carries out its own tools and offers no others; leave them out, "
            "or give [] for none"
        )
    try:
        declared = [{"name": tool["function"]["name"],
                     "description": tool["function"].get("description", ""),
                     "parameters": tool["function"].get("parameters", {})} for tool in tools]
        named = all(isinstance(function["name"], str) for function in declared)
    except (TypeError, KeyError, AttributeError):
        named = False
    if not named:
        raise RequestError("tools", "must be a list of functions, each with a name")
    return [Message(Role.TOOLS, dump_json(declared))], False


def _read_stop(told: Any) -> tuple[str, ...]:
    stops = [told] if isinstance(told, str) else told or []
    if not isinstance(stops, list) or len(stops) > 4 or not all(
        isinstance(stop, str) and 0 < len(stop) <= 200 for stop in stops
    ):
        raise RequestError("stop", "must be a text, or up to four, of up to 200 characters")
    return tuple(stops)


def _number(value: Any, name: str, kind: type[int] | type[float], default: Any) -> Any:
    if value is None:
        return default
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise RequestError(name, f"must be {'an integer' if kind is int else 'a number'}")
    try:
        return kind(value)
    except OverflowError:
        raise RequestError(name, "is too large") from None
