"""Weights that a run begins with: from a folder that `svend import` wrote, or from a version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from svend.data.records import file_digest
from svend.data.tokenizer import DocumentTokenizer, load_tokenizer
from svend.errors import CheckpointError, ConfigError, one_line
from svend.pipeline.checkpoints.files import verify
from svend.pipeline.checkpoints.metadata import MODEL, read_folder
from svend.pipeline.config import Parametrisation, PipelineConfig
from svend.pipeline.loading import CONFIG_FILE
from svend.pipeline.schema import read_yaml, to_tree
from svend.pipeline.state_files import read_state
from svend.pipeline.verified_version import open_verified
from svend.pipeline.version_files import ANY_SIZE, TOKENIZER, WEIGHTS

SCALE_KEYS = ("train_memory_gb", "recommended_samples")


@dataclass(frozen=True)
class StartingPoint:
    """Weights with the architecture and the tokenizer that they belong to."""

    place: str
    weights: Path
    sha256: str
    model: Mapping[str, Any]
    tokenizer: Path
    parametrisation: Mapping[str, Any]

    def settings(self, cache_dir: str) -> list[tuple[str, str]]:
        """Return the architecture and the tokenizer as overrides of a configuration.

        The tokenizer is copied into the cache, by its hash: a version may lie in a folder that is
        another at each start, and a run that goes on must find the same setting.
        """
        kept = Path(cache_dir).expanduser() / "tokenizers" / (
            f"init-{file_digest(self.tokenizer)[:32]}.json"
        )
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            if not kept.is_file():
                writing = kept.with_name(f".writing-{kept.name}-{os.getpid()}")
                shutil.copyfile(self.tokenizer, writing)
                writing.rename(kept)
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir {cache_dir}: cannot be written ({error.strerror}); choose another"
            ) from None
        told = {
            **{f"model.{key}": value for key, value in self.model.items()
               if key not in SCALE_KEYS},
            **{f"training.{key}": value for key, value in self.parametrisation.items()},
            "training.data.tokenizer": str(kept.absolute()),
            "init_from": self.place,
        }
        return [(key, str(value)) for key, value in told.items()]

    def check(self, config: PipelineConfig, tokenizer: DocumentTokenizer) -> None:
        """Raise ConfigError where a setting would make another function of the weights."""
        now = {f"model.{key}": value for key, value in to_tree(config.model).items()}
        now |= {f"training.{key}": value for key, value in to_tree(config.training).items()}
        was = {f"model.{key}": value for key, value in self.model.items()
               if key not in (*SCALE_KEYS, "name")}
        was |= {f"training.{key}": value for key, value in self.parametrisation.items()}
        for key, value in was.items():
            if now[key] != value:
                raise ConfigError(
                    f"init_from = {self.place}: was made with {key} = {value}, now it is "
                    f"{now[key]}; the weights mean something else then: leave it as it is there"
                )
        own = load_tokenizer(str(self.tokenizer), ANY_SIZE)
        if own.sha256 != tokenizer.sha256:
            raise ConfigError(
                f"init_from = {self.place}: training.data.tokenizer is another than the weights' "
                f"own; leave it out, or give {self.tokenizer}"
            )

    def weights_for(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the weights. Raises ConfigError where the model is of another shape."""
        state = self.read()
        own = model.state_dict()
        for name in sorted({*own, *state}):
            shapes = [tuple(where[name].shape) if name in where else None for where in (own, state)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"init_from = {self.place}: {name} is {shapes[1]} there, the model's is "
                    f"{shapes[0]}; leave model.* as it is there"
                )
        return state

    def read(self) -> dict[str, Tensor]:
        """Return the weights by name. Raises CheckpointError for a file that holds none."""
        if self.weights.name != WEIGHTS:
            state: dict[str, torch.Tensor] = read_state(self.weights, mapped=True)
        else:
            try:
                state = load_file(self.weights)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.weights}: cannot be read ({one_line(error)[:200]})"
                ) from None
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
        ):
            raise CheckpointError(f"{self.weights}: must hold tensors by their names only")
        return state


def find_starting_point(place: str) -> StartingPoint:
    """Return what a folder or a version of the registry holds to begin with.

    Raises UserError, in one line, for what holds nothing, or not what was written.
    """
    if place.startswith("models:/"):
        version, _ = open_verified(place)
        folder = version.folder
        weights, sha256 = folder / WEIGHTS, file_digest(folder / WEIGHTS)
        place = f"models:/{version.name}/{version.version}"
    else:
        folder = Path(place).expanduser()
        found, complaints = read_folder(folder) if folder.is_dir() else ([], [])
        if complaints and not found:
            raise CheckpointError(f"init_from = {place}: {complaints[-1]}")
        if not found:
            raise CheckpointError(
                f"init_from = {place}: has no checkpoint; give a folder that svend import wrote, "
                "or models:/NAME@ALIAS"
            )
        verify(found[-1])
        weights, sha256 = found[-1].path / MODEL, found[-1].weights_sha256
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(
            f"init_from = {place}: has no {TOKENIZER}; give a folder that svend import wrote, or "
            "models:/NAME@ALIAS"
        )
    tree = read_yaml(folder / CONFIG_FILE)
    if not isinstance(tree.get("model"), dict):
        raise ConfigError(
            f"{folder / CONFIG_FILE}: has no section model; give what svend import wrote"
        )
    training = tree.get("training") or {}
    if not isinstance(training, dict):
        raise ConfigError(f"{folder / CONFIG_FILE}: training = {training}: must be a section")
    keys = ["parametrisation"]
    if training.get("parametrisation") == Parametrisation.COMPLETEP.value:
        keys += ["base_width", "base_depth", "base_head_size"]
    base = {key: training[key] for key in keys if key in training}
    start = StartingPoint(place, weights, sha256, tree["model"], folder / TOKENIZER, base)
    start.read()  # before anything is begun with it; the files are mapped, not held
    return start
