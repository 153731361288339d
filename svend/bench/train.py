"""The training step, timed beside the peers': interleaved in one run, medians of pairs."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svend.bench.spec import Spec
from svend.data.corpus import build_corpus
from svend.device import resolve_device
from svend.errors import UserError
from svend.pipeline.config import DataConfig, Device, ModelConfig, Precision
from svend.planning.flops import train_flops_per_token
from svend.planning.probe import measure_matmul_peak

ROOT = Path(__file__).parents[2]
OURS = "svend"
Report = Callable[[str], None]


@dataclass
class Timing:
    """One contestant at one shape. Times are seconds; rates count tokens that are not padding."""

    contestant: str
    parameters: int
    cold_first_step_seconds: float
    warm_first_step_seconds: float
    tokens_per_second: list[float] = field(default_factory=list)
    peak_memory_gb: float = 0.0
    flops_per_second: float = 0.0
    peak_fraction: float = 0.0
    ratio_to_ours: float = 1.0

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)


@dataclass
class Comparison:
    """All contestants at one shape, and the matrix-product peak measured between their turns."""

    scale: str
    shape: str
    matmul_peak_flops: float
    flops_per_token: int
    timings: list[Timing]


class Worker:
    """A contestant's process. It answers each line with a line."""

    def __init__(self, name: str, python: str, spec: Spec, cache: str) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (lives with the worker)
        self._process = subprocess.Popen(
            [python, "-m", "svend.bench.worker", name, spec.to_json()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": cache},
        )
        try:
            self.first = self._answer()
        except UserError:
            self.kill()
            raise

    def step(self, count: int) -> dict[str, Any]:
        self._say(f"step {count}")
        return self._answer()

    def stop(self) -> dict[str, Any]:
        self._say("stop")
        answer = self._answer()
        self._process.wait()
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told by what it does not answer
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            told = [text for text in self._errors.read().splitlines() if text.strip()]
            reason = told[-1] if told else f"exit code {self._process.returncode}"
            raise UserError(f"bench: {self.name} ended: {reason[:300]}; leave it out with --peers")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(
    scale: str,
    model: ModelConfig,
    spec: Spec,
    contestants: Sequence[str],
    litgpt_python: str,
    rounds: int,
    steps: int,
    report: Report,
) -> Comparison:
    """Time every contestant `rounds` times `steps` steps, in turn, in processes of their own.

    Each starts twice with a compiler's cache that is at first empty, so that compiling is seen
    cold and warm. Raises UserError, naming the contestant, if one ends.
    """
    shape = "documents, " if spec.documents else ""
    shape += f"{spec.batch_size}x{spec.length}"
    peaks: list[float] = []
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as running:
        workers, timings = [], []
        for name in contestants:
            python = litgpt_python if name == "litgpt" else sys.executable
            own_cache = str(Path(cache) / name)
            report(f"{scale} {shape}: starting {name}, twice")
            cold = Worker(name, python, spec, own_cache)
            running.callback(cold.kill)
            cold.stop()
            warm = Worker(name, python, spec, own_cache)
            running.callback(warm.kill)
            warm.step(1)
            workers.append(warm)
            timings.append(Timing(
                name, warm.first["parameters"], cold.first["first_step_seconds"],
                warm.first["first_step_seconds"],
            ))
        _check_parameters(timings)
        for number in range(rounds):
            report(f"{scale} {shape}: round {number + 1} of {rounds}")
            peaks.append(measure_matmul_peak(Precision.BF16, torch.device(spec.device)))
            for worker, timing in zip(workers, timings, strict=True):
                answer = worker.step(steps)
                timing.tokens_per_second.append(answer["tokens"] / answer["seconds"])
        for worker, timing in zip(workers, timings, strict=True):
            timing.peak_memory_gb = worker.stop()["peak_bytes"] / 1e9
    flops, peak = train_flops_per_token(model, spec.length), statistics.median(peaks)
    for timing in timings:
        timing.flops_per_second = timing.median * flops
        timing.peak_fraction = timing.flops_per_second / peak
        timing.ratio_to_ours = statistics.median(
            ours / theirs for ours, theirs in zip(
                timings[0].tokens_per_second, timing.tokens_per_second, strict=True
            )
        )
    return Comparison(scale, shape, peak, flops, timings)


def make_spec(model: ModelConfig, batch_size: int, length: int, documents: str | None) -> Spec:
    """Return the spec of a scale's model at one shape."""
    return Spec(
        hidden_size=model.hidden_size, layers=model.num_hidden_layers,
        heads=model.num_attention_heads, kv_heads=model.num_key_value_heads,
        intermediate_size=model.intermediate_size, vocab_size=model.vocab_size,
        batch_size=batch_size, length=length,
        device=resolve_device(Device.AUTO).type, documents=documents,
    )


@contextlib.contextmanager
def tokenized_documents(data: DataConfig, vocab_size: int, report: Report) -> Iterator[str]:
    """Yield a file with the train documents of a recipe as token arrays."""
    corpus = build_corpus(data, vocab_size, 0, report)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.npz"
        train = corpus.train
        places = zip(train.starts, train.lengths, strict=True)
        documents = [train.tokens.read(start, length) for start, length in places]
        offsets = np.cumsum([0, *train.lengths])
        np.savez(path, tokens=np.concatenate(documents), offsets=offsets)
        yield str(path)


def to_json(comparisons: Sequence[Comparison]) -> str:
    return json.dumps([
        {**asdict(c), "timings": [
            {**asdict(t), "median_tokens_per_second": t.median} for t in c.timings
        ]} for c in comparisons
    ], indent=1)


def _check_parameters(timings: Sequence[Timing]) -> None:
    counts = {timing.contestant: timing.parameters for timing in timings}
    if len(set(counts.values())) > 1:
        raise UserError(f"bench: the contestants' models differ in size: {counts}")
