"""`svend bench --gpu-report`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from svend.command import Call, tell, tell_loading
from svend.errors import ConfigError, ResourceError, one_line

DEFAULT_FOLDER = "gpu-report"
DEFAULT_MINUTES = 10.0
# By the name in the namespace: kinds of benchmarks have options of the same names.
OPTIONS = {"gpu_report_out": "--out", "gpu_report_minutes": "--minutes",
           "gpu_report_rehearse": "--rehearse"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench --gpu-report`."""
    parser.add_argument("--gpu-report", action="store_true",
                        help="check everything that only CUDA runs, and write a report")
    parser.add_argument("--out", dest="gpu_report_out", metavar="FOLDER",
                        help=f"of report.md and report.json (default: {DEFAULT_FOLDER})")
    parser.add_argument("--minutes", dest="gpu_report_minutes", metavar="N",
                        help=f"within which it ends (default: {DEFAULT_MINUTES:.0f})")
    parser.add_argument("--rehearse", dest="gpu_report_rehearse", action="store_true",
                        help="run it in miniature on the CPU")


def check_kind(options: argparse.Namespace) -> None:
    """Raise ConfigError unless either a kind of benchmark or the report is asked for, and once."""
    given = [flag for name, flag in OPTIONS.items() if getattr(options, name)]
    if options.gpu_report:
        if options.kind is not None:
            raise ConfigError(f"bench takes --gpu-report or a kind, not both: leave out "
                              f"{options.kind}")
    elif given:
        raise ConfigError(f"{given[0]} before a kind is for --gpu-report; see svend bench --help")
    elif options.kind is None:
        raise ConfigError("bench: name a kind, or give --gpu-report; see svend bench --help")


def run(call: Call) -> int:
    """Run the report, write it after each part, print it, and return the exit code."""
    options = call.options
    started, rehearsal = time.monotonic(), options.gpu_report_rehearse
    minutes = _parse_minutes(options.gpu_report_minutes)
    tell_loading("torch")
    from svend import cuda
    from svend.bench.gpu_report import Verdict
    from svend.bench.gpu_report_pages import MARKDOWN, write_report
    from svend.bench.gpu_report_training import parts_of
    from svend.bench.gpu_report_worker import run_parts

    if not rehearsal and not cuda.is_available():
        raise ResourceError(
            "bench --gpu-report: torch finds no CUDA device; check nvidia-smi and that torch is a "
            "CUDA build, or add --rehearse to see on the CPU what it does"
        )
    folder = _make_folder(options.gpu_report_out or DEFAULT_FOLDER)
    about = {"command": f"python -m svend bench --gpu-report --minutes {minutes:g}"
             + (" --rehearse" if rehearsal else ""),
             "begun": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    tell(f"GPU report{', rehearsed on the CPU' if rehearsal else ''}: at most {minutes:g} minutes, "
         f"written to {folder} after each part")
    outcomes, page = [], ""
    for outcome in run_parts(
        parts_of, rehearsal=rehearsal, seconds=60 * minutes - (time.monotonic() - started),
        begin=lambda part: tell(f"{part}: begun"),
    ):
        outcomes.append(outcome)
        why = f": {outcome.reason}" if outcome.reason else ""
        tell(f"{outcome.part}: {outcome.verdict.value} ({outcome.seconds:.0f} s){why}")
        # After each part: a rented machine may be gone before the last.
        page = write_report(folder, outcomes, about, rehearsal=rehearsal)
    tell(f"\n{page}\nwrote {folder / MARKDOWN}")
    bad = [o for o in outcomes if o.verdict in (Verdict.OFF, Verdict.FAILED)]
    return 1 if bad else 0


def _make_folder(text: str) -> Path:
    folder = Path(text).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out = {text}: cannot be made a folder ({one_line(error)}); name "
                          "another") from None
    return folder


def _parse_minutes(text: str | None) -> float:
    if text is None:
        return DEFAULT_MINUTES
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not (math.isfinite(minutes) and minutes > 0):
        raise ConfigError(f"minutes = {text}: must be a number above 0")
    return minutes
