"""The configuration of a run, with the weights that it begins with and a sweep's values in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from svend.pipeline.config import PipelineConfig, load_config
from svend.pipeline.hyperparameters import fetch_hyperparameters, locate_hyperparameters
from svend.pipeline.init_from import find_starting_point


def compose_run(
    groups: Mapping[str, str], overrides: Sequence[tuple[str, str]]
) -> PipelineConfig:
    """Return the configuration; what `init_from` and `hparams` bring gives way to what is set.

    Raises UserError where one of them is not there, or something does not fit.
    """
    config = load_config(groups, overrides)
    begins_with: list[tuple[str, str]] = []
    if config.init_from is not None:
        start = find_starting_point(config.init_from)
        begins_with = start.settings(config.training.data.cache_dir)
        # By its address: an alias may mean another version tomorrow.
        overrides = [*overrides, ("init_from", start.place)]
        config = load_config(groups, [*begins_with, *overrides])
    if config.hparams is not None:
        address = locate_hyperparameters(config.hparams, config.training.data.recipe)
        found = fetch_hyperparameters(address)
        # By its address: a name may mean another result tomorrow.
        config = load_config(groups, [*begins_with, *found.settings(), *overrides,
                                      ("hparams", address)])
    return config
