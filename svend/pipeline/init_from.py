"""Weights that a run begins with: from a folder that `svend import` wrote, or from a version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from svend.data.records import file_digest
from svend.errors import CheckpointError, ConfigError
from svend.pipeline.checkpoint_files import MODEL, read_folder, read_state, verify
from svend.pipeline.config import Parametrisation, TrainingConfig
from svend.pipeline.schema import read_yaml, to_tree
from svend.pipeline.version_files import CONFIG, TOKENIZER, WEIGHTS
from svend.tracking.registry import open_version

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

    def settings(self) -> list[tuple[str, str]]:
        """Return the architecture and the tokenizer as overrides of a configuration."""
        told = {
            **{f"model.{key}": value for key, value in self.model.items()
               if key not in SCALE_KEYS},
            **{f"training.{key}": value for key, value in self.parametrisation.items()},
            "training.data.tokenizer": str(self.tokenizer.absolute()),
        }
        return [(key, str(value)) for key, value in told.items()]

    def load_into(self, model: nn.Module, training: TrainingConfig) -> None:
        """Give a model these weights.

        Raises ConfigError where it is of another shape, or where its parametrisation would make
        another function of them.
        """
        told = to_tree(training)
        for key, value in self.parametrisation.items():
            if told[key] != value:
                raise ConfigError(
                    f"init_from = {self.place}: was made with training.{key} = {value}, now it is "
                    f"{told[key]}; the weights mean something else then"
                )
        state = self._read()
        own = model.state_dict()
        for name in sorted({*own, *state}):
            shapes = [tuple(where[name].shape) if name in where else None for where in (own, state)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"init_from = {self.place}: {name} is {shapes[1]} there, the model's is "
                    f"{shapes[0]}; leave model.* and data.tokenizer as they are there"
                )
        model.load_state_dict(state)

    def _read(self) -> dict[str, Tensor]:
        if file_digest(self.weights) != self.sha256:
            raise CheckpointError(f"{self.weights}: is not what was written; import it again")
        if self.weights.name == WEIGHTS:
            return load_file(self.weights)
        state: dict[str, torch.Tensor] = read_state(self.weights)
        return state


def find_starting_point(place: str) -> StartingPoint:
    """Return what a folder or a version of the registry holds to begin with.

    Raises UserError, in one line, for what holds nothing, or not what was written.
    """
    if place.startswith("models:/"):
        version = open_version(place)
        folder = version.folder
        weights = folder / WEIGHTS
        sha256 = file_digest(weights)
        place = f"models:/{version.name}/{version.version}"
    else:
        folder = Path(place).expanduser()
        found, _ = read_folder(folder) if folder.is_dir() else ([], [])
        if not found:
            raise CheckpointError(
                f"init_from = {place}: has no checkpoint; give a folder that svend import wrote, "
                "or models:/NAME@ALIAS"
            )
        verify(found[-1])
        weights, sha256 = found[-1].path / MODEL, found[-1].weights_sha256
    tree = read_yaml(folder / CONFIG)
    training = tree.get("training") or {}
    keys = ["parametrisation"]
    if training.get("parametrisation") == Parametrisation.COMPLETEP.value:
        keys += ["base_width", "base_depth", "base_head_size"]
    base = {key: training[key] for key in keys if key in training}
    return StartingPoint(place, weights, sha256, tree["model"], folder / TOKENIZER, base)
