"""A model of the user's: what makes it, and what is tried of it before a step is spent on it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from svend.data.stream import Batch
from svend.device import autocast, resolve_precision, to_device
from svend.errors import ConfigError, UserError, one_line
from svend.evaluation.benchmarks import PERPLEXITY
from svend.models.transformer import ReasoningTransformer
from svend.own_code import load_function, source_file
from svend.pipeline.config import (
    Compile,
    ModelScale,
    PipelineConfig,
    Precision,
    TrainingConfig,
    get_model_config,
)
from svend.planning.plan import is_out_of_memory

ModelFactory = Callable[[ModelScale], nn.Module]

# The factory's file, as the run folder and the run's artifacts keep it.
FACTORY_FILE = "model_factory.py"
# Of the summed loss: products in bf16 add up to another sum than their parts.
SUM_TOLERANCE = 0.02


def find_model_factory(
    config: PipelineConfig, given: ModelFactory | None = None
) -> ModelFactory | None:
    """Return what makes the model in place of the scale's: the function given, or the config's.

    Raises ConfigError where there are both, or the config's cannot be imported.
    """
    if config.model_factory is None:
        return given
    if given is not None:
        raise ConfigError(
            f"model_factory = {config.model_factory}: a function is given too; leave out one"
        )
    return load_function(config.model_factory, "model_factory")


def factory_source(config: PipelineConfig) -> str | None:
    """Return the text of the file that the config's factory is in; None where it has none."""
    path = None if config.model_factory is None else source_file(config.model_factory)
    return None if path is None else path.read_text(encoding="utf-8")


def source_digest(source: str | None) -> str:
    """Return the SHA-256 of a factory's file, or an empty text for none."""
    return "" if source is None else hashlib.sha256(source.encode()).hexdigest()


def make_model(
    factory: ModelFactory, config: PipelineConfig, *, on_meta: bool = False
) -> nn.Module:
    """Return the factory's model. On the meta device nothing is allocated, or has a value.

    Raises ConfigError, with the line of the user's, where it fails or returns no module to train.
    """
    told = Told.of(factory)
    try:
        # Where weights are drawn is left to the factory, but for counting them.
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            model = factory(config.training.model_scale)
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise told.refusal(
            f"fails{told.failure(error)}" + (
                "; it is called on the meta device first, to count without allocating, where "
                "tensors have no values: compute constants in plain Python, or inside "
                "`with torch.device('cpu')`" if on_meta else ""
            )
        ) from error
    if not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise told.refusal(f"returned {kind}, no torch.nn.Module; return the model that it made")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise told.refusal(f"returned a {type(model).__name__} without a parameter to train")
    if not isinstance(model, ReasoningTransformer):
        _check_settings(model, config.training)
    return model


def describe_model(model: nn.Module, factory: ModelFactory, config: PipelineConfig) -> str:
    """Return, for the plan, what the model is, who made it, and what is otherwise with it."""
    name = config.model_factory or Told.of(factory).name
    made = f"{type(model).__name__}, made by {name}"
    if isinstance(model, ReasoningTransformer):
        return made
    asked = [name for name in config.eval_benchmarks if name != PERPLEXITY]
    told = f"; not measured on it: {', '.join(asked)}" if asked else ""
    return f"{made}; memory and FLOPs as of a transformer with as many parameters{told}"


def own_model_name(model: nn.Module, config: PipelineConfig) -> str:
    """Return the name in the registry, which is never that of a scale.

    It is `model.config.name`, else the configuration's model.name, else made of the scale's.
    """
    assert config.model is not None  # set by PipelineConfig.resolve
    scales = {get_model_config(scale).name for scale in ModelScale}
    own = getattr(getattr(model, "config", None), "name", None)
    for name in (own, config.model.name):
        if isinstance(name, str) and name not in scales:
            if not name.strip() or set(name) & set("/:@"):
                raise ConfigError(
                    f"model_factory: the model's config.name is {name!r}; give it a name without "
                    "/, : and @, for the registry"
                )
            return name
    return f"custom-{config.training.model_scale.value}"


