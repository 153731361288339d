"""Does the best learning rate of a small model stay the best as it is made wider or deeper?

Every model is trained for the same steps on the same text at each of several rates, from several
seeds, by the project's own loop; what counts is the held-out loss at the end. Each result is
written as it comes, so that an interrupted experiment goes on.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svend.bench.results import read_results, write_results
from svend.data.corpus import read_texts
from svend.data.documents import Document, Kind
from svend.data.stream import BatchStream, PackedSequences
from svend.data.token_array import TokenArray
from svend.data.tokenizer import train_tokenizer
from svend.errors import DataError
from svend.evaluation.heldout import measure_heldout_loss
from svend.models.config import BaseShape, TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import (
    DataConfig,
    Optimizer,
    Parametrisation,
    Precision,
    TrainingConfig,
)
from svend.training.loop import train_steps
from svend.training.state import build_state

FEED_FORWARD = 3  # times the width, at every width
WARMUP = 0.1  # of all steps
HELDOUT_SHARE = 0.05  # of the documents of a file, the last ones
HELDOUT_SEQUENCES = 128

Report = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What all runs of an experiment share; `data` is the hash of the files, one after another."""

    optimizer: str
    base_width: int
    base_depth: int
    head_size: int
    init_std: float
    vocabulary: int
    batch_size: int
    length: int
    steps: int
    device: str
    precision: str
    data: str


@dataclass(frozen=True, order=True)
class Case:
    """One run: a model, a learning rate and a seed of its weights and of the data's order."""

    seed: int
    parametrisation: str
    width: int
    depth: int
    learning_rate: float


@dataclass(frozen=True)
class Result:
    """What a run came to: the held-out loss in nats per token, None where it diverged."""

    case: Case
    loss: float | None
    seconds: float


def plan_cases(
    parametrisations: Sequence[str], widths: Sequence[int], depths: Sequence[int],
    rates: Sequence[float], seeds: int,
) -> list[Case]:
    """Return all runs, seed after seed, the large models first.

    Widths vary at the first depth, depths at the first width.
    """
    shapes = {(width, depths[0]) for width in widths} | {(widths[0], depth) for depth in depths}
    by_cost = sorted(shapes, key=lambda shape: -shape[0] ** 2 * shape[1])
    return [
        Case(seed, parametrisation, width, depth, rate)
        for seed in range(seeds)
        for width, depth in by_cost
        for parametrisation in parametrisations
        for rate in rates
    ]


def learning_rates(lowest: float, count: int, factor: float) -> list[float]:
    """Return the rates of the grid, rounded so that the same grid gives the same numbers."""
    return [float(f"{lowest * factor**i:.6g}") for i in range(count)]


def run_experiment(
    setting: Setting, cases: Sequence[Case], data: Sequence[Path], results_file: Path | None,
    processes: int, report: Report,
) -> list[Result]:
    """Return the results of all cases; those in the file are not run again.

    Raises UserError if the file is of another setting.
    """
    known = {} if results_file is None else known_results(results_file, setting)
    left = [case for case in cases if case not in known]
    report(f"{len(cases)} runs, {len(cases) - len(left)} of them done before")
    started_seconds = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npz"
        if left:
            tokenize(data, setting.vocabulary, tokens)
        for number, result in enumerate(_run_all(setting, left, tokens, processes), start=1):
            known[result.case] = result
            if results_file is not None:
                write_results(results_file, setting, known.values())
            case, loss = result.case, result.loss
            to_go = (time.monotonic() - started_seconds) / number * (len(left) - number)
            report(
                f"{number} of {len(left)}: {case.parametrisation} {case.width}x{case.depth}, rate "
                f"{case.learning_rate:g}, seed {case.seed}: "
                f"{'diverged' if loss is None else f'{loss:.4f}'} in {result.seconds:.0f} s; "
                f"about {to_go / 60:.0f} min left"
            )
    return [known[case] for case in cases]


