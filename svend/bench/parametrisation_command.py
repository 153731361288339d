"""`svend coordcheck` and `svend bench transfer`: their options, and what they print and write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from svend.errors import UserError
from svend.pipeline.config import Optimizer, Parametrisation

OPTIMIZERS = tuple(optimizer.value for optimizer in Optimizer)
PARAMETRISATIONS = tuple(parametrisation.value for parametrisation in Parametrisation)
COORDCHECK_EXAMPLES = """\
the first width and the first depth are CompleteP's base. Slopes from -0.5 to +0.25 are flat; the
exit code is 1 where one is not. --without names a rule of CompleteP to leave out, which the check
should notice; attention-scale, hidden-decay and epsilon are invisible to it: tests hold them.

examples:
  python -m svend coordcheck --plot coordinates.png
  python -m svend coordcheck --optimizer muon --widths 32 64 256 --depths 2 8
  python -m svend coordcheck --without residual-multiplier
  python -m svend coordcheck --parametrisation standard
"""
TRANSFER_EXAMPLES = """\
widths vary at the first depth, depths at the first width; both firsts are CompleteP's base.

examples:
  python -m svend bench transfer --data ../gsm8k/train.jsonl --json transfer.json
  python -m svend bench transfer --data book.txt --optimizer muon --widths 64 256 --seeds 1
"""


def add_coordcheck_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `coordcheck`."""
    parser.add_argument("--parametrisation", default=Parametrisation.COMPLETEP.value,
                        metavar="NAME",
                        help=f"of {' '.join(PARAMETRISATIONS)} (default: completep)")
    parser.add_argument("--optimizer", default=Optimizer.ADAMW.value, metavar="NAME",
                        help=f"of {' '.join(OPTIMIZERS)} (default: adamw)")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512], metavar="N",
                        help="multiples of 16 (default: 64 128 256 512)")
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 4, 8, 16, 32], metavar="N",
                        help="layers (default: 2 4 8 16 32)")
    parser.add_argument("--steps", type=int, default=10, help="of training (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="of each model (default: 3)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="(default: 1e-2)")
    parser.add_argument("--without", metavar="RULE", help="leave a rule of CompleteP out")
    parser.add_argument("--json", metavar="PATH", help="write all figures there")
    parser.add_argument("--plot", metavar="PATH", help="draw them there, as .png or .svg")


def run_coordcheck(options: argparse.Namespace) -> int:
    """Train small models for a few steps; print the sizes of their activations; 1 if not flat."""
    _check_names("optimizer", [options.optimizer], OPTIMIZERS)
    _check_names("parametrisation", [options.parametrisation], PARAMETRISATIONS)
    for name in ("depths", "steps", "seeds"):
        _check_least(name, getattr(options, name), 1)
    _check_widths(options.widths, 16)
    if not options.learning_rate > 0:
        raise UserError("--learning-rate must be above 0")
    if len({*options.widths}) < 2 and len({*options.depths}) < 2:
        raise UserError("coordcheck: give at least two --widths or two --depths")
    from rich.console import Console

    from svend.bench.coordinates import (
        Check,
        coordinate_table,
        measure_coordinates,
        plot_coordinates,
        slopes_of,
        to_json,
    )
    from svend.models.parametrisation import Rule

    if options.without:
        _check_names("without", [options.without], [rule.value for rule in Rule])
    check = Check(
        optimizer=Optimizer(options.optimizer),
        parametrisation=Parametrisation(options.parametrisation),
        widths=tuple(options.widths), depths=tuple(options.depths), steps=options.steps,
        seeds=options.seeds, learning_rate=options.learning_rate,
        removed=Rule(options.without) if options.without else None,
    )
    points = measure_coordinates(check, lambda text: print(text, file=sys.stderr, flush=True))
    slopes = slopes_of(points)
    Console().print(coordinate_table(points, slopes))
    steep = [f"{slope.activation} by {slope.varied}" for slope in slopes if not slope.flat]
    print(f"not flat: {', '.join(steep)}" if steep else "flat: every slope is from -0.5 to +0.25")
    if options.json:
        Path(options.json).write_text(to_json(check, points, slopes) + "\n", encoding="utf-8")
    if options.plot:
        plot_coordinates(points, Path(options.plot))
    return 1 if steep else 0