def check_model(
    model: nn.Module, factory: ModelFactory, config: PipelineConfig, device: torch.device,
    vocabulary: int,
) -> None:
    """Try what the training loop asks of a model, on one sequence; nothing of the model changes.

    vocabulary: token ids are below it, as those of the tokenizer's so many entries.
    Raises ConfigError, in one line, for what is not as it must be.
    """
    told, kind = Told.of(factory, model), type(model).__name__
    batch = _batch_to_try(vocabulary, config.training)
    odd_T = torch.arange(batch.labels_BT.shape[1]) % 2 == 1
    precision = resolve_precision(config.training.precision, device)
    was_training = model.training
    model.eval()
    try:
        whole = _loss_of(model, batch, batch.labels_BT, precision, device)
        _check_loss(whole, told, kind, batch)
        with torch.no_grad():
            parts = [
                float(_loss_of(model, batch, batch.labels_BT.masked_fill(hidden_T, -100),
                               precision, device))
                for hidden_T in (odd_T, ~odd_T)
            ]
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise told.refusal(
            f"{kind} fails on token ids up to {vocabulary - 1} (the tokenizer's, of at most "
            f"model.vocab_size) at {batch.tokens_BT.shape[1]} positions (data.max_seq_length)"
            f"{told.failure(error)}; it is called as model(tokens, labels, documents)"
        ) from error
    finally:
        model.train(was_training)
    total = float(whole.detach())
    if not math.isclose(total, sum(parts), rel_tol=SUM_TOLERANCE):
        raise told.refusal(
            f"{kind} must return the loss summed over the labels that are not negative: all labels "
            f"give {total:.6g}, one half and the other {parts[0]:.6g} and {parts[1]:.6g}; use "
            "cross_entropy(..., ignore_index=-100, reduction='sum')"
        )


def _check_settings(model: nn.Module, training: TrainingConfig) -> None:
    """Raise ConfigError for a setting that only Svend's own transformer has."""
    for key, is_set, instead in (
        ("gradient_checkpointing", training.gradient_checkpointing,
         "call torch.utils.checkpoint in its forward"),
        ("float8", training.float8, "convert its layers in the factory"),
        ("compile", training.compile is Compile.ON, "compile it in the factory"),
    ):
        if is_set:
            value = getattr(training, key)
            raise ConfigError(
                f"training.{key} = {getattr(value, 'value', 'true')}: is done to the blocks of "
                f"Svend's own transformer, and the factory's model is a {type(model).__name__}; "
                f"leave it out, or {instead}"
            )


def _batch_to_try(vocabulary: int, training: TrainingConfig) -> Batch:
    """Return one sequence of two documents, as long as they come, with the largest token id."""
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(vocabulary, (1, length), generator=generator)
    tokens_BT[0, 0] = vocabulary - 1
    return Batch.of(tokens_BT, (torch.arange(length)[None] >= length // 2).long())


def _loss_of(
    model: nn.Module, batch: Batch, labels_BT: Tensor, precision: Precision, device: torch.device
) -> Tensor:
    with autocast(precision, device):
        loss: Tensor = model(
            to_device(batch.tokens_BT, device), to_device(labels_BT, device), batch.documents_BT
        )
    return loss


def _check_loss(loss: Tensor, told: Told, kind: str, batch: Batch) -> None:
    if not isinstance(loss, Tensor):
        raise told.refusal(f"{kind} returned {type(loss).__name__}, not the summed loss, a tensor")
    if loss.dim() or not loss.is_floating_point():
        raise told.refusal(
            f"{kind} returned {loss.dtype} of shape {tuple(loss.shape)} for tokens of shape "
            f"{tuple(batch.tokens_BT.shape)}, not the summed loss, one number"
        )
    if not bool(torch.isfinite(loss)):
        raise told.refusal(
            f"{kind} has the loss {float(loss.detach())} before its first step; look at how its "
            "weights are drawn, or set training.precision=fp32"
        )
    if not loss.requires_grad:
        raise told.refusal(
            f"{kind} returned a loss that no weight can learn from: it is detached, or made under "
            "no_grad"
        )


@dataclass(frozen=True)
class Told:
    """How a factory is named in a refusal, and which file is the user's."""

    name: str
    files: frozenset[str]

    @classmethod
    def of(cls, factory: ModelFactory, model: nn.Module | None = None) -> Told:
        files = set()
        for thing in (factory, type(model)):
            try:
                files.add(inspect.getfile(thing))
            except (TypeError, OSError):  # a partial, or what was typed into an interpreter
                continue
        return cls(getattr(factory, "__qualname__", type(factory).__name__), frozenset(files))

    def refusal(self, text: str) -> ConfigError:
        return ConfigError(f"model_factory {self.name}: {text}")

    def failure(self, error: Exception) -> str:
        """Say what went wrong, and in which line of the user's."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)
                  if frame.filename in self.files]
        place = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f" ({type(error).__name__}: {one_line(error)[:200]}{place})"
