"""The folder of a registered version: weights as safetensors, config, tokenizer; no code."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from svend.data.tokenizer import DocumentTokenizer, load_tokenizer
from svend.errors import CheckpointError, ConfigError, one_line
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import PipelineConfig
from svend.pipeline.loading import CONFIG_FILE
from svend.pipeline.own_model import find_model_factory, make_model
from svend.pipeline.state_files import read_state

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
ANY_SIZE = 2**32


def write_weights(checkpoint_weights: Path, path: Path) -> None:
    """Write a checkpoint's weights as safetensors, and read them back to compare.

    Neither is held in memory: both files are mapped. Raises CheckpointError where the state holds
    what is no tensor.
    """
    state = read_state(checkpoint_weights, mapped=True)
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    if not isinstance(state, dict):
        raise CheckpointError(f"{checkpoint_weights}: holds no state_dict")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{checkpoint_weights}: {name} is no tensor; a model's state_dict must hold "
                "tensors only to be registered"
            )
        # Tied weights are written once for each name: safetensors knows no sharing.
        shared = value.untyped_storage().data_ptr() in storages
        storages.add(value.untyped_storage().data_ptr())
        tensors[name] = (value.clone() if shared else value).contiguous()
    save_file(tensors, path)
    # safetensors leaves its file to its owner alone: a store may have other readers.
    shutil.copymode(checkpoint_weights, path)
    written = load_file(path)
    if written.keys() != tensors.keys() or any(
        not _same_bits(written[name], tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{path}: is not what was written; check the disk")


def load_version_model(
    folder: Path, config: PipelineConfig, device: torch.device, *, runs_factory: bool = False
) -> nn.Module:
    """Return the model of a version's folder, ready to answer.

    runs_factory: whether the function that the config names may be run; a registry is data, and
    what it names is run only where a person asked for it. Raises CheckpointError for weights that
    cannot be read, or do not fit, ConfigError for a factory that may not be run.
    """
    path = folder / WEIGHTS
    model = _model_of(config, runs_factory=runs_factory)
    try:
        state = load_file(path)
    except Exception as error:  # noqa: BLE001 - an unknown dtype or a size beyond memory, too
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)[:200]})") from None
    try:
        # What a factory made has its weights, some of them tied: they are written over.
        model.load_state_dict(state, assign=config.model_factory is None)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit the architecture in its {CONFIG_FILE} "
            f"({one_line(error)[:200]}); where a factory made the model, give it as "
            "--model_factory file.py:function"
        ) from None
    # Of a run with weights in bf16, too: wider, and the same numbers.
    return model.float().to(device).eval()


def _model_of(config: PipelineConfig, *, runs_factory: bool) -> nn.Module:
    """Return a model as the config says, its weights still to be loaded."""
    assert config.model is not None  # set by PipelineConfig.resolve
    if config.model_factory is None:
        with torch.device("meta"):
            return ReasoningTransformer(
                TransformerConfig.of_run(config.model, config.training)
            )
    if not runs_factory:
        raise ConfigError(
            f"model_factory = {config.model_factory}: makes the model of this version, and is not "
            f"run unasked; if you trust it, give --model_factory {config.model_factory}"
        )
    factory = find_model_factory(config)
    assert factory is not None
    return make_model(factory, config)


def answering_model(model: nn.Module, what: str) -> ReasoningTransformer:
    """Return a version's model where it is Svend's own transformer; else raise ConfigError.

    what: that needs it, for the message.
    """
    if not isinstance(model, ReasoningTransformer):
        raise ConfigError(
            f"{what} needs Svend's own transformer, and this version's model is a "
            f"{type(model).__name__}"
        )
    return model


def load_version_tokenizer(folder: Path) -> DocumentTokenizer:
    """Return the tokenizer of a version's folder."""
    return load_tokenizer(str(folder / TOKENIZER), ANY_SIZE)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaN is like NaN here, and -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )
