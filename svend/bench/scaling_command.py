"""`svend bench scaling`: our own step at many sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

from svend.bench.options import add_json, add_plot, add_scale, finish, scale_named
from svend.command import Call, Command, tell
from svend.pipeline.config import get_model_config


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_scale(parser, "the model that is varied")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    add_json(parser)
    add_plot(parser)


def _run(call: Call) -> int:
    options = call.options
    model = get_model_config(scale_named(options.scale))
    from svend.bench.scaling import measure_scaling, plot_scaling, scaling_table, to_json
    from svend.pipeline.console import make_console

    tell(f"timing the step of {model.name} at growing batches, lengths and depths")
    points = measure_scaling(
        model, not options.eager, tell
    )
    make_console().print(scaling_table(points))
    if options.json:
        Path(options.json).write_text(to_json(points) + "\n", encoding="utf-8")
    if options.plot:
        plot_scaling(points, Path(options.plot))
    finish(call, "scaling")
    return 0


SCALING = Command(
    name="scaling",
    summary="speed and memory against batch, length and layers",
    description="Time Svend's own training step alone, at many batches, lengths and depths.",
    makes="a table, and what --json and --plot name",
    examples=("svend bench scaling --eager", "svend bench scaling --json scaling.json"),
    add_options=_add_options,
    run=_run,
)