def add_transfer_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench transfer`."""
    parser.add_argument("--data", required=True, metavar="PATH",
                        help="text or JSON Lines of any schema, on which a tokenizer is trained")
    parser.add_argument("--parametrisations", nargs="+", default=list(PARAMETRISATIONS),
                        metavar="NAME", help=f"of {' '.join(PARAMETRISATIONS)} (default: both)")
    parser.add_argument("--optimizer", default=Optimizer.ADAMW.value, metavar="NAME",
                        help=f"of {' '.join(OPTIMIZERS)} (default: adamw)")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256], metavar="N",
                        help="multiples of 32 (default: 64 128 256)")
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 8], metavar="N",
                        help="layers (default: 2 8)")
    parser.add_argument("--lowest", type=float, default=5e-4, metavar="RATE",
                        help="the lowest learning rate (default: 5e-4)")
    parser.add_argument("--rates", type=int, default=6, help="how many (default: 6)")
    parser.add_argument("--factor", type=float, default=2.0, help="between them (default: 2)")
    parser.add_argument("--seeds", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--steps", type=int, default=160, help="of each run (default: 160)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step (default: 8)")
    parser.add_argument("--length", type=int, default=64, help="of a sequence (default: 64)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="entries (default: 1024)")
    parser.add_argument("--processes", type=int, default=1,
                        help="runs at once, of one thread each (default: 1)")
    parser.add_argument("--json", metavar="PATH",
                        help="write every result there as it comes; what is there is not run again")
    parser.add_argument("--plot", metavar="PATH", help="draw them there, as .png or .svg")


def run_transfer(options: argparse.Namespace) -> int:
    """Train models of several sizes at several rates; print where each is best."""
    _check_names("optimizer", [options.optimizer], OPTIMIZERS)
    _check_names("parametrisations", options.parametrisations, PARAMETRISATIONS)
    for name in ("depths", "seeds", "steps", "batch", "processes"):
        _check_least(name, getattr(options, name), 1)
    _check_least("rates", options.rates, 3)
    _check_least("length", options.length, 8)
    _check_least("vocabulary", options.vocabulary, 300)
    _check_widths(options.widths, 32)
    if not (options.lowest > 0 and options.factor > 1):
        raise UserError("--lowest must be above 0, and --factor above 1")
    from rich.console import Console

    from svend.bench import transfer
    from svend.bench.transfer_report import (
        curves_of,
        describe_shifts,
        plot_transfer,
        shifts_of,
        transfer_table,
    )
    from svend.data.records import file_digest

    data = Path(options.data).expanduser()
    setting = transfer.Setting(
        options.optimizer, options.widths[0], options.depths[0], options.vocabulary, options.batch,
        options.length, options.steps, file_digest(data),
    )
    cases = transfer.plan_cases(
        options.parametrisations, options.widths, options.depths,
        transfer.learning_rates(options.lowest, options.rates, options.factor), options.seeds,
    )
    results = transfer.run_experiment(
        setting, cases, data, Path(options.json) if options.json else None, options.processes,
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    curves = curves_of(results)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(transfer_table(curves))
    for line in describe_shifts(shifts_of(curves)):
        console.print(line, soft_wrap=True)
    if options.plot:
        plot_transfer(curves, Path(options.plot))
    return 0


def _check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--{option} {unknown[0]}: known: {', '.join(known)}")


def _check_widths(widths: Sequence[int], head_size: int) -> None:
    if any(width < head_size or width % head_size for width in widths):
        raise UserError(f"--widths must be multiples of {head_size}")


def _check_least(option: str, values: int | Sequence[int], least: int) -> None:
    if min([values] if isinstance(values, int) else values) < least:
        raise UserError(f"--{option} must be at least {least}")
