"""`svend bench data`: tokenising, beside datasets.map."""

from __future__ import annotations

import argparse
from pathlib import Path

from svend.bench.options import add_json, add_number, check_least, finish
from svend.command import Call, Command, tell


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--megabytes", 200, "of input")
    add_number(parser, "--processes", 2, "that tokenise")
    add_number(parser, "--rounds", 3, "turns of each")
    parser.add_argument("--alone", action="store_true", help="without datasets.map")
    add_json(parser)


def _run(call: Call) -> int:
    options = call.options
    check_least(options, 1, "megabytes", "processes", "rounds")
    from svend.bench.data import CONTESTANTS, measure_tokenising, to_json, tokenising_table
    from svend.pipeline.console import make_console

    size, turns = measure_tokenising(
        options.megabytes, options.processes, options.rounds,
        ["svend"] if options.alone else list(CONTESTANTS),
        tell,
    )
    make_console().print(tokenising_table(size, options.processes, turns))
    if options.json:
        figures = to_json(size, options.processes, turns)
        Path(options.json).write_text(figures + "\n", encoding="utf-8")
    finish(call, "data")
    return 0


DATA = Command(
    name="data",
    summary="tokenising, beside datasets.map",
    description="Time tokenising a file made on the spot, beside datasets.map.",
    makes="a table, and what --json names",
    examples=(
        "svend bench data --megabytes 20 --rounds 1", "svend bench data --json data.json",
    ),
    add_options=_add_options,
    run=_run,
)