def _run_all(
    setting: Setting, cases: Sequence[Case], tokens: Path, processes: int
) -> Iterator[Result]:
    if not cases:
        return
    # Spawned: a forked process would inherit the threads of this one's torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin_worker) as pool:
        running = [pool.submit(run_case, setting, case, tokens) for case in cases]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Take one thread, and end with the process that asks, which a pool's workers outlive."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def tokenize(data: Sequence[Path], vocabulary: int, file: Path) -> None:
    """Write the tokens of the files' text, by a tokenizer trained on it, and where documents end.

    The documents that are held out come last: of each file the same share.
    """
    trained: list[Document] = []
    held: list[Document] = []
    for path in data:
        documents = list(read_texts(path))
        if not documents:
            raise DataError(f"{path}: holds no text")
        split = len(documents) - max(1, round(HELDOUT_SHARE * len(documents)))
        trained += documents[:split]
        held += documents[split:]
    tokenizer = train_tokenizer(trained, vocabulary)
    tokens, lengths = tokenizer.encode_flat(trained + held)
    np.savez(file, tokens=tokens, lengths=lengths, held=len(held), size=tokenizer.size)


def run_case(setting: Setting, case: Case, tokens: Path) -> Result:
    """Train one model and measure it; uncompiled, since each runs for seconds."""
    started_seconds = time.monotonic()
    with np.load(tokens) as file:
        pieces = np.split(file["tokens"], np.cumsum(file["lengths"])[:-1])
        held, size = int(file["held"]), int(file["size"])
    data = DataConfig(sources=["text"], mix_ratios={"general": 1.0}, max_seq_length=setting.length)

    def packed(name: str, documents: Sequence[Any], seed: int) -> PackedSequences:
        kinds = [Kind.GENERAL] * len(documents)
        return PackedSequences(TokenArray.of(name, documents, kinds), data, seed)

    training = TrainingConfig(
        seed=case.seed, learning_rate=case.learning_rate, batch_size=setting.batch_size,
        gradient_accumulation_steps=1, optimizer=Optimizer(setting.optimizer),
        parametrisation=Parametrisation(case.parametrisation), base_width=setting.base_width,
        base_depth=setting.base_depth, base_head_size=setting.head_size, warmup_ratio=WARMUP,
        precision=Precision(setting.precision), data=data,
    )
    device = torch.device(setting.device)
    shape = model_config(case, training, size, setting.length)
    model = ReasoningTransformer(replace(shape, initializer_range=setting.init_std))
    model.initialize(case.seed)
    stream = BatchStream(packed("train", pieces[:-held], case.seed), setting.batch_size)
    state = build_state(model, stream, training, setting.steps, device)
    for _ in train_steps(state, training, setting.steps):
        pass
    heldout = packed("heldout", pieces[-held:], 0).first(HELDOUT_SEQUENCES)
    loss = measure_heldout_loss(model, heldout, training.precision, device).loss
    seconds = time.monotonic() - started_seconds
    return Result(case, loss if math.isfinite(loss) else None, seconds)


def model_config(
    case: Case, training: TrainingConfig, vocabulary: int, length: int
) -> TransformerConfig:
    """Return a shape in the same proportions at every width: heads of one size, half the keys."""
    heads = case.width // training.base_head_size
    return TransformerConfig(
        name="transfer", hidden_size=case.width, num_hidden_layers=case.depth,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        intermediate_size=FEED_FORWARD * case.width, vocab_size=vocabulary,
        max_position_embeddings=length, base=BaseShape.of(training),
    )


def known_results(file: Path, setting: Setting) -> dict[Case, Result]:
    """Return the results in a file by their case; none where there is no file."""
    results = read_results(
        file, setting, "bench transfer",
        lambda run: Result(Case(**run["case"]), run["loss"], run["seconds"]),
    )
    return {result.case: result for result in results}
