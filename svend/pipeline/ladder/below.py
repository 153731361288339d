"""The rungs below a ladder's first, as the registry and their runs tell of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from svend.errors import TrackingError, UserError
from svend.pipeline.config import ModelScale, PipelineConfig
from svend.pipeline.ladder.options import find_differences
from svend.pipeline.ladder.standing import Attempt, State
from svend.pipeline.loading import CONFIG_FILE, load_saved_config
from svend.pipeline.tags import PARENT_SCALE_TAG
from svend.pipeline.validation import GateLevel
from svend.tracking.registry import aliases_of, tags_of_version
from svend.tracking.runs import fetch_artifact, metric_history, tags_of
from svend.training.state import Horizon


def find_below(below: PipelineConfig, first: PipelineConfig) -> list[Attempt]:
    """Return the rungs below, from the lowest, whose losses those of `first` may be held against.

    below: the configuration of the rung that must be there. Raises UserError if the registry has no
    version of it that passed FULL, or if its run differs in what must be the same.
    """
    assert below.model is not None  # resolved
    scale, name = below.training.model_scale, below.model.name
    level = GateLevel.FULL.value
    missing = (
        f"rung {first.training.model_scale.value}: the registry has no version of {name}, the rung "
        f"below ({scale.value}), that passed {level.upper()}; climb from {scale.value}, or have "
        f"a version promoted with `svend promote --model {name} --to {level}`"
    )
    try:
        version = aliases_of(name).get(level)
    except TrackingError as error:
        raise UserError(f"{missing} ({error})") from None
    tags = None if version is None else tags_of_version(name, version)
    if tags is None or "svend.run_id" not in tags:
        raise UserError(missing)
    found: list[Attempt] = []
    run_id: str | None = tags["svend.run_id"]
    config = first
    while run_id is not None:
        with tempfile.TemporaryDirectory() as folder:
            saved = load_saved_config(fetch_artifact(f"runs:/{run_id}/{CONFIG_FILE}", Path(folder)))
        for difference in find_differences(saved, config):
            raise UserError(
                f"rung {config.training.model_scale.value}: {difference} in the run of "
                f"{saved.training.model_scale.value}, {run_id}: not comparable; set it alike, or "
                f"climb from {saved.training.model_scale.value}"
            )
        found.insert(0, _attempt(run_id, saved))
        run_id, config = tags_of(run_id).get(PARENT_SCALE_TAG), saved
    return found


def _attempt(run_id: str, config: PipelineConfig) -> Attempt:
    model, tags = config.model, tags_of(run_id)
    assert model is not None  # resolved
    losses = metric_history(run_id, "horizon/heldout_loss")
    tokens = metric_history(run_id, "horizon/tokens")
    horizons = [Horizon(step, round(tokens[step]), losses[step])
                for step in sorted(losses) if step in tokens]
    return Attempt(
        scale=ModelScale(config.training.model_scale), number=1, seed=config.training.seed,
        model=model.name, parameters=float(model.num_matrix_parameters()), state=State.PASSED,
        run_id=run_id, total_steps=max(losses, default=0),
        data_fingerprint=tags.get("svend.data_fingerprint", ""),
        tokenizer_sha256=tags.get("svend.tokenizer_sha256", ""), horizons=horizons,
    )
