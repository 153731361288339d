"""What a low-memory recipe costs in loss: each is trained beside AdamW in fp32.

All recipes train the same model from the same seed on the same batches, by the project's own loop;
what counts is the held-out loss at the end, and how it differs from that of fp32 at the same seed.
How much two seeds of fp32 differ says what such a difference is worth. Results are written as they
come, so that an interrupted experiment goes on.

Products are in fp32, with bf16 weights widened for them: on a CPU that does not multiply in bf16
they would take many times as long, and what is measured is how states are kept.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from svend.bench.figures import begin_figure, write_figure
from svend.bench.results import read_results, write_results
from svend.data.corpus import Corpus
from svend.data.stream import BatchStream, PackedSequences
from svend.device import keep_freed_memory
from svend.evaluation.heldout import measure_heldout_loss
from svend.models.config import TransformerConfig
from svend.models.shards import local
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import (
    Compile,
    DataConfig,
    ModelConfig,
    MomentPrecision,
    Precision,
    TrainingConfig,
    WeightPrecision,
)
from svend.training.loop import train_steps
from svend.training.low_memory import plain_tensors
from svend.training.state import TrainState, build_state

Report = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """The precision of weights and of moments: fp32-int8 is weights in fp32, moments in int8."""

    weights: WeightPrecision
    moments: MomentPrecision

    @property
    def name(self) -> str:
        return f"{self.weights.value}-{self.moments.value}"


RECIPES = {
    recipe.name: recipe
    for recipe in (Recipe(w, m) for w in WeightPrecision for m in MomentPrecision)
}
BASELINE = "fp32-fp32"
DOCUMENTS = 4000  # of each embedded source
HELDOUT_SEQUENCES = 64


@dataclass(frozen=True)
class Setting:
    """What all runs share; `data` is the fingerprint of the corpus."""

    scale: str
    hidden_size: int
    layers: int
    vocabulary: int
    steps: int
    batch_size: int
    length: int
    learning_rate: float
    data: str


@dataclass(frozen=True)
class Result:
    """What a run came to: held-out loss in nats per token (None: not finite), and what it held.

    weight_bytes, gradient_bytes, moment_bytes: per parameter, as measured on the tensors.
    step_seconds: the median over steps.
    """

    recipe: str
    seed: int
    loss: float | None
    weight_bytes: float
    gradient_bytes: float
    moment_bytes: float
    step_seconds: float

    @property
    def state_bytes(self) -> float:
        return self.weight_bytes + self.gradient_bytes + self.moment_bytes


class Widened(nn.Module):
    """A model that computes in fp32 from weights that are kept in bf16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor | None) -> Tensor:
        wide = {name: p.float() for name, p in self.model.named_parameters()}
        out: Tensor = functional_call(self.model, wide, inputs)
        return out


def data_config(path: Path | None, length: int, cache_dir: str) -> DataConfig:
    """Return what is trained on: the embedded problems, or a file's documents."""
    config = DataConfig(max_seq_length=length, num_samples=DOCUMENTS, cache_dir=cache_dir)
    if path is None:
        return config
    return replace(config, sources=["text"], mix_ratios={"general": 1.0}, path=str(path))


def run_experiment(
    setting: Setting, model: ModelConfig, data: DataConfig, corpus: Corpus,
    recipes: Sequence[str], seeds: int, results_file: Path | None, report: Report,
    *, compiled: bool,
) -> list[Result]:
    """Train each recipe from each seed; those in the file are not run again.

    Raises UserError if the file is of another setting.
    """
    known = {} if results_file is None else known_results(results_file, setting)
    keep_freed_memory()
    cases = [(recipe, seed) for seed in range(seeds) for recipe in recipes]
    # First what all others are held against.
    for recipe, seed in sorted(cases, key=lambda case: case[0] != BASELINE):
        if (recipe, seed) in known:
            continue
        result = train_recipe(setting, model, data, corpus, recipe, seed, compiled=compiled)
        known[recipe, seed] = result
        if results_file is not None:
            write_results(results_file, setting, known.values())
        told = "not finite" if result.loss is None else f"{result.loss:.4f}"
        report(f"{recipe}, seed {seed}: held-out loss {told}, {result.step_seconds:.1f} s a step")
    return [known[recipe, seed] for recipe in recipes for seed in range(seeds)]


