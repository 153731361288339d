"""`svend serve`: its options, and the server's life."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Sequence

from svend.command import Call, Command, Takes, tell_loading
from svend.errors import ConfigError, UserError

# Where a version was trained, and in what precision, says nothing of where it is served.
HERE = (("training.device", "auto"), ("training.precision", "auto"))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                        help="another than a loopback needs a token (default: 127.0.0.1)")
    parser.add_argument("--port", default=8000, type=int, metavar="N",
                        help="to listen on (default: 8000)")
    parser.add_argument("--token-env", default="SVEND_TOKEN", metavar="NAME",
                        help="environment variable with the bearer token (default: SVEND_TOKEN)")
    parser.add_argument("--tools", choices=("on", "off"), default="off", metavar="on|off",
                        help="carry out calls of Svend's own tools (default: off)")
    parser.add_argument("--lanes", default=8, type=int, metavar="N",
                        help="requests that are answered at once (default: 8)")
    parser.add_argument("--max-waiting", default=64, type=int, metavar="N",
                        help="requests that wait for a lane; more are refused with 429 (default: "
                             "64)")
    parser.add_argument("--max-tokens", default=1024, type=int, metavar="N",
                        help="of one answer, at most (default: 1024)")
    parser.add_argument("--timeout-seconds", default=120.0, type=float, metavar="S",
                        help="of one request, waiting included (default: 120)")
    parser.add_argument("--int8", action="store_true", help="weights in int8")


def _run(call: Call) -> int:
    """Serve a version until the process is told to end."""
    known = call.options
    token = os.environ.get(known.token_env) or None
    for name in ("lanes", "max_waiting", "max_tokens"):
        if getattr(known, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')} = {getattr(known, name)}: must be 1 or "
                              "more")
    if not known.timeout_seconds > 0:
        raise ConfigError(f"timeout-seconds = {known.timeout_seconds}: must be above 0")
    if not 0 < known.port < 2**16:
        raise ConfigError(f"port = {known.port}: must be 1 to 65535")
    if token is None and not _is_loopback(known.host):
        raise ConfigError(
            f"host = {known.host}: is not this machine alone, and ${known.token_env} is not set; "
            "set it to a token that clients must show, or serve on 127.0.0.1"
        )
    with _listen(known.host, known.port) as listener:
        _answer(listener, known, call.overrides, token)
    return 0


def _answer(
    listener: socket.socket, known: argparse.Namespace, overrides: Sequence[tuple[str, str]],
    token: str | None,
) -> None:
    tell_loading("torch and mlflow")
    import uvicorn

    from svend.pipeline.version_evaluation import load_version
    from svend.pipeline.version_files import answering_model
    from svend.serving.app import make_app
    from svend.serving.engine import Engine
    from svend.serving.openai_chat import Limits

    loaded = load_version(known.uri, [*HERE, *overrides])
    name = loaded.version.name
    with Engine(
        answering_model(loaded.model, "serve"), loaded.tokenizer,
        loaded.config.training.precision, lanes=known.lanes,
        max_waiting=known.max_waiting, int8=known.int8,
    ) as engine:
        limits = Limits(known.max_tokens, timeout_seconds=known.timeout_seconds)
        app = make_app(engine, name, limits=limits, token=token, tools=known.tools == "on")
        address = f"http://{known.host}:{known.port}"
        shown = ' -H "Authorization: Bearer $' + known.token_env + '"' if token else ""
        print(
            f"serving {name} version {loaded.version.version} on {address}/v1 "
            f"({loaded.config.training.precision.value}, {known.lanes} lanes, tools {known.tools}, "
            f"{'with' if token else 'without'} a token); Ctrl-C ends it\n"
            f"curl {address}/v1/chat/completions{shown} -H 'Content-Type: application/json' -d "
            f"'{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": "
            "\"What is 3 * 4?\"}]}'",
            flush=True,
        )
        server = uvicorn.Server(uvicorn.Config(
            app, host=known.host, port=known.port, log_level="warning",
            timeout_graceful_shutdown=10,
        ))
        # uvicorn ends in peace at either signal, and then raises it once more.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    print(f"served {engine.answered} answers, {engine.new_tokens} tokens")


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UserError where the port cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host
                                    else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"port = {port}: cannot be listened on at {host} ({reason}); choose another"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


SERVE = Command(
    name="serve",
    summary="answer chats by a registered version",
    description="Serve a version by OpenAI's chat completions: streaming, a bearer token, limits, "
    "a bounded queue. Ctrl-C ends it.",
    makes="a server; nothing on disk",
    notes="""\
settings of the version's config can be overridden, such as
  --training.precision bf16   --training.device cpu
""",
    examples=(
        "svend serve models:/svend-tiny-50m@standard",
        "svend serve models:/svend-tiny-50m@standard --port 8001 --tools on --int8",
        "SVEND_TOKEN=... svend serve models:/svend-tiny-50m@production --host 0.0.0.0",
    ),
    takes=Takes.KEYS,
    add_options=_add_options,
    run=_run,
)
