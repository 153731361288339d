"""The plan of a run without the run: nothing is allocated, measured or tracked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from svend.device import available_bytes, describe_device, resolve_device, resolve_precision
from svend.pipeline.config import PipelineConfig
from svend.pipeline.console import make_console
from svend.pipeline.hyperparameters import (
    Carried,
    carry,
    fetch_hyperparameters,
    locate_hyperparameters,
)
from svend.pipeline.own_model import describe_model, find_model_factory, make_model
from svend.pipeline.report import show_preview
from svend.pipeline.run_data import read_run_data, steps_over
from svend.pipeline.run_model import planned_model
from svend.planning.plan import choose_micro_batch, predict_memory_on, size_run


def preview_run(config: PipelineConfig) -> dict[str, Any]:
    """Print what a run of this configuration would do, and what becomes of a sweep's values.

    Returns the figures.

    Data are read only where `training.max_steps` leaves the number of steps to them; what is
    tokenised then is kept for the run. Raises UserError for what the user can mend.
    """
    console = make_console()
    config = config.resolve()
    factory = find_model_factory(config)
    training, model = config.training, planned_model(config, factory)
    device = resolve_device(training.device)
    training = replace(training, precision=resolve_precision(training.precision, device))
    if factory is None:
        training = choose_micro_batch(model, training, device)
    config = replace(config, training=training)
    total_steps = training.max_steps
    if total_steps is None:
        data = read_run_data(config, lambda text: console.print(f"data: {text}"))
        total_steps = steps_over(data.sequences, training)
    carried: list[Carried] = []
    if config.hparams is not None:
        found = fetch_hyperparameters(
            locate_hyperparameters(config.hparams, training.data.recipe)
        )
        training, carried = carry(found, config, total_steps)
        config = replace(config, training=training)
    own, size = "", size_run(training, model, total_steps)
    if factory is not None:
        made = make_model(factory, config, on_meta=True)
        own = describe_model(made, factory, config)
        size = replace(size, parameters=sum(p.numel() for p in made.parameters()))
    memory = predict_memory_on(model, training, device)
    available = available_bytes(device)
    show_preview(
        console, config, size, memory, available, describe_device(device), carried, own
    )
    return {
        "model": model.name, "scale": training.model_scale, "preset": config.preset,
        "parameters": size.parameters, "steps": size.total_steps, "tokens": size.tokens,
        "tokens_per_step": size.tokens_per_step, "flops": size.flops,
        "flops_per_token": size.flops_per_token, "device": describe_device(device),
        "precision": training.precision, "peak_memory_bytes": memory.total,
        "available_memory_bytes": available, "fits": memory.total <= available,
        "hyperparameters": carried,
    }