def train_recipe(
    setting: Setting, model_config: ModelConfig, data: DataConfig, corpus: Corpus, name: str,
    seed: int, *, compiled: bool,
) -> Result:
    """Train one model by a recipe and measure it, on the CPU."""
    recipe, cpu = RECIPES[name], torch.device("cpu")
    training = TrainingConfig(
        seed=seed, learning_rate=setting.learning_rate, batch_size=setting.batch_size,
        gradient_accumulation_steps=1, precision=Precision.BF16, weight_precision=recipe.weights,
        moment_precision=recipe.moments, compile=Compile.AUTO if compiled else Compile.OFF,
        data=data,
    )
    model = ReasoningTransformer(
        TransformerConfig.of_run(model_config, training)
    )
    model.initialize(seed)
    stream = BatchStream(PackedSequences(corpus.train, data, seed), setting.batch_size)
    state = build_state(model, stream, training, setting.steps, cpu)
    state.forward = Widened(model)
    gradient_bytes = dict.fromkeys(model.parameters(), 0)

    def note_gradient(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        gradient_bytes[parameter] = parameter.grad.nbytes

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            note_gradient
        )
    ended_seconds, step_seconds = time.perf_counter(), []
    for _ in train_steps(state, replace(training, precision=Precision.FP32), setting.steps):
        began_seconds, ended_seconds = ended_seconds, time.perf_counter()
        step_seconds.append(ended_seconds - began_seconds)
    heldout = PackedSequences(corpus.heldout, data, 0).first(HELDOUT_SEQUENCES)
    loss = measure_heldout_loss(state.forward, heldout, Precision.FP32, cpu).loss
    parameters = sum(p.numel() for p in model.parameters())
    return Result(
        name, seed, loss if math.isfinite(loss) else None,
        sum(p.nbytes for p in model.parameters()) / parameters,
        sum(gradient_bytes.values()) / parameters, moment_bytes(state) / parameters,
        statistics.median(step_seconds),
    )


def moment_bytes(state: TrainState) -> int:
    """Return the bytes that the optimizer's states take in this process."""
    return sum(
        local(tensor).nbytes
        for parameter, states in state.optimizer.state.items()
        for tensor in plain_tensors(parameter, states).values()
    )


def known_results(file: Path, setting: Setting) -> dict[tuple[str, int], Result]:
    """Return the results in a file by recipe and seed; none where there is no file."""
    results = read_results(file, setting, "bench recipes", lambda run: Result(**run))
    return {(result.recipe, result.seed): result for result in results}


def differences(results: Sequence[Result]) -> dict[str, list[float]]:
    """Return by recipe how far its loss is above that of fp32, seed by seed."""
    base = {result.seed: result.loss for result in results if result.recipe == BASELINE}
    found: dict[str, list[float]] = {}
    for result in results:
        reference = base[result.seed]
        known = result.loss is not None and reference is not None
        found.setdefault(result.recipe, []).append(
            result.loss - reference if known else math.inf  # type: ignore[operator]
        )
    return found


def noise(results: Sequence[Result]) -> float | None:
    """Return the mean difference between two seeds of fp32, None where there are no two."""
    losses = [r.loss for r in results if r.recipe == BASELINE and r.loss is not None]
    apart = [abs(a - b) for i, a in enumerate(losses) for b in losses[:i]]
    return statistics.fmean(apart) if apart else None


def recipe_table(setting: Setting, results: Sequence[Result]) -> Table:
    """Return bytes per parameter, loss, and difference to fp32 of each recipe."""
    between_seeds = noise(results)
    told = "one seed: noise not known" if between_seeds is None else (
        f"two seeds of {BASELINE} differ by {between_seeds:.4f}"
    )
    table = Table(
        title=f"{setting.scale}, {setting.steps} steps of {setting.batch_size}x{setting.length}: "
              f"held-out loss, nats per token ({told})",
        title_justify="left",
    )
    table.add_column("weights-moments", no_wrap=True)
    for column in ("weights", "gradients", "moments", "bytes/parameter", "loss",
                   f"above {BASELINE}", "s/step"):
        table.add_column(column, justify="right", overflow="fold")
    for name, apart in differences(results).items():
        own = [result for result in results if result.recipe == name]
        losses = [math.inf if result.loss is None else result.loss for result in own]
        spread = "" if len(apart) == 1 else f" ({min(apart):+.4f} to {max(apart):+.4f})"
        table.add_row(
            name, *(f"{size:.2f}" for size in (
                own[0].weight_bytes, own[0].gradient_bytes, own[0].moment_bytes, own[0].state_bytes,
            )),
            f"{statistics.fmean(losses):.4f}",
            "" if name == BASELINE else f"{statistics.fmean(apart):+.4f}{spread}",
            f"{statistics.fmean(result.step_seconds for result in own):.2f}",
        )
    return table


def plot_recipes(results: Sequence[Result], path: Path) -> None:
    """Draw the difference to fp32 against bytes per parameter, the noise as a band."""
    figure, axes = begin_figure((6, 4))
    axis = axes[0][0]
    between_seeds = noise(results)
    if between_seeds is not None:
        axis.axhspan(-between_seeds, between_seeds, alpha=0.2, label="two seeds of fp32")
        axis.legend(fontsize=8)
    for name, apart in differences(results).items():
        size = next(result.state_bytes for result in results if result.recipe == name)
        axis.plot([size] * len(apart), apart, "o", markersize=4)
        axis.annotate(name, (size, apart[0]), fontsize=8, textcoords="offset points", xytext=(4, 4))
    axis.set_xlabel("bytes of weights, gradients and moments per parameter")
    axis.set_ylabel("held-out loss above fp32")
    write_figure(figure, path)
