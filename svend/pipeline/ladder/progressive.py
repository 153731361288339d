"""The runner that users have: one scale, or scale after scale."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from svend.errors import ConfigError
from svend.pipeline.config import ModelScale, get_model_config
from svend.pipeline.ladder.climb import LadderClimb, Means
from svend.pipeline.ladder.options import ORDER, common_data, default_ladder, make_ladder
from svend.pipeline.ladder.standing import ladder_folder
from svend.pipeline.run_folder import folder_name
from svend.pipeline.runner import PipelineResult, ScaleRunner
from svend.ranks import require_alone


class PipelineRunner(ScaleRunner):
    """Runs one scale with `run()`, or climbs from scale to scale with `run_progressive()`."""

    def run_progressive(
        self,
        start_scale: ModelScale = ModelScale.TINY,
        end_scale: ModelScale = ModelScale.FLAGSHIP,
        validation_between_scales: bool = True,
    ) -> list[PipelineResult]:
        """Train scale after scale and stop at the first that fails; return how each ended.

        It is a ladder of the experiment's name: one run with a run per rung below it. With
        `validation_between_scales` a rung must pass FULL, its loss fall, and be as predicted where
        the rungs below have horizons enough to predict from; and the rung below the first must be
        in the registry with FULL passed. Data are the same for all rungs: where the configuration
        leaves them to the scale, the sequence length is the shortest context, and generated
        documents are as many as the largest rung wants. Raises ConfigError if the scales are in the
        wrong order or the config fixes one model for all.
        """
        require_alone("run_progressive runs in one process (svend ladder --nproc N in several)")
        if self.config.model is not None:
            raise ConfigError("model is set: a ladder takes each scale's own; leave it None")
        ladder = default_ladder(start_scale, end_scale)
        ladder.check()
        first = ORDER.index(start_scale)
        # What a factory builds below has a name that only its own run knows.
        look_below = validation_between_scales and self.model_factory is None
        wanted = ORDER[max(0, first - look_below) : ORDER.index(end_scale) + 1]
        models = [get_model_config(scale) for scale in ladder.scales]
        data = common_data(models, self.config.training.data)
        training = replace(self.config.training, data=data)
        rungs = {scale: replace(self.config, training=training.at_scale(scale))
                 for scale in wanted}
        name = folder_name(training.experiment_name)
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        name, folder = next(
            (name, folder) for name in numbered
            if not (folder := ladder_folder(self.config.checkpoint_dir, name)).exists()
        )
        # One that the configuration names is in that of every rung.
        given = self.model_factory if self.config.model_factory is None else None
        means = Means(given, validation_between_scales, self.owns_process)
        climb = LadderClimb(make_ladder(ladder, rungs), name, Path(folder), means)
        results = climb.go()
        self.validator.history += climb.verdicts
        return results
