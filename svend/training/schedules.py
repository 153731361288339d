"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from svend.pipeline.config import Schedule, TrainingConfig


def learning_rate_factor(
    step: int, total_steps: int, training: TrainingConfig, end: int | None = None
) -> float:
    """Return the learning rate at `step` (from 0) as a part of the peak learning rate.

    Linear warm-up, then: a cosine to the minimum (Loshchilov and Hutter 2017); or a plateau with a
    linear decay at the end (warmup-stable-decay, Hu et al. 2024, arXiv 2404.06395); or constant.
    end: the step at which a branch of warmup-stable-decay ends, in place of the run.
    """
    warmup_steps = round(training.warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    minimum = training.min_learning_rate_ratio
    if training.schedule is Schedule.CONSTANT:
        return 1.0
    if training.schedule is Schedule.WSD:
        end = total_steps if end is None else end
        decay_steps = max(1, round(training.decay_ratio * end))
        left = min(1.0, max(0, end - step) / decay_steps)
        return minimum + (1.0 - minimum) * left
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return minimum + (1.0 - minimum) * 0.5 * (1.0 + math.cos(math.pi * done))
