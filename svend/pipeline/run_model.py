"""The model of a run: planned without being allocated, built, and named for the registry."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from svend.errors import ConfigError
from svend.models.config import BaseShape, TransformerConfig
from svend.models.float8 import compute_in_float8
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import ModelConfig, PipelineConfig, TrainingConfig
from svend.pipeline.own_model import (
    ModelFactory,
    check_model,
    make_model,
    own_model_name,
)
from svend.planning.memory import equivalent_model
from svend.training.low_memory import prepare_weights
from svend.training.parallel import shard_model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

def planned_model(config: PipelineConfig, model_factory: ModelFactory | None) -> ModelConfig:
    """Return the architecture to plan for: the scale's, or that of the factory's model.

    The factory is called on the meta device, where nothing is allocated. A module of another
    kind is planned as a Llama of as many parameters.
    """
    assert config.model is not None  # set by PipelineConfig.resolve
    if model_factory is None:
        return config.model
    model = make_model(model_factory, config, on_meta=True)
    _check_parametrisation(model, config.training)
    if isinstance(model, ReasoningTransformer):
        return model.config.to_model_config(config.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return replace(equivalent_model(config.model, parameters), name=own_model_name(model, config))


def build_model(
    config: PipelineConfig, model_factory: ModelFactory | None, device: torch.device,
    vocabulary: int, mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Return the model of the config's scale, its weights drawn from the config's seed.

    vocabulary: how many token ids a factory's model is tried with. mesh: of the processes that each
    hold a part of it. No process then ever holds the whole, but of a factory's model.
    """
    assert config.model is not None  # set by PipelineConfig.resolve
    training = config.training
    torch.manual_seed(training.seed)
    if model_factory is not None:
        model = make_model(model_factory, config)
        if mesh is None:
            check_model(model.to(device), model_factory, config, device, vocabulary)
        elif not isinstance(model, ReasoningTransformer):
            raise ConfigError(
                f"training.parallel = {training.parallel.value}: would divide the weights, which "
                f"Svend's own transformer is made for, and the factory's model is a "
                f"{type(model).__name__}; set training.parallel=ddp"
            )
    else:
        with torch.device("meta"):
            model = ReasoningTransformer(TransformerConfig.of_run(config.model, training))
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
    return config.model.name if model_factory is None else own_model_name(model, config)


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
    own_std = model.config.initializer_range if isinstance(model, ReasoningTransformer) else None
    if training.init_std not in (own_std, TrainingConfig().init_std):
        raise ConfigError(
            f"training.init_std = {training.init_std}: the factory's model draws its own weights"
            + ("" if own_std is None else f", with {own_std}; give its TransformerConfig "
               "initializer_range=config.training.init_std") + ", or leave it out"
        )
