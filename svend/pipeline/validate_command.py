"""`svend validate`: what breaks runs, tried before one begins."""

from __future__ import annotations

from svend.command import Call, Command, Takes, tell_loading, tell_next
from svend.pipeline.config import load_config


def _run(call: Call) -> int:
    load_config(call.groups, call.overrides)  # what does not fit is said at once
    tell_loading("torch and mlflow")
    from svend.pipeline.run_config import compose_run
    from svend.pipeline.runner import ScaleRunner

    runner = ScaleRunner(compose_run(call.groups, call.overrides), owns_process=True)
    checks = runner.check_infrastructure()
    passed = all(check.passed for check in checks)
    call.answer = {"passed": passed, "checks": checks}
    if passed:
        tell_next("train", call.words())
    return 0 if passed else 1


VALIDATE = Command(
    name="validate",
    summary="try what breaks runs, before one begins",
    description="Check device, precision, compilation, memory, disk, data, tokenizer, tracking "
    "store, a first step at the real shape, one batch learnt and a checkpoint; a line for each, "
    "with what to do where one fails. The exit code is 1 where one does.",
    makes="nothing but tokenised data, kept for the run",
    examples=(
        "svend validate",
        "svend validate --scale small --training.learning_rate 1e-4",
        "svend validate --preset quick_test --json",
    ),
    answer="passed, and checks with name, passed and detail",
    takes=Takes.GROUPS,
    run=_run,
)
