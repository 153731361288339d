"""`svend bench memory`: the plan's peak memory beside what is taken."""

from __future__ import annotations

import argparse

from svend.bench.options import SCALES, scale_named
from svend.command import Call, Command, complete, tell, tell_loading, tell_next
from svend.errors import UserError


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fake", action="store_true",
                        help="all scales with their own settings, on tensors without storage")
    complete(parser.add_argument("--scales", nargs="+", default=None, metavar="NAME",
                                 help="of --fake (default: all seven)"), SCALES)


def _run(call: Call) -> int:
    """Print predicted beside real peak memory.

    Returns 1 where a prediction is off by more than 10%, or a run holds more than its plan says.
    """
    options = call.options
    if options.scales and not options.fake:
        raise UserError("bench memory: --scales is for --fake")
    scales = [scale_named(name) for name in options.scales or SCALES]
    tell_loading("torch")
    from svend.bench.memory_check import MemoryCheck, judge, memory_table
    from svend.pipeline.console import make_console

    checks: list[MemoryCheck] = []
    in_runs: list[MemoryCheck] = []
    if options.fake:
        from svend.bench.fake_memory import check_scale

        for scale in scales:
            tell(scale.value)
            checks.append(check_scale(scale))
        title, real = "Peak memory, predicted and tracked on fake tensors", "tracked"
    else:
        from svend.bench.memory import measure_peaks

        for check, in_run in measure_peaks(tell):
            checks.append(check)
            in_runs.append(in_run)
        title, real = "Peak memory, predicted and measured on CPU", "measured"
    make_console(pipe_width=132).print(memory_table(title, real, checks, in_runs))
    passed, told = judge(checks, in_runs)
    tell(told)
    if not options.fake:
        tell_next("bench memory --fake")
    return 0 if passed else 1


MEMORY = Command(
    name="memory",
    summary="the plan's peak memory, beside what is taken",
    description="Hold the predicted peak memory against what processes take, or, with --fake, "
    "against what PyTorch's tracker counts at every scale. The exit code is 1 above 10%.",
    makes="a table",
    examples=("svend bench memory --fake --scales tiny small", "svend bench memory"),
    add_options=_add_options,
    run=_run,
)
