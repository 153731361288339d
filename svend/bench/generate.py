"""Decoding, timed beside Hugging Face's `generate` with the same weights, in turn."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from svend.bench.figures import begin_figure, write_figure
from svend.models.config import TransformerConfig
from svend.models.generation import Decoder, PlainTurn, Request
from svend.models.huggingface import export_to_huggingface
from svend.models.quantization import measure_quantization_loss
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import ModelScale, Precision, get_model_config
from svend.pipeline.version_evaluation import heldout_texts, load_version
from svend.pipeline.version_files import answering_model

Report = Callable[[str], None]
OURS, OURS_INT8 = "svend bf16", "svend int8"
PEERS = {"hf bf16": torch.bfloat16, "hf fp32": torch.float32}
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128
RAGGED_LANES = 32
HELDOUT_TEXTS = 64


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens are wanted after each; `lanes` are answered at a time."""

    name: str
    lanes: int
    prompts: list[list[int]]
    answer_tokens: list[int]

    @property
    def useful_tokens(self) -> int:
        return sum(self.answer_tokens)


@dataclass
class Timing:
    """One contestant at one workload: useful tokens a second, in each round."""

    contestant: str
    tokens_per_second: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)


@dataclass
class Comparison:
    """All contestants at one workload; the first is ours."""

    workload: str
    useful_tokens: int
    timings: list[Timing]

    def ratio(self, of: Timing, to: Timing) -> float:
        """Return the median over rounds of how many times as fast one is."""
        pairs = zip(of.tokens_per_second, to.tokens_per_second, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def load_model(
    scale: ModelScale, model_uri: str | None, report: Report
) -> tuple[ReasoningTransformer, list[list[int]]]:
    """Return a version's model with held-out texts, or a scale's with random weights and none."""
    if model_uri is not None:
        loaded = load_version(model_uri)
        model = answering_model(loaded.model, "bench generate")
        return model, heldout_texts(loaded, HELDOUT_TEXTS, report)
    torch.manual_seed(0)
    config = TransformerConfig.from_model_config(get_model_config(scale))
    return ReasoningTransformer(config).eval(), []


def describe_quantization(model: ReasoningTransformer, texts: list[list[int]]) -> str:
    """Return what int8 costs in accuracy on the texts, in a line."""
    if not texts:
        return "int8: its loss of accuracy is not measured on random weights; give --model"
    measured = measure_quantization_loss(model, texts, Precision.BF16)
    return (
        f"int8: held-out loss {measured.int8_loss:.4f} against {measured.loss:.4f} in bf16 "
        f"({measured.difference:+.4f}, standard error {measured.standard_error:.4f}); the same "
        f"likeliest token at {measured.equal_greedy:.2%} of {measured.tokens:,} places"
    )


def make_workloads(vocab_size: int, ragged_prompts: int, seed: int = 0) -> list[Workload]:
    """Return one prompt, eight, and many of mixed lengths with answers of mixed lengths."""
    rng = np.random.default_rng(seed)

    def prompt(length: int) -> list[int]:
        drawn: list[int] = rng.integers(0, vocab_size, length).tolist()
        return drawn

    def even(count: int) -> Workload:
        prompts = [prompt(PROMPT_TOKENS) for _ in range(count)]
        return Workload(f"batch {count}", count, prompts, [ANSWER_TOKENS] * count)

    lengths = rng.integers(8, 2 * PROMPT_TOKENS + 1, ragged_prompts)
    # Most answers are short and some long, as they are.
    answers = np.clip(rng.exponential(ANSWER_TOKENS / 3, ragged_prompts), 4, ANSWER_TOKENS)
    ragged = Workload(
        f"{ragged_prompts} ragged", RAGGED_LANES, [prompt(int(n)) for n in lengths],
        [int(n) for n in answers],
    )
    return [even(1), even(8), ragged]


def compare(
    model: ReasoningTransformer, workloads: Sequence[Workload], peers: Sequence[str], rounds: int,
    report: Report,
) -> list[Comparison]:
    """Time every contestant `rounds` times at each workload, in turn.

    int8 is timed at one lane, which it is for.
    """
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        export_to_huggingface(model, None, Path(folder))
        references = {name: _load_peer(Path(folder), PEERS[name]) for name in peers}
    for workload in workloads:
        runs: dict[str, Callable[[], None]] = {OURS: _ours(model, workload, int8=False)}
        if workload.lanes == 1:
            runs[OURS_INT8] = _ours(model, workload, int8=True)
        for name, reference in references.items():
            runs[name] = _theirs(reference, workload)
        timings = [Timing(name) for name in runs]
        for number in range(rounds):
            for timing in timings:
                report(f"{workload.name}: round {number + 1} of {rounds}, {timing.contestant}")
                started_seconds = time.perf_counter()
                runs[timing.contestant]()
                seconds = time.perf_counter() - started_seconds
                timing.tokens_per_second.append(workload.useful_tokens / seconds)
        comparisons.append(Comparison(workload.name, workload.useful_tokens, timings))
    return comparisons


def _ours(model: ReasoningTransformer, workload: Workload, int8: bool) -> Callable[[], None]:
    longest = max(
        len(prompt) + count
        for prompt, count in zip(workload.prompts, workload.answer_tokens, strict=True)
    )
    decoder = Decoder(
        model, lanes=workload.lanes, max_length=longest, precision=Precision.BF16, int8=int8,
    )

    def requests(answer_tokens: Sequence[int]) -> list[Request]:
        return [Request(prompt, PlainTurn(count))
                for prompt, count in zip(workload.prompts, answer_tokens, strict=True)]

    def run() -> None:
        tokens = sum(len(c.tokens) for c in decoder.generate(requests(workload.answer_tokens)))
        assert tokens == workload.useful_tokens

    # Once with few tokens: what is laid out at first use is not timed.
    list(decoder.generate(requests([2] * len(workload.prompts))[: workload.lanes]))
    return run


def _load_peer(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return reference.eval()


def _theirs(reference: Any, workload: Workload) -> Callable[[], None]:
    """Batches in the order of the prompts, padded on the left, until the longest answer is done."""

    def run() -> None:
        for first in range(0, len(workload.prompts), workload.lanes):
            prompts = workload.prompts[first : first + workload.lanes]
            longest = max(map(len, prompts))
            tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
            mask_BT = torch.zeros_like(tokens_BT)
            for row, prompt in enumerate(prompts):
                tokens_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask_BT[row, longest - len(prompt) :] = 1
            count = max(workload.answer_tokens[first : first + workload.lanes])
            reference.generate(
                tokens_BT, attention_mask=mask_BT, do_sample=False, min_new_tokens=count,
                max_new_tokens=count, pad_token_id=0,
            )

    return run


def comparison_table(comparison: Comparison) -> Table:
    """Return the contestants' speed, and how many times as fast ours are."""
    table = Table(title=f"{comparison.workload}: {comparison.useful_tokens:,} useful tokens",
                  title_justify="left")
    table.add_column("contestant", overflow="fold")
    ours = [t for t in comparison.timings if t.contestant in (OURS, OURS_INT8)]
    for name in ("tokens/s", *(f"{t.contestant} is faster by" for t in ours)):
        table.add_column(name, justify="right", overflow="fold")
    for timing in comparison.timings:
        ratios = [f"{comparison.ratio(mine, timing):.2f}x" if mine is not timing else ""
                  for mine in ours]
        table.add_row(timing.contestant, f"{timing.median:,.1f}", *ratios)
    return table


def plot_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw every contestant's useful tokens a second, a panel for each workload.

    A bar is the median over rounds; the line across its end goes from the slowest to the fastest.
    """
    figure, axes = begin_figure((3.2 * len(comparisons), 3.4), columns=len(comparisons))
    for axis, comparison in zip(axes[0], comparisons, strict=True):
        for place, timing in enumerate(comparison.timings):
            ours = timing.contestant in (OURS, OURS_INT8)
            bar = axis.bar(place, timing.median, color="tab:blue" if ours else "tab:gray")
            axis.vlines(
                place, min(timing.tokens_per_second), max(timing.tokens_per_second), color="black"
            )
            axis.bar_label(bar, fmt="{:,.0f}", label_type="center", color="white", fontsize=8)
        names = [timing.contestant for timing in comparison.timings]
        axis.set_xticks(range(len(names)), names, rotation=45)
        axis.set_title(comparison.workload, fontsize=10)
    axes[0][0].set_ylabel("useful tokens per second")
    write_figure(figure, path, dpi=150)


def to_json(comparisons: Sequence[Comparison]) -> str:
    """Return all figures as JSON."""
    return json.dumps([asdict(comparison) for comparison in comparisons], indent=1)
