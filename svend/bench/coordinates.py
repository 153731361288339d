"""The coordinate check (Yang et al. 2022, arXiv 2203.03466, appendix D.1).

Small models of growing width or depth are trained for a few steps at one learning rate. Where the
parametrisation is right their activations keep their size; a rule that is missing shows as a slope
of log2 mean |x| against log2 of width or depth.

It sees what changes the size of activations. It cannot see attention's scale, weight decay and
epsilon, which change them little in a few steps: tests hold their values.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from svend.bench.figures import begin_figure, write_figure
from svend.models.config import BaseShape, TransformerConfig
from svend.models.parametrisation import Rule, scaling_rules, without
from svend.models.transformer import Attention, Block, FeedForward, ReasoningTransformer
from svend.pipeline.config import Optimizer, Parametrisation, TrainingConfig
from svend.training.optimizers import build_optimizer

LOWEST_SLOPE, HIGHEST_SLOPE = -0.5, 0.25
HEAD_SIZE = 16
FEED_FORWARD = 3  # times the width
# A matrix of 64 by 64 passes on as much of its input with it as one of 256 by 256 with 0.02.
INIT_STD = 0.04
VOCABULARY = 64
SUCCESSORS = 4  # tokens that may follow each token of the text
BATCH, LENGTH = 4, 32
ATTENTION, FEED_FORWARD_OUT, RESIDUAL, LOGITS = "attention", "feed-forward", "residual", "logits"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is checked, and how; `removed` is a rule that is left out."""

    optimizer: Optimizer
    parametrisation: Parametrisation
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    steps: int
    seeds: int
    learning_rate: float
    removed: Rule | None = None

    def shapes(self) -> list[tuple[str, int, int]]:
        """Return what is varied, width and depth of each model; the firsts are the base."""
        return [("width", width, self.depths[0]) for width in self.widths] + [
            ("depth", self.widths[0], depth) for depth in self.depths
        ]


@dataclass(frozen=True)
class Point:
    """Mean |x| after the last step, by what x is, as a geometric mean over seeds.

    The outputs of attention and feed-forward are means over blocks, before the residual multiplier;
    the residual stream is that after the last block.
    """

    varied: str
    width: int
    depth: int
    scales: dict[str, float]

    @property
    def size(self) -> int:
        return self.width if self.varied == "width" else self.depth


@dataclass(frozen=True)
class Slope:
    """The slope of log2 mean |x| against log2 of width or depth, by least squares."""

    varied: str
    activation: str
    value: float

    @property
    def flat(self) -> bool:
        return LOWEST_SLOPE <= self.value <= HIGHEST_SLOPE  # false for NaN, too


def measure_coordinates(check: Check, report: Callable[[str], None]) -> list[Point]:
    """Train every model from every seed, and return the sizes of its activations."""
    points = []
    for varied, width, depth in check.shapes():
        report(f"{varied}: {width} wide, {depth} deep")
        by_seed = [_measure(check, width, depth, seed) for seed in range(check.seeds)]
        scales = {
            name: statistics.geometric_mean(scales[name] for scales in by_seed)
            if all(scales[name] > 0 for scales in by_seed) else float("nan")
            for name in by_seed[0]
        }
        points.append(Point(varied, width, depth, scales))
    return points


def slopes_of(points: Sequence[Point]) -> list[Slope]:
    """Return the slope of each activation against width and against depth."""
    slopes = []
    for varied in ("width", "depth"):
        family = [point for point in points if point.varied == varied]
        if len(family) > 1:
            sizes = np.log2([point.size for point in family])
            for name in family[0].scales:
                logs = np.log2([point.scales[name] for point in family])
                finite = bool(np.isfinite(logs).all())
                value = float(np.polyfit(sizes, logs, 1)[0]) if finite else float("nan")
                slopes.append(Slope(varied, name, value))
    return slopes


