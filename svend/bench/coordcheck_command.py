"""`svend coordcheck`: whether activations keep their size as models grow."""

from __future__ import annotations

import argparse
from pathlib import Path

from svend.bench.options import (
    OPTIMIZERS,
    PARAMETRISATIONS,
    add_json,
    add_number,
    add_optimizer,
    add_plot,
    check_least,
    check_names,
    check_widths,
    finish,
)
from svend.command import Call, Command, complete, tell, tell_loading
from svend.errors import UserError
from svend.pipeline.config import Optimizer, Parametrisation


def _add_options(parser: argparse.ArgumentParser) -> None:
    complete(parser.add_argument(
        "--parametrisation", default=Parametrisation.COMPLETEP.value, metavar="NAME",
        help=f"of {' '.join(PARAMETRISATIONS)} (default: completep)",
    ), PARAMETRISATIONS)
    add_optimizer(parser)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512], metavar="N",
                        help="multiples of 16 (default: 64 128 256 512)")
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 4, 8, 16, 32], metavar="N",
                        help="layers (default: 2 4 8 16 32)")
    add_number(parser, "--steps", 10, "of training")
    add_number(parser, "--seeds", 3, "of each model")
    add_number(parser, "--learning-rate", 1e-2, "of every model")
    parser.add_argument("--without", metavar="RULE", help="leave a rule of CompleteP out")
    add_json(parser)
    add_plot(parser)


def _run(call: Call) -> int:
    """Train small models for a few steps; print the sizes of their activations; 1 if not flat."""
    options = call.options
    check_names("optimizer", [options.optimizer], OPTIMIZERS)
    check_names("parametrisation", [options.parametrisation], PARAMETRISATIONS)
    check_least(options, 1, "depths", "steps", "seeds")
    check_widths(options.widths, 16)
    if not options.learning_rate > 0:
        raise UserError("--learning-rate must be above 0")
    if len({*options.widths}) < 2 and len({*options.depths}) < 2:
        raise UserError("coordcheck: give at least two --widths or two --depths")
    if options.without:
        from svend.models.parametrisation import Rule

        check_names("without", [options.without], [rule.value for rule in Rule])
    tell_loading("torch")
    from svend.bench.coordinates import (
        Check,
        coordinate_table,
        measure_coordinates,
        plot_coordinates,
        slopes_of,
        to_json,
    )
    from svend.models.parametrisation import Rule
    from svend.pipeline.console import make_console

    check = Check(
        optimizer=Optimizer(options.optimizer),
        parametrisation=Parametrisation(options.parametrisation),
        widths=tuple(options.widths), depths=tuple(options.depths), steps=options.steps,
        seeds=options.seeds, learning_rate=options.learning_rate,
        removed=Rule(options.without) if options.without else None,
    )
    tell(f"training {len({*options.widths}) + len({*options.depths})} sizes, {options.seeds} seeds "
         f"each, {options.steps} steps each")
    points = measure_coordinates(check, tell)
    slopes = slopes_of(points)
    make_console().print(coordinate_table(points, slopes))
    steep = [f"{slope.activation} by {slope.varied}" for slope in slopes if not slope.flat]
    tell(f"not flat: {', '.join(steep)}" if steep else "flat: every slope is from -0.5 to +0.25")
    if options.json:
        Path(options.json).write_text(to_json(check, points, slopes) + "\n", encoding="utf-8")
    if options.plot:
        plot_coordinates(points, Path(options.plot))
    finish(call, "coordcheck")
    return 1 if steep else 0


COORDCHECK = Command(
    name="coordcheck",
    summary="whether activations keep their size as models grow",
    description="Train small models of growing width and depth for a few steps, and show the sizes "
    "of their activations. The first width and the first depth are CompleteP's base. Slopes from "
    "-0.5 to +0.25 are flat; the exit code is 1 where one is not.",
    makes="a table, and what --json and --plot name",
    notes="""\
--without names a rule of CompleteP to leave out, which the check should notice; attention-scale,
hidden-decay and epsilon are invisible to it: tests hold them.
""",
    examples=(
        "svend coordcheck --widths 32 64 --depths 2 4 --seeds 1",
        "svend coordcheck --plot coordinates.png",
        "svend coordcheck --without residual-multiplier",
        "svend coordcheck --parametrisation standard",
    ),
    add_options=_add_options,
    run=_run,
)
