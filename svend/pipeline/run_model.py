"""The model of a run: planned without being allocated, built, and named for the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from svend.errors import ConfigError
from svend.models.config import BaseShape, TransformerConfig
from svend.models.float8 import compute_in_float8
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import ModelConfig, ModelScale, PipelineConfig, TrainingConfig
from svend.planning.memory import equivalent_model
from svend.training.low_memory import prepare_weights
from svend.training.parallel import shard_model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ModelFactory = Callable[[ModelScale], nn.Module]


def planned_model(config: PipelineConfig, model_factory: ModelFactory | None) -> ModelConfig:
    """Return the architecture to plan for: the scale's, or that of the factory's model.

    The factory is called on the meta device, where nothing is allocated. A module of another
    kind is planned as a Llama of as many parameters.
    """
    assert config.model is not None  # set by PipelineConfig.resolve
    if model_factory is None:
        return config.model
    with torch.device("meta"):
        model = model_factory(config.training.model_scale)
    _check_parametrisation(model, config.training)
    if isinstance(model, ReasoningTransformer):
        return model.config.to_model_config(config.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return equivalent_model(config.model, parameters)


def build_model(
    config: PipelineConfig, model_factory: ModelFactory | None, device: torch.device,
    mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Return the model of the config's scale, its weights drawn from the config's seed.

    mesh: of the processes that each hold a part of it. No process then ever holds the whole, but of
    a factory's model.
    """
    assert config.model is not None  # set by PipelineConfig.resolve
    training = config.training
    torch.manual_seed(training.seed)
    if model_factory is not None:
        model = model_factory(training.model_scale)
    else:
        with torch.device("meta"):
            model = ReasoningTransformer(
                TransformerConfig.from_model_config(config.model, BaseShape.of(training))
            )
    if isinstance(model, ReasoningTransformer):
        if training.gradient_checkpointing:
            model.checkpoint_blocks(training.gradient_checkpointing_policy)
        if training.float8:
            compute_in_float8(model.blocks)
    if mesh is not None:
        prepare_weights(model, training)  # what is sharded keeps its precision
        shard_model(model, mesh, training)
    if model_factory is None:
        assert isinstance(model, ReasoningTransformer)
        model.to_empty(device=device)
        model.initialize(training.seed)
    return model


def registered_name(
    config: PipelineConfig, model: nn.Module, model_factory: ModelFactory | None
) -> str:
    """Return the name in the registry: an own model never enters the one of a scale."""
    assert config.model is not None  # set by PipelineConfig.resolve
    if model_factory is None:
        return config.model.name
    own = getattr(getattr(model, "config", None), "name", None)
    scale = config.training.model_scale.value
    return own if isinstance(own, str) and own != config.model.name else f"custom-{scale}"


def _check_parametrisation(model: nn.Module, training: TrainingConfig) -> None:
    """Raise ConfigError where a factory's model is not parametrised as the config says."""
    wanted = BaseShape.of(training)
    own = model.config.base if isinstance(model, ReasoningTransformer) else None
    if own != wanted:
        raise ConfigError(
            f"training.parametrisation = {training.parametrisation.value}: the factory's model has "
            f"the base {own or 'none'}, the configuration {wanted or 'none'}; give its "
            "TransformerConfig base=BaseShape.of(config.training), or set "
            "training.parametrisation=standard for a module of another kind"
        )
