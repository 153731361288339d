"""What the benchmarks' options share, and how each ends."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from svend.command import Call, complete, tell, tell_next
from svend.errors import UserError
from svend.pipeline.config import ModelScale, Optimizer, Parametrisation

SCALES = tuple(scale.value for scale in ModelScale)
OPTIMIZERS = tuple(optimizer.value for optimizer in Optimizer)
PARAMETRISATIONS = tuple(parametrisation.value for parametrisation in Parametrisation)
RESULTS_HELP = "write every result there as it comes; what is there is not run again"


def add_json(parser: argparse.ArgumentParser, text: str = "write all figures there") -> None:
    """Add the option that names a file for the figures."""
    parser.add_argument("--json", metavar="PATH", help=text)


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a file for a plot."""
    parser.add_argument("--plot", metavar="PATH", help="draw them there, as .png or .svg")


def add_scale(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the option that names one scale."""
    complete(parser.add_argument("--scale", default="tiny", metavar="NAME",
                                 help=f"{text} (default: tiny)"), SCALES)


def add_number(parser: argparse.ArgumentParser, name: str, default: float, text: str) -> None:
    """Add an option of a number, whole where its default is."""
    parser.add_argument(name, type=type(default), default=default, metavar="N",
                        help=f"{text} (default: {default:g})")


def add_optimizer(parser: argparse.ArgumentParser) -> None:
    """Add the option that names an optimizer."""
    complete(parser.add_argument(
        "--optimizer", default=Optimizer.ADAMW.value, metavar="NAME",
        help=f"of {' '.join(OPTIMIZERS)} (default: adamw)",
    ), OPTIMIZERS)


def scale_named(name: str) -> ModelScale:
    """Return the scale; raises UserError for none."""
    if name not in SCALES:
        raise UserError(f"bench: unknown scale '{name}'; known: {', '.join(SCALES)}")
    return ModelScale(name)


def check_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """Raise UserError where one of the options, a number or several, is below what it can be."""
    for name in names:
        value = getattr(options, name)
        if min([value] if isinstance(value, int | float) else value) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")


def check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError for a name that is none of those known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--{option} {unknown[0]}: known: {', '.join(known)}")


def check_widths(widths: Sequence[int], head_size: int) -> None:
    """Raise UserError for a width that no number of heads makes up."""
    if any(width < head_size or width % head_size for width in widths):
        raise UserError(f"--widths must be multiples of {head_size}")


def finish(call: Call, name: str) -> None:
    """Say what was written where; if nothing was, how to have it written."""
    options = call.options
    written = [path for path in (options.json, getattr(options, "plot", None)) if path]
    for path in written:
        tell(f"wrote {Path(path).absolute()}")
    if not written:
        tell_next(f"bench {name}" if name != "coordcheck" else name, call.words(),
                  f"--json {name}.json", f"--plot {name}.png" if hasattr(options, "plot") else "")
