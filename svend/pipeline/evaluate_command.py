"""`svend evaluate`: benchmarks on a version of the registry."""

from __future__ import annotations

import argparse

from svend.command import Call, Command, Takes, complete, tell_loading
from svend.pipeline.config import BENCHMARK_NAMES


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="URI",
                        help="models:/NAME/VERSION or models:/NAME@ALIAS")
    complete(parser.add_argument(
        "--benchmarks", default="accuracy,tool_accuracy", metavar="NAME,NAME",
        help=f"of {', '.join(BENCHMARK_NAMES)}; NAME_sample: 200 problems at most (default: "
             "%(default)s)",
    ), BENCHMARK_NAMES, listed=True)


def _run(call: Call) -> int:
    names = [name.strip() for name in call.options.benchmarks.split(",") if name.strip()]
    tell_loading("torch and mlflow")
    from svend.pipeline.version_evaluation import evaluate_version

    call.answer = evaluate_version(call.options.model, names, call.overrides)
    return 0


EVALUATE = Command(
    name="evaluate",
    summary="measure benchmarks on a registered version",
    description="Measure benchmarks on a version of the registry, decide the gates that they "
    "suffice for, and record both with every sample. No alias moves.",
    makes="a run with every sample, tags on the version, rows in its record",
    notes="""\
the settings are those that the version was trained with; any can be overridden, such as
  --evaluation.problems 1000   --gates.confidence 0.95
  --evaluation.paths '{gsm8k: ../gsm8k, tool_accuracy: ../bfcl}'
""",
    examples=(
        "svend evaluate --model models:/svend-tiny-50m@standard",
        "svend evaluate --model models:/svend-tiny-50m/1 --benchmarks accuracy,latency_p99",
    ),
    answer="model, version, run_id, measurements with intervals, levels that were decided",
    takes=Takes.KEYS,
    add_options=_add_options,
    run=_run,
)
