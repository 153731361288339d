"""`svend plan --gpu`: its options, and what it reads of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from svend.errors import ConfigError
from svend.pipeline.config import ModelScale, load_config

ALL = "all"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `plan` that are about GPUs which need not be here."""
    parser.add_argument("--gpu", metavar="NAME",
                        help="plan for this GPU instead of the machine here, such as a100-80gb or "
                             "h100-80gb; of all scales where --scale is left out or all")
    parser.add_argument("--gpus", type=int, metavar="N",
                        help="how many (default: the fewest on which the settings fit)")
    parser.add_argument("--tokens", type=float, metavar="N",
                        help="to train on (default: those of training.max_steps, else 20 a "
                             "parameter)")
    parser.add_argument("--mfu", type=float, metavar="SHARE",
                        help="of the GPU's peak that is assumed to be used (default: 0.4)")
    parser.add_argument("--dollars-per-gpu-hour", type=float, metavar="PRICE",
                        help="what a GPU hour costs you")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(
    options: argparse.Namespace, groups: dict[str, str], overrides: Sequence[tuple[str, str]]
) -> None:
    """Print the plan; raises ConfigError for what cannot be planned."""
    _check(options)
    scale = groups.get("scale", ALL)
    scales = [member.value for member in ModelScale] if scale == ALL else [scale]
    configs = [load_config({**groups, "scale": name}, overrides) for name in scales]
    for config in configs:
        for key in ("hparams", "init_from"):
            if getattr(config, key) is not None:
                raise ConfigError(f"{key} = {getattr(config, key)}: is not read with --gpu, which "
                                  "plans what the configuration says; leave one of them out")
    if not options.json:
        print("starting: loading torch", flush=True)
    from svend.pipeline.gpu_preview import preview_on_gpus
    from svend.planning.gpu_plan import ASSUMED_MFU

    preview_on_gpus(
        configs, options.gpu, gpus=options.gpus,
        mfu=ASSUMED_MFU if options.mfu is None else options.mfu,
        tokens=None if options.tokens is None else int(options.tokens),
        dollars_per_gpu_hour=options.dollars_per_gpu_hour, as_json=options.json,
    )


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for a figure that no run can have."""
    for name, least, what in (("gpus", 1, "at least 1"), ("tokens", 1, "at least 1"),
                              ("dollars_per_gpu_hour", 0, "at least 0")):
        value = getattr(options, name)
        if value is not None and not least <= value < float("inf"):
            raise ConfigError(f"{name.replace('_', '-')} = {value:g}: must be {what}")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise ConfigError(f"mfu = {options.mfu:g}: must be above 0 and at most 1")


def refuse_without_gpu(options: argparse.Namespace) -> None:
    """Raise ConfigError for an option of --gpu without it."""
    for name in ("gpus", "tokens", "mfu", "dollars_per_gpu_hour", "json"):
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')} is for a plan on a GPU; add --gpu NAME")
    if options.scale == ALL:
        raise ConfigError("scale = all: is for a plan on a GPU; add --gpu NAME")
