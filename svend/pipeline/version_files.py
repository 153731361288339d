"""The folder of a registered version: weights as safetensors, config, tokenizer; no code."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from svend.data.tokenizer import DocumentTokenizer, load_tokenizer
from svend.errors import CheckpointError, one_line
from svend.models.config import BaseShape, TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import PipelineConfig
from svend.pipeline.loading import CONFIG_FILE
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
    folder: Path, config: PipelineConfig, device: torch.device
) -> ReasoningTransformer:
    """Return the model of a version's folder, ready to answer.

    Raises CheckpointError for weights that cannot be read, or do not fit.
    """
    assert config.model is not None  # set by PipelineConfig.resolve
    path = folder / WEIGHTS
    with torch.device("meta"):
        model = ReasoningTransformer(
            TransformerConfig.from_model_config(config.model, BaseShape.of(config.training))
        )
    try:
        state = load_file(path)
    except Exception as error:  # noqa: BLE001 - an unknown dtype or a size beyond memory, too
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)[:200]})") from None
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit the architecture in its {CONFIG_FILE} "
            f"({one_line(error)[:200]})"
        ) from None
    # Of a run with weights in bf16, too: wider, and the same numbers.
    return model.float().to(device).eval()


def load_version_tokenizer(folder: Path) -> DocumentTokenizer:
    """Return the tokenizer of a version's folder."""
    return load_tokenizer(str(folder / TOKENIZER), ANY_SIZE)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaN is like NaN here, and -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )
