"""What a sweep found, in a file, and what it becomes at another width, depth, batch and horizon.

Width and depth are the parametrisation's: under CompleteP the values stay and each group of
parameters has its factor. Batch B and tokens D are rules of thumb, whose exponents stand in
`conf/config.yaml` under `carry`: the rate goes with sqrt(B) and with D^-0.3 (2603.28743 has about
-0.32 for AdamW), and the decay so that B / (rate x decay x D), the share of a run over which AdamW
averages its updates (Wang and Aitchison 2024, arXiv 2405.13698), stays the same; beta2 so that it
averages over as many tokens.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svend.errors import ConfigError
from svend.pipeline.config import Optimizer, Parametrisation, PipelineConfig, TrainingConfig
from svend.pipeline.loading import names_code, value_at
from svend.pipeline.schema import build, read_yaml, to_tree, to_yaml
from svend.tracking.runs import fetch_artifact, newest_run

HYPERPARAMETERS = "hparams.yaml"
SMALLEST_BETA2, LARGEST_BETA2 = 0.9, 0.9999


@dataclass(kw_only=True)
class FoundAt:
    """The run that the values are best for, as far as it matters for carrying them elsewhere."""

    optimizer: Optimizer
    parametrisation: Parametrisation
    base_width: int
    base_depth: int
    base_head_size: int
    hidden_size: int
    num_hidden_layers: int
    tokens_per_step: int
    tokens: int

    @classmethod
    def of(cls, config: PipelineConfig, steps: int) -> FoundAt:
        """Return what a run of so many steps is."""
        training, model = config.training, config.model
        assert model is not None  # set by PipelineConfig.resolve
        tokens_per_step = _tokens_per_step(training)
        return cls(
            optimizer=training.optimizer, parametrisation=training.parametrisation,
            base_width=training.base_width, base_depth=training.base_depth,
            base_head_size=training.base_head_size, hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers, tokens_per_step=tokens_per_step,
            tokens=steps * tokens_per_step,
        )


@dataclass(kw_only=True)
class Hyperparameters:
    """A sweep's result: values by config key, where they were found, and where they come from."""

    values: dict[str, Any]
    found_at: FoundAt
    promotable: bool
    why: list[str] = field(default_factory=list)
    study: str
    sweep_run_id: str
    git_commit: str
    recipe: str
    data_fingerprint: str

    def settings(self) -> list[tuple[str, str]]:
        """Return the values, and the parametrisation that they hold under, as overrides."""
        at = self.found_at
        told = {
            "training.optimizer": at.optimizer.value,
            "training.parametrisation": at.parametrisation.value,
            "training.base_width": at.base_width, "training.base_depth": at.base_depth,
            "training.base_head_size": at.base_head_size,
            **self.values,
        }
        return [(key, "null" if value is None else str(value)) for key, value in told.items()]

    def to_yaml(self) -> str:
        return to_yaml(self)


@dataclass(frozen=True)
class Carried:
    """One value: what it was where it was found, what it is here, and why."""

    key: str
    found: Any
    here: Any
    why: str


def read_hyperparameters(path: Path) -> Hyperparameters:
    """Read a sweep's file. Raises ConfigError, in one line, for what is no such file."""
    found = build(Hyperparameters, read_yaml(path), prefix=f"{path.name}: ")
    for key in found.values:
        if names_code(key):
            raise ConfigError(
                f"{path.name}: values.{key}: names code to run, which no sweep finds; set it by "
                "hand, or leave it out"
            )
    return found


def locate_hyperparameters(place: str, recipe: str) -> str:
    """Return the address of a result: a file or artifact is one, a sweep's name is looked up.

    By name it is the newest promotable result on this data recipe. Raises ConfigError if there is
    none.
    """
    if ":/" in place or place.endswith((".yaml", ".yml")):
        return place
    run_id = newest_run(
        {"svend.sweep": place, "svend.promotable": "true", "svend.recipe": recipe}
    )
    if run_id is None:
        raise ConfigError(
            f"hparams = {place}: no sweep of that name has a promotable result on the data recipe "
            f"{recipe}; give runs:/ID/{HYPERPARAMETERS}, or run svend sweep"
        )
    return f"runs:/{run_id}/{HYPERPARAMETERS}"


def fetch_hyperparameters(address: str) -> Hyperparameters:
    """Return what a file or an artifact (runs:/ID/hparams.yaml) holds.

    Raises ConfigError if it holds no result, or one that may not be carried upward.
    """
    if ":/" in address:
        with tempfile.TemporaryDirectory() as folder:
            found = read_hyperparameters(fetch_artifact(address, Path(folder)))
    else:
        found = read_hyperparameters(Path(address).expanduser())
    if not found.promotable:
        raise ConfigError(
            f"hparams = {address}: not promotable ({'; '.join(found.why) or 'not confirmed'}); run "
            "a sweep that is, or set the values that you trust by hand"
        )
    return found


def carry(
    found: Hyperparameters, config: PipelineConfig, total_steps: int
) -> tuple[TrainingConfig, list[Carried]]:
    """Return the training settings with what was found, as it is at this run's size, and why.

    A value that differs from the one found was set by hand, and stays. Raises ConfigError where
    the values hold at no other shape.
    """
    training, at = config.training, found.found_at
    here = FoundAt.of(config, total_steps)
    _check_shape(at, here)
    batch, horizon = here.tokens_per_step / at.tokens_per_step, here.tokens / at.tokens
    rules = config.carry
    rows = []
    for key, value in found.values.items():
        section, _, name = key.rpartition(".")
        now = value_at(config, key)
        if now != value:
            rows.append(Carried(key, value, now, "set by hand"))
            continue
        why = "as it was found"
        if section == "training" and name in ("learning_rate", "weight_decay"):
            of_batch, of_tokens = (
                (rules.learning_rate_by_batch, rules.learning_rate_by_tokens)
                if name == "learning_rate"
                else (rules.weight_decay_by_batch, rules.weight_decay_by_tokens)
            )
            now = value * batch**of_batch * horizon**of_tokens
            why = (f"{batch:.3g} times the batch to the power {of_batch:g}, {horizon:.3g} times "
                   f"the tokens to {of_tokens:g}")
        elif key == "training.adam_beta2":
            now = min(max(value**batch, min(value, SMALLEST_BETA2)), LARGEST_BETA2)
            why = f"to the power of {batch:.3g} times the batch, within bounds"
        if section == "training" and now != value:
            training = dataclasses.replace(training, **{name: now})
        rows.append(Carried(key, value, now, why))
    if rows and all(row.why == "set by hand" for row in rows):
        raise ConfigError(
            "hparams: none of its values is in the configuration, in which they are laid below "
            "what is set by hand: load_config(groups, [*found.settings(), *overrides])"
        )
    rows += _of_parametrisation(at, here)
    return training, rows


def _check_shape(at: FoundAt, here: FoundAt) -> None:
    for name in ("optimizer", "parametrisation", "base_width", "base_depth", "base_head_size"):
        if getattr(at, name) != getattr(here, name):
            raise ConfigError(
                f"training.{name} = {to_tree(getattr(here, name))}: the hyperparameters were found "
                f"with {to_tree(getattr(at, name))}; leave it as it was, or leave out hparams"
            )
    same = (at.hidden_size, at.num_hidden_layers) == (here.hidden_size, here.num_hidden_layers)
    if at.parametrisation is Parametrisation.STANDARD and not same:
        raise ConfigError(
            f"hparams: found at width {at.hidden_size} and {at.num_hidden_layers} layers under the "
            f"standard parametrisation, which holds at no other shape, such as "
            f"{here.hidden_size} and {here.num_hidden_layers}; sweep with "
            "training.parametrisation=completep"
        )


def _of_parametrisation(at: FoundAt, here: FoundAt) -> list[Carried]:
    """Say what width and depth do: the factors are the model's, not the configuration's."""
    if at.parametrisation is Parametrisation.STANDARD:
        return []
    return [
        Carried("width", at.hidden_size, here.hidden_size,
                f"{at.parametrisation.value}: the rates of hidden matrices follow, from base "
                f"{at.base_width}"),
        Carried("depth", at.num_hidden_layers, here.num_hidden_layers,
                f"{at.parametrisation.value}: the residual multiplier follows, from base "
                f"{at.base_depth}"),
    ]


def _tokens_per_step(training: TrainingConfig) -> int:
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    return training.batch_size * training.gradient_accumulation_steps * length
