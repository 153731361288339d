"""Tokenising a file beside `datasets.map`: the same tokenizer, the same number of processes.

Each contestant runs in a process of its own, in turn, and begins with nothing cached. Its memory
is that of the whole tree of processes, what they share counted once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from svend.data.chat import CONTROL_TOKENS
from svend.data.corpus import build_corpus
from svend.data.documents import Document
from svend.data.embedded import reasoning_documents
from svend.data.tokenizer import load_tokenizer, train_tokenizer
from svend.errors import UserError
from svend.pipeline.config import DataConfig, Duplicates

DISTINCT = 2000
VOCABULARY = 32768
SAMPLE_SECONDS = 0.5
CONTESTANTS = ("svend", "datasets")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """One contestant's work on the whole file. `map_seconds` leaves out what came before it."""

    contestant: str
    seconds: float
    map_seconds: float
    tokens: int
    peak_memory_gb: float


def measure_tokenising(
    megabytes: int, processes: int, rounds: int, contestants: list[str], report: Report
) -> tuple[int, list[Turn]]:
    """Return the size of the input in bytes, and every turn of every contestant."""
    with tempfile.TemporaryDirectory() as folder:
        report(f"writing {megabytes:,} MB")
        path = Path(folder) / "train.jsonl"
        documents = list(reasoning_documents(DISTINCT, 0))
        write_records(path, documents, megabytes * 1_000_000)
        tokenizer = Path(folder) / "tokenizer.json"
        tokenizer.write_text(train_tokenizer(documents, VOCABULARY).to_json(), encoding="utf-8")
        turns = []
        for number in range(rounds):
            for contestant in contestants:
                report(f"round {number + 1} of {rounds}: {contestant}")
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    turns.append(_take_turn(contestant, path, tokenizer, processes, scratch))
        return path.stat().st_size, turns


def write_records(path: Path, documents: list[Document], size: int) -> None:
    """Write questions and answers until the file has this size; no two are the same."""
    texts = [[m.content for m in document.messages] for document in documents]
    written = number = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            question, answer = texts[number % len(texts)]
            record = {"question": f"{number}. {question}", "answer": answer}
            written += stream.write(json.dumps(record) + "\n")
            number += 1


def _take_turn(
    contestant: str, path: Path, tokenizer: Path, processes: int, scratch: str
) -> Turn:
    command = [sys.executable, "-m", "svend.bench.data", contestant, str(path), str(tokenizer),
               str(processes), scratch]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, _held_bytes(child.pid))
        time.sleep(SAMPLE_SECONDS)
    out, error = child.communicate()
    if child.returncode:
        raise UserError(f"bench: {contestant} ended: {error.strip().splitlines()[-1]}")
    figures = json.loads(out.splitlines()[-1])
    return Turn(contestant, peak_memory_gb=peak / 1e9, **figures)


def _held_bytes(pid: int) -> int:
    """Return the memory of a process and all that it started, shared pages counted once."""
    held = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            held += one.memory_full_info().pss
    except psutil.NoSuchProcess:
        pass  # it has just ended
    return held


def _run_svend(path: Path, tokenizer: Path, processes: int, scratch: str) -> dict[str, float]:
    data = DataConfig(
        sources=["gsm8k"], mix_ratios={"reasoning": 1.0}, path=str(path), num_samples=1,
        tokenizer=str(tokenizer), processes=processes, cache_dir=scratch,
        duplicates=Duplicates.EXACT,
    )
    started_seconds = time.perf_counter()
    corpus = build_corpus(data, VOCABULARY, 0, lambda _: None)
    seconds = time.perf_counter() - started_seconds
    tokens = int(corpus.train.lengths.sum() + corpus.heldout.lengths.sum())
    return {"seconds": seconds, "map_seconds": seconds, "tokens": tokens}


def _run_datasets(path: Path, tokenizer: Path, processes: int, scratch: str) -> dict[str, float]:
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    started_seconds = time.perf_counter()
    rows: Any = load_dataset("json", data_files=str(path), cache_dir=scratch, split="train")
    loaded_seconds = time.perf_counter()
    encoder = load_tokenizer(str(tokenizer), VOCABULARY)._tokenizer
    encoder.encode_special_tokens = False  # the template is text here, as chat templates are
    end_of_text, end, *_ = CONTROL_TOKENS

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        pairs = zip(batch["question"], batch["answer"], strict=True)
        texts = [f"<|user|>{q}{end}<|assistant|>{a}{end}{end_of_text}" for q, a in pairs]
        return {"ids": [e.ids for e in encoder.encode_batch_fast(texts)]}

    encoded = rows.map(
        encode, batched=True, num_proc=processes, remove_columns=["question", "answer"],
        cache_file_name=f"{scratch}/encoded.arrow",
    )
    seconds = time.perf_counter()
    # Of every 97th row: 97 has no factor in common with the period of the records.
    sampled = encoded.select(range(0, len(encoded), 97))["ids"]
    tokens = round(sum(len(ids) for ids in sampled) * len(encoded) / len(sampled))
    return {"seconds": seconds - started_seconds, "map_seconds": seconds - loaded_seconds,
            "tokens": tokens}


def tokenising_table(size: int, processes: int, turns: list[Turn]) -> Table:
    """Return a table with a line for each contestant: medians, and the most memory."""
    table = Table(
        title=f"Tokenising {size / 1e6:,.0f} MB with {processes} processes", title_justify="left"
    )
    for heading in ("", "s", "MB/s", "map alone, MB/s", "M tokens/s", "GB"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for name, of_name in _by_contestant(turns):
        seconds = statistics.median(turn.seconds for turn in of_name)
        mapping = statistics.median(turn.map_seconds for turn in of_name)
        table.add_row(
            name, f"{seconds:.1f}", f"{size / seconds / 1e6:.1f}", f"{size / mapping / 1e6:.1f}",
            f"{of_name[0].tokens / seconds / 1e6:.2f}",
            f"{max(turn.peak_memory_gb for turn in of_name):.2f}",
        )
    return table


def _by_contestant(turns: list[Turn]) -> Iterator[tuple[str, list[Turn]]]:
    for name in dict.fromkeys(turn.contestant for turn in turns):
        yield name, [turn for turn in turns if turn.contestant == name]


def to_json(size: int, processes: int, turns: list[Turn]) -> str:
    return json.dumps(
        {"bytes": size, "processes": processes, "turns": [asdict(t) for t in turns]}, indent=1
    )


if __name__ == "__main__":
    _contestant, _path, _tokenizer, _processes, _scratch = sys.argv[1:]
    _run = {"svend": _run_svend, "datasets": _run_datasets}[_contestant]
    print(json.dumps(_run(Path(_path), Path(_tokenizer), int(_processes), _scratch)))
