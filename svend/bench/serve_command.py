"""`svend bench serve`: the server with many clients at once."""

from __future__ import annotations

import argparse

from svend.bench.options import SCALES, add_number, add_scale
from svend.command import Call, Command, tell, tell_loading
from svend.errors import ConfigError
from svend.pipeline.config import ModelScale


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="URI", help="left out: random weights at the scale")
    add_scale(parser, "of the random weights")
    add_number(parser, "--clients", 32, "at once")
    add_number(parser, "--requests", 4, "of each")
    add_number(parser, "--max-tokens", 64, "an answer")
    add_number(parser, "--lanes", 16, "of the server")


def _run(call: Call) -> int:
    options = call.options
    for name in ("clients", "requests", "max_tokens", "lanes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')} = {getattr(options, name)}: must be 1 or "
                              "more")
    if options.scale not in SCALES:
        raise ConfigError(f"scale = {options.scale}: must be one of {', '.join(SCALES)}")
    tell_loading("torch and mlflow")
    from svend.bench.serve import drive, load_served, result_table
    from svend.pipeline.console import make_console

    served = load_served(options.model, ModelScale(options.scale))
    tell(f"{options.clients} clients ask {options.requests} times each, of {served.name}")
    answers, seconds = drive(
        served, clients=options.clients, requests=options.requests,
        max_tokens=options.max_tokens, lanes=options.lanes,
    )
    make_console().print(result_table(
        served, answers, seconds, clients=options.clients, lanes=options.lanes
    ))
    return 0 if all(answer.status == "200" for answer in answers) else 1


SERVE = Command(
    name="serve",
    summary="the server, with many clients at once",
    description="Drive a server with many clients at once; say what they waited for. The exit code "
    "is 1 where an answer was dropped or refused.",
    makes="a table",
    examples=(
        "svend bench serve --clients 4 --requests 1 --max-tokens 8",
        "svend bench serve --model models:/svend-tiny-50m@standard",
    ),
    add_options=_add_options,
    run=_run,
)
