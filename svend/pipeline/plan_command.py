"""`svend plan`: what a run would do and take, here or on GPUs that need not be here."""

from __future__ import annotations

import argparse

from svend.command import Call, Command, Takes, complete, tell_loading, tell_next
from svend.errors import ConfigError
from svend.pipeline.config import ModelScale, load_config
from svend.planning.gpus import GPUS

ALL = "all"


def _add_options(parser: argparse.ArgumentParser) -> None:
    complete(parser.add_argument(
        "--gpu", metavar="NAME",
        help=f"plan for this GPU instead of the machine here: {', '.join(GPUS)}; of all scales "
             "where --scale is left out or all",
    ), GPUS)
    parser.add_argument("--gpus", type=int, metavar="N",
                        help="how many (default: the fewest on which the settings fit)")
    parser.add_argument("--tokens", type=float, metavar="N",
                        help="to train on (default: those of training.max_steps, else 20 a "
                             "parameter)")
    parser.add_argument("--mfu", type=float, metavar="SHARE",
                        help="of the GPU's peak that is assumed to be used (default: 0.4)")
    parser.add_argument("--dollars-per-gpu-hour", type=float, metavar="PRICE",
                        help="what a GPU hour costs you")


def _run(call: Call) -> int:
    if call.options.gpu is not None:
        _plan_on_gpus(call)
    else:
        _plan_here(call)
    return 0


def _plan_here(call: Call) -> None:
    options = call.options
    for name in ("gpus", "tokens", "mfu", "dollars_per_gpu_hour"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for a plan on a GPU; add --gpu NAME")
    if options.scale == ALL:
        raise ConfigError("scale = all: is for a plan on a GPU; add --gpu NAME")
    load_config(call.groups, call.overrides)  # what does not fit is said at once
    tell_loading("torch and mlflow")
    from svend.pipeline.preview import preview_run
    from svend.pipeline.run_config import compose_run

    call.answer = preview_run(compose_run(call.groups, call.overrides))
    if call.answer["fits"]:
        tell_next("validate", call.words())
    else:
        tell_next("plan", call.words(), "--gpu a100-80gb")


def _plan_on_gpus(call: Call) -> None:
    options = call.options
    _check(options)
    scale = call.groups.get("scale", ALL)
    scales = [member.value for member in ModelScale] if scale == ALL else [scale]
    configs = [load_config({**call.groups, "scale": name}, call.overrides) for name in scales]
    for config in configs:
        for key in ("hparams", "init_from"):
            if getattr(config, key) is not None:
                raise ConfigError(f"{key} = {getattr(config, key)}: is not read with --gpu, which "
                                  "plans what the configuration says; leave one of them out")
    tell_loading("torch")
    from svend.pipeline.gpu_preview import preview_on_gpus
    from svend.planning.gpu_plan import ASSUMED_MFU

    rows = preview_on_gpus(
        configs, options.gpu, gpus=options.gpus,
        mfu=ASSUMED_MFU if options.mfu is None else options.mfu,
        tokens=None if options.tokens is None else int(options.tokens),
        dollars_per_gpu_hour=options.dollars_per_gpu_hour,
    )
    call.answer = rows if len(rows) > 1 else rows[0]
    if len(rows) > 1:
        tell_next(f"plan --gpu {options.gpu} --scale {ModelScale.XL.value}")


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for a figure that no run can have."""
    for name, least, what in (("gpus", 1, "at least 1"), ("tokens", 1, "at least 1"),
                              ("dollars_per_gpu_hour", 0, "at least 0")):
        value = getattr(options, name)
        if value is not None and not least <= value < float("inf"):
            raise ConfigError(f"{name.replace('_', '-')} = {value:g}: must be {what}")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise ConfigError(f"mfu = {options.mfu:g}: must be above 0 and at most 1")


PLAN = Command(
    name="plan",
    summary="print what a run would do, without doing it",
    description="Print the plan of a run: parameters, tokens, FLOPs, memory, and what becomes of a "
    "sweep's values (--hparams FILE). No weights are made and nothing is measured; data are read "
    "only where training.max_steps is not set. With --gpu: memory by part, time, and the settings "
    "that fit, on GPUs that need not be here; no data are read.",
    makes="nothing but tokenised data, kept for the run, where they are read",
    examples=(
        "svend plan --scale small --training.max_steps 1000",
        "svend plan --scale xl --hparams hparams.yaml --training.max_steps 10000",
        "svend plan --scale flagship --gpu a100-80gb",
        "svend plan --gpu h100-80gb --dollars-per-gpu-hour 2.50 --json",
    ),
    answer="model, scale, parameters, tokens, memory in bytes, fits; of all scales a list",
    takes=Takes.GROUPS,
    add_options=_add_options,
    run=_run,
)
