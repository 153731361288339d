"""Tokenised once: killed, two at once, changed meanwhile, no room; and what is left out."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.data import tokenised
from svend.data.corpus import build_corpus
from svend.data.documents import Document, Role, conversation
from svend.data.hygiene import (
    minhash_signatures,
    near_duplicates,
    occurs_in,
    word_sequences,
)
from svend.data.records import CHUNK_BYTES, read_chunks
from svend.errors import DataError
from svend.pipeline.config import BrokenRows, DataConfig, Duplicates, OwnSource
from tests.test_data import (
    local_data,
    questions,
    questions_of,
    refusal,
    silent,
    write_lines,
)

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["river", "stone", "cloud", "paper", "green", "seven", "house", "light", "winter", "sugar",
         "engine", "pocket"]


def many_questions(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} and {i} and {'x' * 40}?", "answer": f"{2 * i} " * 20}
            for i in range(count)]


def start_build(cache: Path, path: Path, shard_tokens: int = 20_000) -> subprocess.Popen[str]:
    code = (
        "import sys\n"
        "from svend.data import tokenised\n"
        "from svend.data.corpus import build_corpus\n"
        "from svend.pipeline.config import DataConfig\n"
        f"tokenised.SHARD_TOKENS = {shard_tokens}\n"
        "data = DataConfig(sources=['gsm8k'], mix_ratios={'reasoning': 1.0}, path=sys.argv[2],\n"
        "    heldout_fraction=0.5, cache_dir=sys.argv[1], processes=1)\n"
        "print(build_corpus(data, 400, 0, lambda t: print(t, flush=True)).fingerprint)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(cache), str(path)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def test_a_killed_tokenisation_goes_on_after_its_last_whole_shard(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", many_questions(8_000))
    whole, _ = start_build(tmp_path / "whole", path, 8_000).communicate(timeout=60)
    killed = start_build(tmp_path / "killed", path, 8_000)
    shards = tmp_path / "killed" / "parts"
    deadline = time.monotonic() + 30
    while len(list(shards.glob("*/*.npz"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list(shards.glob("*/part.json"))
    stamps = {path: path.stat().st_mtime_ns for path in shards.glob("*/0000[01].*")}
    assert len(stamps) >= 4
    again, _ = start_build(tmp_path / "killed", path, 8_000).communicate(timeout=60)
    assert "going on after" in again
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert again.splitlines()[-1] == whole.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_that_want_the_same_make_it_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", many_questions(20_000))
    both = [start_build(tmp_path / "cache", path) for _ in range(2)]
    outputs = [process.communicate(timeout=90)[0] for process in both]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    worked = [output for output in outputs if "tokenising gsm8k" in output]
    assert len(worked) == 1
    [waited] = [output for output in outputs if output not in worked]
    assert "by another process; waiting for it" in waited


@pytest.mark.slow
def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", many_questions(3 * 16 * CHUNK_BYTES // 200 // 2))
    fingerprints = {
        build_corpus(
            local_data(tmp_path / f"cache{count}", path, processes=count), 400, 0, silent
        ).fingerprint
        for count in (1, 2)
    }
    assert len(fingerprints) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "train.jsonl", many_questions(100))
    real = tokenised.encode_chunks

    def while_another_writes(*arguments: Any) -> Any:
        for encoded in real(*arguments):
            with path.open("a") as stream:
                stream.write('{"question": "new", "answer": "new"}\n')
            yield encoded

    monkeypatch.setattr(tokenised, "encode_chunks", while_another_writes)
    message = refusal(local_data(tmp_path / "cache", path))
    assert str(path) in message and "changed" in message
    monkeypatch.setattr(tokenised, "encode_chunks", real)
    corpus = build_corpus(local_data(tmp_path / "cache", path), 400, 0, silent)
    assert len(corpus.train) + len(corpus.heldout) == 101


def test_a_full_disk_is_one_line_and_the_cache_stays_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "train.jsonl", many_questions(100))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(
        OSError(errno.ENOSPC, "No space left on device")))
    message = refusal(local_data(tmp_path / "cache", path))
    assert "data.cache_dir" in message and "No space left" in message
    monkeypatch.undo()
    corpus = build_corpus(local_data(tmp_path / "cache", path), 400, 0, silent)
    assert len(corpus.train) + len(corpus.heldout) == 100


def test_gzipped_lines_are_read_and_a_truncated_file_is_named(tmp_path: Path) -> None:
    lines = "".join(json.dumps(q) + "\n" for q in questions(30)).encode()
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    corpus = build_corpus(local_data(tmp_path / "cache", path), 400, 0, silent)
    assert len(corpus.train) + len(corpus.heldout) == 30
    path.write_bytes(gzip.compress(lines)[:-20])
    message = refusal(local_data(tmp_path / "cache", path))
    assert str(path) in message and "gzip" in message


def test_a_split_of_several_files_is_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "d" / "data"
    for number in range(3):
        write_lines(
            folder / f"train-0000{number}-of-00003.jsonl", questions(10, first=10 * number)
        )
    write_lines(folder / "test-00000-of-00001.jsonl", questions(5, first=100))
    corpus = build_corpus(local_data(tmp_path / "cache", tmp_path / "d"), 400, 0, silent)
    assert (len(corpus.train), len(corpus.heldout)) == (30, 5)


def test_a_list_of_records_is_json_too(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(questions(30), indent=1))
    corpus = build_corpus(local_data(tmp_path / "cache", path), 400, 0, silent)
    assert len(corpus.train) + len(corpus.heldout) == 30


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="ab \n", max_size=60))
def test_paragraphs_hold_all_text_but_the_space_between(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text)
    found = [row["text"] for chunk in read_chunks(path) for row in chunk.rows]
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(paragraph.strip() and "\n\n" not in paragraph for paragraph in found)


def test_broken_rows_are_dropped_where_asked_for_counted_and_named(tmp_path: Path) -> None:
    good = questions(40)
    broken = ['{"question": "x"', {"question": "no answer"}, {"question": "q", "answer": " "}]
    path = write_lines(tmp_path / "train.jsonl", [*good[:16], *broken, *good[16:]])
    assert f"{path}:17" in refusal(local_data(tmp_path / "cache", path))
    data = local_data(tmp_path / "cache", path, broken_rows=BrokenRows.DROP)
    corpus = build_corpus(data, 400, 0, silent)
    [count] = corpus.counts
    assert len(corpus.train) + len(corpus.heldout) == 40
    assert count.dropped_rows == 3
    assert [row.partition(": ")[0] for row in count.named_rows] == [
        f"{path}:{line}" for line in (17, 18, 19)
    ]


def worded(seed: int, count: int) -> str:
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(WORDS, count))


def test_a_planted_leak_is_dropped_and_counted(tmp_path: Path) -> None:
    clean = [{"question": worded(i, 30) + f" {i}?", "answer": f"{i}"} for i in range(100, 160)]
    held = [{"question": worded(i, 30) + "?", "answer": "held"} for i in range(10)]
    # Ten words of a held-out question within another question, in other case and punctuation.
    ten = ", ".join(held[3]["question"].upper().split()[5:15])
    nine = ", ".join(held[4]["question"].upper().split()[5:14])
    planted = [{"question": f"Tell me: {ten}; yes?", "answer": "a"}]
    harmless = [{"question": f"Tell me: {nine}; yes?", "answer": "b"}]
    write_lines(tmp_path / "d" / "train.jsonl", [*clean, *planted, *harmless])
    write_lines(tmp_path / "d" / "test.jsonl", held)

    def counted(**changes: Any) -> tuple[int, int]:
        data = local_data(tmp_path / "cache", tmp_path / "d", **changes)
        [count] = build_corpus(data, 400, 0, silent).counts
        return count.leaked_documents, count.train_documents

    assert counted() == (1, 61)
    assert counted(leak_words=9) == (2, 60)
    assert counted(leak_words=0) == (0, 62)


def test_training_keeps_away_from_evaluation_sets_of_any_schema(tmp_path: Path) -> None:
    train = [{"question": worded(i, 30) + f" {i}?", "answer": f"{i}"} for i in range(60)]
    path = write_lines(tmp_path / "train.jsonl", train)
    nested = {"id": 1, "turns": [[{"role": "user", "content": train[7]["question"]}]]}
    benchmark = write_lines(tmp_path / "benchmark.jsonl", [nested])
    data = local_data(tmp_path / "cache", path, evaluation_sets=[str(benchmark)],
                      heldout_fraction=0.01)
    [count] = build_corpus(data, 400, 0, silent).counts
    assert count.leaked_documents == 1
    missing = local_data(tmp_path / "cache", path, evaluation_sets=[str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in refusal(missing)


def test_duplicates_are_kept_or_left_out_as_asked(tmp_path: Path) -> None:
    long = [worded(i, 60) for i in range(30)]
    records = [{"question": text, "answer": "yes"} for text in long]
    words = long[5].split()
    near = {"question": " ".join([*words[:58], "otherwise", words[59]]), "answer": "yes"}
    path = write_lines(tmp_path / "train.jsonl", [*records, records[3], records[3], near])
    heldout = write_lines(tmp_path / "test.jsonl", questions(5))

    def left_out(duplicates: Duplicates) -> tuple[int, int]:
        data = local_data(tmp_path / "cache", path, duplicates=duplicates,
                          heldout_path=str(heldout))
        corpus = build_corpus(data, 400, 0, silent)
        if duplicates is not Duplicates.KEEP:
            assert len(questions_of(corpus, corpus.train)) == len(corpus.train)
        return corpus.counts[0].duplicate_documents, len(corpus.train)

    assert left_out(Duplicates.KEEP) == (0, 33)
    assert left_out(Duplicates.EXACT) == (2, 31)
    assert left_out(Duplicates.NEAR) == (3, 30)


def text(content: str) -> Document:
    return conversation((Role.TEXT, content))


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=0, max_size=30), count=st.integers(1, 12)
)
def test_word_sequences_are_those_of_a_plain_search(words: list[str], count: int) -> None:
    hashes = word_sequences(text(" ".join(words)), count)
    runs = [tuple(words[i : i + count]) for i in range(len(words) - count + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))
    sentence = f"{'. '.join(words).title()}!"
    assert word_sequences(text(sentence), count).tolist() == hashes.tolist()


def test_sequences_are_found_wherever_they_stand() -> None:
    known = np.sort(word_sequences(text(worded(0, 100)), 10))
    inside = " ".join(worded(0, 100).split()[40:52])
    assert occurs_in(word_sequences(text(f"so {inside} then"), 10), known)
    assert not occurs_in(word_sequences(text(worded(1, 300)), 10), known)
    assert not occurs_in(word_sequences(text("too short"), 10), known)
    assert not occurs_in(word_sequences(text(worded(0, 100)), 10), known[:0])


def test_near_duplicates_are_those_that_share_most_sequences() -> None:
    generator = np.random.default_rng(0)
    originals = [" ".join(generator.choice(10_000, 200).astype(str)) for _ in range(40)]

    def changed(content: str, share: float) -> str:
        words = content.split()
        for place in range(0, len(words), max(1, round(1 / share))):
            words[place] = "changed"
        return " ".join(words)

    close = [changed(content, 0.01) for content in originals]  # shares 9 of 10 sequences
    far = [changed(content, 0.2) for content in originals]  # shares none
    short = ["two words"] * 5
    documents = [text(content) for content in [*originals, *close, *far, *short]]
    left_out = near_duplicates(minhash_signatures(documents))
    assert not left_out[:40].any()
    assert left_out[40:80].mean() > 0.95
    assert not left_out[80:].any()


def test_own_sources_are_a_function_and_an_entry(tmp_path: Path) -> None:
    (tmp_path / "notes.py").write_text(
        "from svend.data.documents import Role, conversation\n"
        "def to_document(record):\n"
        "    return conversation((Role.USER, record['ask']), (Role.ASSISTANT, record['tell']))\n"
    )
    path = write_lines(
        tmp_path / "notes.jsonl", [{"ask": f"Say {i}", "tell": f"{i}"} for i in range(30)]
    )
    own = {"name": "notes", "kind": "general", "path": str(path)}

    def data(to_document: str) -> DataConfig:
        return DataConfig(
            sources=["notes"], mix_ratios={"general": 1.0}, max_seq_length=64, num_samples=1,
            own_sources=[OwnSource(**own, to_document=to_document)], heldout_fraction=0.3,
            cache_dir=str(tmp_path / "cache"),
        )

    corpus = build_corpus(data(f"{tmp_path / 'notes.py'}:to_document"), 400, 0, silent)
    assert len(corpus.train) + len(corpus.heldout) == 30
    for wrong in (f"{tmp_path / 'notes.py'}:other", "no_such_module:f", "nothing"):
        message = refusal(data(wrong))
        assert "own_sources" in message and wrong in message


@pytest.mark.parametrize("by_file", [True, False])
def test_a_changed_function_is_what_a_later_run_of_the_process_goes_by(
    by_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"notes_{by_file}".lower()
    path = write_lines(tmp_path / "notes.jsonl", [{"text": f"note {i}"} for i in range(30)])
    place = str(tmp_path / f"{module}.py") if by_file else module
    monkeypatch.syspath_prepend(str(tmp_path))
    data = DataConfig(
        sources=["notes"], mix_ratios={"general": 1.0}, max_seq_length=64, num_samples=1,
        own_sources=[OwnSource(name="notes", kind="general", path=str(path),
                               to_document=f"{place}:to_document")],
        heldout_fraction=0.3, cache_dir=str(tmp_path / "cache"),
    )
    for word in ("first", "another"):
        (tmp_path / f"{module}.py").write_text(
            "from svend.data.documents import Role, conversation\n"
            "def to_document(record):\n"
            f"    return conversation((Role.TEXT, '{word} ' + record['text']))\n"
        )
        corpus = build_corpus(data, 400, 0, silent)
        tokens = corpus.train.tokens.read(int(corpus.train.starts[0]), 8)
        assert corpus.tokenizer.decode(tokens.tolist()).startswith(f"{word} note")


def test_a_problem_set_of_reasoning_gym_is_a_source_by_name(tmp_path: Path) -> None:
    data = DataConfig(
        sources=["gym:chain_sum"], mix_ratios={"reasoning": 1.0}, max_seq_length=64,
        num_samples=40, heldout_fraction=0.3, cache_dir=str(tmp_path),
    )
    corpus = build_corpus(data, 400, 0, silent)
    assert len(corpus.train) + len(corpus.heldout) + corpus.counts[0].duplicate_documents == 40
    data.sources = ["gym:chain_sums"]
    assert "did you mean chain_sum" in refusal(data)


def test_the_hub_is_read_through_datasets_by_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands for the hub: `datasets` reads it by the same call."""
    folder = tmp_path / "hub"
    write_lines(folder / "train.jsonl", questions(30))
    write_lines(folder / "test.jsonl", questions(6, first=100))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from svend.data import sources
    asked: list[tuple[str, str]] = []

    def commit_of(repository: str, revision: str) -> str:
        asked.append((repository, revision))
        return "c" * 40

    monkeypatch.setattr(sources, "hub_commit", commit_of)
    own = OwnSource(
        name="hubbed", kind="reasoning", to_document="svend.data.schemas:gsm8k_document",
        repository=str(folder), heldout_split="test",
    )
    data = DataConfig(
        sources=["hubbed"], mix_ratios={"reasoning": 1.0}, num_samples=20, own_sources=[own],
        max_seq_length=64, cache_dir=str(tmp_path / "cache"),
    )
    corpus = build_corpus(data, 400, 0, silent)
    assert (len(corpus.train), len(corpus.heldout)) == (20, 6)
    assert asked == [(str(folder), "main")]
    assert corpus.counts[0].identity["revision"] == "c" * 40
    data.revisions = {"hubbed": "d" * 40}
    pinned = build_corpus(data, 400, 0, silent)
    assert len(asked) == 1
    assert pinned.counts[0].identity["revision"] == "d" * 40


def test_an_unknown_evaluation_row_is_no_traceback(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", questions(30))
    broken = write_lines(tmp_path / "benchmark.jsonl", ['{"prompt": '])
    with pytest.raises(DataError, match=r"benchmark\.jsonl:1"):
        build_corpus(
            local_data(tmp_path / "cache", path, evaluation_sets=[str(broken)]), 400, 0, silent
        )
