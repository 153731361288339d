"""From sources to a corpus: the tokenizer, reading, the cache, what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.data.chat import CONTROL_TOKENS
from svend.data.corpus import Corpus, build_corpus
from svend.data.documents import Document, Role, conversation
from svend.data.embedded import general_documents, reasoning_documents
from svend.data.sources import locate_sources, mix_of
from svend.data.token_array import KINDS, TokenArray
from svend.data.tokenizer import DocumentTokenizer, load_tokenizer, train_tokenizer
from svend.data.tool_dialogues import tool_use_documents
from svend.errors import ConfigError, DataError, UserError
from svend.pipeline.config import BrokenRows, DataConfig
from tests.prepared import data_cache

ROOT = Path(__file__).resolve().parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
GENERATORS = {
    "reasoning": reasoning_documents,
    "tool_use": tool_use_documents,
    "general": general_documents,
}


def silent(_: str) -> None:
    pass


def embedded_data(cache: Path, num_samples: int = 60, **changes: Any) -> DataConfig:
    settings_: dict[str, Any] = {
        "sources": ["gym_reasoning", "gym_tool_use", "gym_general"],
        "mix_ratios": {"reasoning": 0.6, "tool_use": 0.25, "general": 0.15},
        "num_samples": num_samples, "max_seq_length": 128, "heldout_fraction": 0.2,
        "cache_dir": str(cache),
    }
    return DataConfig(**(settings_ | changes))


def local_data(cache: Path, place: Path, source: str = "gsm8k", **changes: Any) -> DataConfig:
    kind = "reasoning" if source in ("gsm8k", "openmath") else "general"
    settings_: dict[str, Any] = {
        "sources": [source], "mix_ratios": {kind: 1.0}, "num_samples": 10, "max_seq_length": 128,
        "path": str(place), "heldout_fraction": 0.5, "cache_dir": str(cache),
    }
    return DataConfig(**(settings_ | changes))


def write_lines(path: Path, records: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def questions(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}
            for i in range(first, first + count)]


def texts_of(corpus: Corpus, part: TokenArray) -> list[str]:
    return [
        corpus.tokenizer.decode(part.tokens.read(start, length).tolist())
        for start, length in zip(part.starts, part.lengths, strict=True)
    ]


def questions_of(corpus: Corpus, part: TokenArray) -> set[str]:
    return {
        text.split("<|user|>")[1].split("<|end|>")[0].lower() for text in texts_of(corpus, part)
    }


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, timeout=60, check=True,
    )


@pytest.fixture(scope="module")
def embedded_corpus() -> Corpus:
    return build_corpus(embedded_data(data_cache(), 400), 1024, 0, silent)


@pytest.fixture(scope="module")
def tokenizer(embedded_corpus: Corpus) -> DocumentTokenizer:
    return embedded_corpus.tokenizer



@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens(tokenizer: DocumentTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from(CONTROL_TOKENS) | st.text(max_size=5), max_size=8))
def test_text_that_imitates_control_tokens_stays_text(
    tokenizer: DocumentTokenizer, pieces: list[str]
) -> None:
    text = "".join(pieces)
    control = set(tokenizer.control_ids.values())
    ids = tokenizer.encode_text(text)
    assert not control & set(ids)
    assert tokenizer.decode(ids) == text
    [document] = tokenizer.encode([conversation((Role.USER, text), (Role.ASSISTANT, text))])
    expected = ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    expected_ids = [tokenizer.control_ids[token] for token in expected]
    assert [i for i in document if i in control] == expected_ids


def test_running_text_has_no_role_and_ends_as_every_document_does(
    tokenizer: DocumentTokenizer,
) -> None:
    [ids] = tokenizer.encode([conversation((Role.TEXT, "A cat sat."))])
    assert tokenizer.decode(ids) == "A cat sat.<|endoftext|>"


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="0123456789 a.,-", max_size=30))
def test_every_digit_is_a_token_of_its_own(tokenizer: DocumentTokenizer, text: str) -> None:
    digits = sum(character.isdigit() for character in text)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode_text(text)]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == [
        character for character in text if character.isdigit()
    ]
    assert sum(piece.isdigit() for piece in pieces) == digits


@pytest.mark.parametrize("vocab_size", [264, 300, 700])
def test_the_vocabulary_has_at_most_the_size_asked_for(vocab_size: int) -> None:
    trained = train_tokenizer(reasoning_documents(200, 0), vocab_size)
    assert trained.size <= vocab_size
    largest = max(max(ids) for ids in trained.encode(list(reasoning_documents(50, 1))))
    assert largest < trained.size


def test_a_tokenizer_trained_again_in_another_process_is_the_same() -> None:
    here = train_tokenizer(reasoning_documents(80, 0), 500).sha256
    assert train_tokenizer(reasoning_documents(80, 0), 500).sha256 == here
    code = (
        "from svend.data.tokenizer import train_tokenizer\n"
        "from svend.data.embedded import reasoning_documents\n"
        "print(train_tokenizer(reasoning_documents(80, 0), 500).sha256)"
    )
    assert python(code, PYTHONHASHSEED="12345").stdout.strip() == here


def test_a_saved_tokenizer_loads_as_the_same(
    tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    assert load_tokenizer(str(path), tokenizer.size).sha256 == tokenizer.sha256


def altered_tokenizer(
    tokenizer: DocumentTokenizer, tmp_path: Path, alter: Callable[[dict[str, Any]], None]
) -> DocumentTokenizer:
    tree = json.loads(tokenizer.to_json())
    alter(tree)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return load_tokenizer(str(path), 65536)


def test_a_tokenizer_file_that_truncates_or_pads_does_not_change_documents(
    tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    def alter(tree: dict[str, Any]) -> None:
        tree["truncation"] = {
            "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
        }
        tree["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }

    loaded = altered_tokenizer(tokenizer, tmp_path, alter)
    documents = [conversation((Role.USER, "word " * 20)), conversation((Role.USER, "a"))]
    assert loaded.encode(documents) == tokenizer.encode(documents)


def test_a_tokenizer_file_with_plain_control_entries_still_refuses_imitations(
    tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    def alter(tree: dict[str, Any]) -> None:
        for token in tree["added_tokens"]:
            token["special"] = False

    loaded = altered_tokenizer(tokenizer, tmp_path, alter)
    assert not set(loaded.control_ids.values()) & set(loaded.encode_text("hi <|end|> there"))



@pytest.mark.parametrize("name", GENERATORS)
def test_embedded_documents_depend_on_the_seed_alone(name: str) -> None:
    documents = list(GENERATORS[name](24, 3))
    assert len(documents) == 24
    assert list(GENERATORS[name](24, 4)) != documents
    code = (
        "import importlib, sys\nmodule = importlib.import_module(sys.argv[1])\n"
        "print(list(getattr(module, sys.argv[2])(24, 3)))"
    )
    generate = GENERATORS[name]
    fresh = python(
        code, generate.__module__, generate.__name__, PYTHONHASHSEED="77"
    ).stdout.strip()
    assert fresh == str(documents)


def test_no_question_is_in_both_parts(embedded_corpus: Corpus) -> None:
    train = questions_of(embedded_corpus, embedded_corpus.train)
    heldout = questions_of(embedded_corpus, embedded_corpus.heldout)
    assert len(heldout) > 100
    assert not train & heldout


def test_counts_say_what_the_arrays_hold(embedded_corpus: Corpus) -> None:
    for part, name in ((embedded_corpus.train, "train"), (embedded_corpus.heldout, "heldout")):
        counted = {c.kind: getattr(c, f"{name}_tokens") for c in embedded_corpus.counts}
        assert {KINDS[kind].value: part.lengths[part.kinds == kind].sum()
                for kind in set(part.kinds.tolist())} == counted
        assert sum(counted.values()) == part.lengths.sum()
        documents = {c.kind: getattr(c, f"{name}_documents") for c in embedded_corpus.counts}
        assert Counter(KINDS[kind].value for kind in part.kinds) == documents


def test_the_fingerprint_is_that_of_the_data_and_not_of_the_place(tmp_path: Path) -> None:
    first = build_corpus(embedded_data(tmp_path / "a"), 400, 0, silent)
    second = build_corpus(embedded_data(tmp_path / "b"), 400, 0, silent)
    other = build_corpus(embedded_data(tmp_path / "a"), 400, 1, silent)
    assert first.fingerprint == second.fingerprint
    assert texts_of(first, first.train) == texts_of(second, second.train)
    assert other.fingerprint != first.fingerprint


def test_a_second_build_reads_the_cache_and_writes_nothing(tmp_path: Path) -> None:
    def stamps() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    said: list[str] = []
    first = build_corpus(embedded_data(tmp_path), 400, 0, said.append)
    assert said
    before = stamps()
    said.clear()
    second = build_corpus(embedded_data(tmp_path), 400, 0, said.append)
    assert stamps() == before
    assert said == []
    assert second.fingerprint == first.fingerprint
    assert second.counts == first.counts


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", questions(20))
    first = build_corpus(local_data(tmp_path / "cache", path), 400, 0, silent)
    write_lines(path, questions(20, first=5))
    second = build_corpus(local_data(tmp_path / "cache", path), 400, 0, silent)
    assert second.fingerprint != first.fingerprint


def test_train_documents_that_repeat_a_held_out_question_are_dropped_and_counted(
    tmp_path: Path,
) -> None:
    heldout = questions(10)
    repeated = [
        heldout[0],
        {"question": "  what IS 1 +  1?", "answer": "another answer"},
        heldout[2],
    ]
    write_lines(tmp_path / "d" / "train.jsonl", [*repeated, *questions(20, first=100)])
    write_lines(tmp_path / "d" / "test.jsonl", heldout)
    corpus = build_corpus(local_data(tmp_path / "cache", tmp_path / "d"), 400, 0, silent)
    [count] = corpus.counts
    assert (count.leaked_documents, count.train_documents, count.heldout_documents) == (3, 20, 10)
    assert not questions_of(corpus, corpus.train) & questions_of(corpus, corpus.heldout)


def test_a_source_does_not_train_on_what_another_holds_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "gsm8k" / "train.jsonl", questions(10))
    write_lines(tmp_path / "d" / "gsm8k" / "test.jsonl", questions(5, first=100))
    shared = [
        {"problem": q["question"], "generated_solution": q["answer"], "expected_answer": "1"}
        for q in questions(20, first=100)
    ]
    write_lines(tmp_path / "d" / "openmath" / "train.jsonl", shared)
    data = local_data(
        tmp_path / "cache", tmp_path / "d", sources=["gsm8k", "openmath"], heldout_fraction=1e-6
    )
    corpus = build_corpus(data, 400, 0, silent)
    assert [count.leaked_documents for count in corpus.counts] == [0, 5]


@pytest.mark.skipif(not (GSM8K / "train.jsonl").is_file(), reason="no GSM8K beside the project")
def test_real_gsm8k_has_its_documents_and_finds_its_held_out_split_beside_it(
    tmp_path: Path,
) -> None:
    corpus = build_corpus(local_data(tmp_path, GSM8K / "train.jsonl"), 2048, 0, silent)
    [count] = corpus.counts
    left_out = count.leaked_documents + count.duplicate_documents
    assert len(corpus.train) + left_out == 7473
    assert count.leaked_documents == 117  # ten words in a row that a test problem has too
    assert len(corpus.heldout) == 1319
    assert "<|user|>Natalia sold clips to 48" in texts_of(corpus, corpus.train)[0]


def test_parquet_and_csv_give_the_documents_of_json_lines(tmp_path: Path) -> None:
    records = questions(20)
    table = pd.DataFrame(records)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    write_lines(tmp_path / "a.jsonl", records)
    fingerprints = {
        suffix: build_corpus(
            local_data(tmp_path / "cache", tmp_path / f"a.{suffix}"), 400, 0, silent
        ).fingerprint
        for suffix in ("jsonl", "parquet", "csv")
    }
    assert len(set(fingerprints.values())) == 1


@pytest.mark.parametrize("answer", ["None", "NA", "null", "007", "1.50"])
def test_a_csv_cell_is_the_text_that_stands_in_it(tmp_path: Path, answer: str) -> None:
    records = [{"question": q["question"], "answer": answer} for q in questions(20)]
    pd.DataFrame(records).to_csv(tmp_path / "a.csv", index=False)
    corpus = build_corpus(local_data(tmp_path / "cache", tmp_path / "a.csv"), 400, 0, silent)
    assert all(f"<|assistant|>{answer}<|end|>" in text for text in texts_of(corpus, corpus.train))


def test_text_is_one_document_per_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One line.\nTwo.\n\n\n\nBeta.\n\nGamma. \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Held.", encoding="utf-8")
    data = local_data(
        tmp_path / "cache", tmp_path / "a.txt", "text", heldout_path=str(tmp_path / "b.txt")
    )
    corpus = build_corpus(data, 400, 0, silent)
    expected = ["One line.\nTwo.", "Beta.", "Gamma."]
    assert texts_of(corpus, corpus.train) == [f"{text}<|endoftext|>" for text in expected]


def test_openmath_and_slimorca_load_from_a_folder_in_the_hubs_schema(tmp_path: Path) -> None:
    openmath = [
        {"problem": f"Find x if x = {i}.", "generated_solution": f"x is {i}.",
         "expected_answer": str(i), "problem_source": "augmented_math"}
        for i in range(30)
    ]
    slimorca = [
        {"conversations": [
            {"from": "system", "value": "You help.", "weight": None},
            {"from": "human", "value": f"Say {i}.", "weight": 0.0},
            {"from": "gpt", "value": f"{i}", "weight": 1.0},
        ]}
        for i in range(30)
    ]
    write_lines(tmp_path / "d" / "openmath.jsonl", openmath)
    pd.DataFrame(slimorca).to_parquet(tmp_path / "d" / "slimorca.parquet")
    data = local_data(
        tmp_path / "cache", tmp_path / "d", sources=["openmath", "slimorca"],
        mix_ratios={"reasoning": 0.7, "general": 0.3},
    )
    corpus = build_corpus(data, 400, 0, silent)
    texts = texts_of(corpus, corpus.train) + texts_of(corpus, corpus.heldout)
    expected = [
        f"<|user|>Find x if x = {i}.<|end|><|assistant|>x is {i}.\n#### {i}<|end|><|endoftext|>"
        for i in range(30)
    ] + [
        f"<|system|>You help.<|end|><|user|>Say {i}.<|end|><|assistant|>{i}<|end|><|endoftext|>"
        for i in range(30)
    ]
    assert sorted(texts) == sorted(expected)



def refusal(data: DataConfig, vocab_size: int = 400) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(UserError) as caught:
        build_corpus(data, vocab_size, 0, silent)
    assert isinstance(caught.value, DataError | ConfigError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def good_records(source: str) -> list[Any]:
    asked = questions(30)
    if source == "openmath":
        return [{"problem": q["question"], "generated_solution": "b", "expected_answer": "c"}
                for q in asked]
    if source == "slimorca":
        return [{"conversations": [{"from": "human", "value": q["question"]},
                                   {"from": "gpt", "value": q["answer"]}]} for q in asked]
    return asked


@pytest.mark.parametrize(
    ("source", "line", "says"),
    [
        ("gsm8k", '{"question": "x", "answer": ', "not JSON"),
        ("gsm8k", "[1, 2]", "list"),
        ("gsm8k", '"text"', "str"),
        ("gsm8k", '{"question": "x"}', "answer"),
        ("gsm8k", '{"question": 5, "answer": "x"}', "int"),
        ("gsm8k", '{"question": "x", "answer": null}', "NoneType"),
        ("gsm8k", '{"question": ["x"], "answer": "y"}', "list"),
        ("gsm8k", "[" * 100_000, "not JSON"),
        ("gsm8k", '{"question": "\\ud800 x", "answer": "y"}', ""),
        ("gsm8k", '{"question": "x", "answer": "\\ud800 y"}', ""),
        ("gsm8k", '{"question": ' + "1" * 5000 + ', "answer": "y"}', ""),
        ("openmath", '{"problem": "x", "generated_solution": "y"}', "expected_answer"),
        ("openmath", '{"problem": 1, "generated_solution": "y", "expected_answer": "1"}', "int"),
        ("openmath", '{"problem": "x", "generated_solution": null, "expected_answer": "1"}', ""),
        ("openmath", '{"problem": "x", "generated_solution": ["y"], "expected_answer": "1"}', ""),
        ("slimorca", '{"conversations": "text"}', "schema"),
        ("slimorca", '{"conversations": null}', "schema"),
        ("slimorca", '{"conversations": [{"from": "robot", "value": "x"}]}', "robot"),
        ("slimorca", '{"conversations": [{"from": "human", "value": 3}]}', "int"),
        ("slimorca", '{"conversations": []}', ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_record_is_refused_by_file_and_line(
    tmp_path: Path, source: str, line: str, says: str
) -> None:
    lines = good_records(source)
    path = write_lines(tmp_path / "d" / f"{source}.jsonl", [*lines[:16], line, *lines[16:]])
    message = refusal(local_data(tmp_path / "cache", path, source))
    assert f"{path}:17" in message
    assert says in message


def test_a_line_that_is_not_utf8_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", questions(30))
    lines = path.read_bytes().splitlines()
    lines[16] = '{"question": "é", "answer": "x"}'.encode("latin-1")
    path.write_bytes(b"\n".join(lines))
    message = refusal(local_data(tmp_path / "cache", path))
    assert f"{path}:17" in message
    assert "UTF-8" in message


def test_a_csv_record_is_refused_by_the_line_that_an_editor_shows(tmp_path: Path) -> None:
    rows = [f"{q['question']},{q['answer'].splitlines()[0]}" for q in questions(30)]
    rows[15] = "no answer here,"
    path = write_lines(tmp_path / "a.csv", ["question,answer", *rows])
    assert f"{path}:17" in refusal(local_data(tmp_path / "cache", path))


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    source = "text" if suffix == ".txt" else "gsm8k"
    assert path.name in refusal(local_data(tmp_path / "cache", path, source))


@pytest.mark.parametrize("suffix", [".jsonl.xz", ".tsv", ""])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path, suffix: str) -> None:
    path = write_lines(tmp_path / f"a{suffix}", questions(30))
    message = refusal(local_data(tmp_path / "cache", path))
    assert str(path) in message
    assert ".jsonl" in message and ".parquet" in message


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_damaged_table_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b'question,answer\n"a,b\n')
    assert str(path) in refusal(local_data(tmp_path / "cache", path))


def test_a_missing_path_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    message = refusal(local_data(tmp_path / "cache", path))
    assert "data.path" in message and str(path) in message


def test_a_missing_held_out_path_is_refused_by_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", questions(30))
    message = refusal(
        local_data(tmp_path / "cache", path, heldout_path=str(tmp_path / "none.jsonl"))
    )
    assert "data.heldout_path" in message and "none.jsonl" in message


def test_a_folder_without_the_sources_file_is_refused_with_what_is_expected(
    tmp_path: Path,
) -> None:
    (tmp_path / "d").mkdir()
    message = refusal(local_data(tmp_path / "cache", tmp_path / "d"))
    assert str(tmp_path / "d") in message and "train.jsonl" in message


def test_files_of_other_names_in_a_folder_are_told_with_what_is_expected(tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "monday.jsonl", questions(30))
    message = refusal(local_data(tmp_path / "cache", tmp_path / "d"))
    assert "found monday.jsonl" in message and "train-00000.jsonl" in message


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val", "dev"])
def test_a_held_out_part_beside_the_train_part_is_found_by_its_usual_names(
    tmp_path: Path, name: str
) -> None:
    write_lines(tmp_path / "d" / "train.jsonl", questions(20))
    write_lines(tmp_path / "d" / f"{name}.jsonl", questions(4, first=100))
    corpus = build_corpus(local_data(tmp_path / "cache", tmp_path / "d"), 400, 0, silent)
    assert (len(corpus.train), len(corpus.heldout)) == (20, 4)


@pytest.mark.parametrize(("changes", "says"), [
    ({"broken_rows": BrokenRows.DROP, "source": "openmath"}, "20 broken rows dropped"),
    ({"same": True}, "20 documents .* are too few .*19 duplicates"),
    ({"heldout_path": "a.jsonl"}, "20 held out, 20 left out for they repeat what is held out"),
    ({"heldout_fraction": 1e-9}, "the heldout part is empty: 20 documents"),
])
def test_a_part_that_is_empty_says_what_became_of_the_documents(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    records, changes = questions(20), {**changes}
    if changes.pop("same", False):
        records, changes["heldout_fraction"] = records[:1] * 20, 1e-9
    path = write_lines(tmp_path / "a.jsonl", records)
    if "heldout_path" in changes:
        changes["heldout_path"] = str(path)
    message = refusal(local_data(tmp_path / "cache", path, **changes))
    assert re.search(says, message), message
    assert "data.heldout_fraction" in message


@pytest.mark.parametrize("content", [
    "\ufeff{lines}", "\ufeff[{records}]", "\n\n{lines}\n\n", "{windows}",
])
def test_what_editors_of_windows_leave_in_a_file_does_not_matter(
    tmp_path: Path, content: str
) -> None:
    rows = [json.dumps(record) for record in questions(20)]
    text = content.replace("{lines}", "\n".join(rows)).replace("{records}", ",\n".join(rows))
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.replace("{windows}", "\r\n".join(rows)).encode())
    corpus = build_corpus(local_data(tmp_path / "cache", path), 400, 0, silent)
    assert len(corpus.train) + len(corpus.heldout) == 20
    assert not any("\ufeff" in text for text in texts_of(corpus, corpus.train))


def test_a_file_of_an_unknown_kind_is_refused_whatever_is_in_the_cache(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", questions(20))
    build_corpus(local_data(tmp_path / "cache", path), 400, 0, silent)
    renamed = path.rename(tmp_path / "a.md")
    assert "unknown kind of file" in refusal(local_data(tmp_path / "cache", renamed))


def test_one_file_for_two_sources_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", questions(30))
    data = local_data(tmp_path / "cache", path, sources=["gsm8k", "openmath"])
    message = refusal(data)
    assert str(path) in message
    assert "gsm8k.jsonl and openmath.jsonl" in message


@pytest.mark.parametrize(
    ("changes", "key", "names"),
    [
        ({"sources": ["gsm9k"]}, "training.data.sources", "gsm9k"),
        ({"mix_ratios": {"reasoning": 0.5, "tool_use": 0.5}},
         "training.data.mix_ratios.tool_use", "gsm8k"),
        ({"mix_ratios": {"resoning": 1.0}}, "training.data.mix_ratios.resoning", "reasoning"),
        ({"sources": ["text"], "mix_ratios": {"general": 1.0}, "path": None},
         "data.path", "text"),
    ],
)
def test_a_recipe_that_cannot_be_made_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], key: str, names: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", questions(30))
    message = refusal(local_data(tmp_path / "cache", path, **changes))
    assert key in message
    assert names in message


def test_the_default_mix_gives_way_to_the_kinds_of_other_sources() -> None:
    default = DataConfig()
    assert mix_of(default) == default.mix_ratios
    assert mix_of(DataConfig(sources=["slimorca"])) == {"general": 1.0}
    ratios = default.mix_ratios
    both = ratios["reasoning"] + ratios["general"]
    assert mix_of(DataConfig(sources=["slimorca", "gsm8k"])) == {
        "reasoning": ratios["reasoning"] / both, "general": ratios["general"] / both,
    }


def test_a_tokenizer_that_is_missing_or_damaged_is_refused_by_key_and_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", questions(30))
    (tmp_path / "damaged.json").write_text("{}", encoding="utf-8")
    for name in ("none.json", "damaged.json"):
        data = local_data(tmp_path / "cache", path, tokenizer=str(tmp_path / name))
        message = refusal(data)
        assert "training.data.tokenizer" in message
        assert name in message


def test_a_tokenizer_too_large_for_the_model_is_refused_with_both_sizes(
    tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", questions(30))
    saved = tmp_path / "tokenizer.json"
    saved.write_text(tokenizer.to_json(), encoding="utf-8")
    message = refusal(local_data(tmp_path / "cache", path, tokenizer=str(saved)), 500)
    assert str(saved) in message
    assert str(tokenizer.size) in message and "500" in message


OFFLINE = {"HF_HUB_OFFLINE": "1"}
DEAF = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # where nothing listens
PINNED = "{'gsm8k': 40 * 'a'}"


@pytest.mark.parametrize(("endpoint", "revisions"), [
    (OFFLINE, "{}"), (DEAF, "{}"), ({"HF_ENDPOINT": "http://no-such-host.invalid"}, "{}"),
    (OFFLINE, PINNED),
    pytest.param(DEAF, PINNED, marks=pytest.mark.slow),  # `datasets` tries again for 20 s
])
def test_a_hub_source_without_network_is_refused_with_the_way_out(
    tmp_path: Path, endpoint: dict[str, str], revisions: str
) -> None:
    code = (
        "import sys\n"
        "from svend.data.corpus import build_corpus\n"
        "from svend.errors import DataError\n"
        "from svend.pipeline.config import DataConfig\n"
        "data = DataConfig(sources=['gsm8k'], mix_ratios={'reasoning': 1.0}, num_samples=5,\n"
        f"    cache_dir=sys.argv[1], revisions={revisions})\n"
        "try:\n"
        "    build_corpus(data, 400, 0, lambda _: None)\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = python(code, str(tmp_path / "cache"), HF_HOME=str(tmp_path / "hub"), **endpoint)
    [line] = done.stdout.splitlines()
    assert "gsm8k" in line
    assert "data.path" in line
    assert "Traceback" not in done.stderr


def test_generated_sources_are_located_without_being_read() -> None:
    parts = locate_sources(embedded_data(Path("unused"), 10**9), 0)
    assert [part.source.name for part in parts] == ["gym_reasoning", "gym_tool_use", "gym_general"]


def test_the_question_is_what_parts_are_kept_apart_by() -> None:
    def asked(question: str, answer: str) -> Document:
        return conversation((Role.USER, question), (Role.ASSISTANT, answer))

    digest = asked("What is 2 + 2?", "4").question_digest
    assert asked("what  is\n2 + 2? ", "four").question_digest == digest
    assert asked("What is 2 + 3?", "4").question_digest != digest