def _measure(check: Check, width: int, depth: int, seed: int) -> dict[str, float]:
    training = TrainingConfig(
        optimizer=check.optimizer, parametrisation=check.parametrisation,
        learning_rate=check.learning_rate, base_width=check.widths[0],
        base_depth=check.depths[0], base_head_size=HEAD_SIZE,
    )
    heads = width // HEAD_SIZE
    config = TransformerConfig(
        name="coordinates", hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2), intermediate_size=FEED_FORWARD * width,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, base=BaseShape.of(training),
        initializer_range=INIT_STD,
    )
    rules = scaling_rules(config)
    model = ReasoningTransformer(config, without(rules, check.removed) if check.removed else rules)
    model.initialize(seed)
    optimizer = build_optimizer(model, training)
    tokens_BT, labels_BT = _text(seed)
    for _ in range(check.steps):
        optimizer.zero_grad(set_to_none=True)
        (model(tokens_BT, labels_BT) / labels_BT.numel()).backward()
        optimizer.step()
    return activation_scales(model, tokens_BT)


@torch.no_grad()
def activation_scales(model: ReasoningTransformer, tokens_BT: Tensor) -> dict[str, float]:
    """Return mean |x| of the activations that the check looks at, for these tokens."""
    sums: dict[str, list[float]] = {ATTENTION: [], FEED_FORWARD_OUT: [], RESIDUAL: []}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            sums[name].append(float(out.abs().mean()))

        return hook

    kinds = {Attention: ATTENTION, FeedForward: FEED_FORWARD_OUT, Block: RESIDUAL}
    handles = [
        module.register_forward_hook(record(kinds[type(module)]))
        for module in model.modules() if type(module) in kinds
    ]
    logits_BTV = model(tokens_BT)
    for handle in handles:
        handle.remove()
    return {
        ATTENTION: statistics.fmean(sums[ATTENTION]),
        FEED_FORWARD_OUT: statistics.fmean(sums[FEED_FORWARD_OUT]),
        RESIDUAL: sums[RESIDUAL][-1],
        LOGITS: float(logits_BTV.abs().mean()),
    }


def _text(seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens and the next of each, (batch, positions), of a text with a grammar."""
    generator = np.random.default_rng(seed)
    successors = generator.integers(0, VOCABULARY, (VOCABULARY, SUCCESSORS))
    text_BT = np.empty((BATCH, LENGTH + 1), dtype=np.int64)
    text_BT[:, 0] = generator.integers(0, VOCABULARY, BATCH)
    for place in range(LENGTH):
        chosen_B = generator.integers(0, SUCCESSORS, BATCH)
        text_BT[:, place + 1] = successors[text_BT[:, place], chosen_B]
    text = torch.from_numpy(text_BT)
    return text[:, :-1], text[:, 1:]


def coordinate_table(points: Sequence[Point], slopes: Sequence[Slope]) -> Table:
    """Return the sizes of the activations, and below each family its slopes."""
    table = Table(title="Mean |x| after the last step", title_justify="left")
    names = list(points[0].scales)
    for heading in ("varied", "width", "depth", *names):
        table.add_column(
            heading, justify="left" if heading == "varied" else "right", overflow="fold"
        )
    for varied in ("width", "depth"):
        for point in (p for p in points if p.varied == varied):
            table.add_row(varied, str(point.width), str(point.depth),
                          *(f"{point.scales[name]:.4g}" for name in names))
        own = [slope for slope in slopes if slope.varied == varied]
        if own:
            table.add_row("slope", "", "", *(
                f"{slope.value:+.2f}" if slope.flat else f"[bold red]{slope.value:+.2f} FAIL[/]"
                for slope in own
            ), end_section=True)
    return table


def plot_coordinates(points: Sequence[Point], path: Path) -> None:
    """Draw the sizes of the activations against width and against depth."""
    figure, axes = begin_figure((8, 3.4), columns=2, sharey=True)
    for axis, varied in zip(axes[0], ("width", "depth"), strict=True):
        family = [point for point in points if point.varied == varied]
        for name in points[0].scales:
            axis.plot([p.size for p in family], [p.scales[name] for p in family], "o-", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel(varied)
    axes[0][0].set_ylabel("mean |x|")
    axes[0][1].legend(fontsize=8)
    write_figure(figure, path)


def to_json(check: Check, points: Sequence[Point], slopes: Sequence[Slope]) -> str:
    """Return the setting and all figures as JSON."""
    setting = {name: getattr(value, "value", value) for name, value in asdict(check).items()}
    told = [{**asdict(slope), "flat": slope.flat} for slope in slopes]
    figures = {"check": setting, "points": [asdict(p) for p in points], "slopes": told}
    return json.dumps(figures, indent=1)
