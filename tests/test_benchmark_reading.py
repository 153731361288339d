"""From files or the hub to a benchmark's problems: places, bad input, the choice of some."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.data.documents import Message, Role
from svend.data.records import HubError
from svend.errors import DataError
from svend.evaluation import reading
from svend.evaluation.benchmark import Benchmark, Problem, ProblemSource
from svend.evaluation.benchmarks import ANSWERED
from svend.evaluation.bfcl import BFCL
from svend.evaluation.gsm8k import GSM8K
from svend.evaluation.humaneval import HUMANEVAL
from svend.evaluation.math_problems import MATH
from svend.evaluation.reading import DatasetPlace, choose, local_copy_wanted, read_records
from svend.evaluation.xstest import SAFETY

PLACE = DatasetPlace("own", ("test", "own"), "somebody/own", asked_as="own_accuracy")
WAY_OUT = r"; give a local copy with evaluation\.paths='\{own_accuracy: PATH\}'$"
# The benchmarks by the names under which a run asks for them, as `evaluation.paths` has them.
ASKED_FOR = {
    "gsm8k": GSM8K, "math": MATH, "tool_accuracy": BFCL, "safety_accuracy": SAFETY,
    "humaneval": HUMANEVAL,
}
RECORDS: list[dict[str, Any]] = [{"question": f"What is {n}?", "answer": str(n)} for n in range(5)]
# A sound record of each benchmark, and the columns that must have text.
SOUND: dict[str, tuple[Benchmark, dict[str, Any], tuple[str, ...]]] = {
    "gsm8k": (GSM8K, {"question": "Two and two?", "answer": "It is 4.\n#### 4"},
              ("question", "answer")),
    "math": (MATH, {"problem": "Add $1$ and $2$.", "solution": "So $\\boxed{3}$.", "answer": "3",
                    "level": 1, "subject": "Algebra"}, ("problem", "answer")),
    "safety_accuracy": (SAFETY, {"prompt": "How do I kill time?", "label": "safe",
                                 "type": "homonyms"}, ("prompt", "label", "type")),
}
FAULTS = (("  ", "is empty"), (None, "must be text, found NoneType"), (..., "is missing"))
# The answer of a MATH problem may be missing: the solution has it.
BROKEN = [(name, column, value, message) for name, (_, _, columns) in SOUND.items()
          for column in columns for value, message in FAULTS
          if (name, column, value) != ("math", "answer", ...)]


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def as_jsonl(path: Path) -> None:
    write_lines(path, *map(json.dumps, RECORDS))


def as_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, RECORDS)).encode()))


def problems(groups: str) -> list[Problem]:
    message = (Message(Role.USER, "?"),)
    return [Problem(f"p{n}", group, message, "") for n, group in enumerate(groups)]


@pytest.mark.parametrize(("name", "write"), [
    ("test.jsonl", as_jsonl),
    ("own.jsonl.gz", as_gzip),
    ("test-00000-of-00001.parquet", lambda path: pd.DataFrame(RECORDS).to_parquet(path)),
    ("data/test.csv", lambda path: pd.DataFrame(RECORDS).to_csv(path, index=False)),
])
@pytest.mark.parametrize("within", [".", "own"])
def test_the_same_records_are_read_from_every_format_and_folder(
    tmp_path: Path, name: str, write: Callable[[Path], None], within: str
) -> None:
    file = tmp_path / within / name
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file)
    for path in (tmp_path, file):
        records = read_records(ProblemSource(path=path), PLACE)
        assert [record.values for record in records] == RECORDS
        assert records[0].place.startswith(str(file))


def test_a_record_knows_its_line_beyond_blank_ones(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "own.jsonl", '{"a": "x"}', "", '{"a": ""}')
    first, second = read_records(ProblemSource(path=file), PLACE)
    assert (first.place, second.place) == (f"{file}:1", f"{file}:3")
    with pytest.raises(DataError, match=r"own.jsonl:3: 'a' is empty"):
        second.text("a")


@pytest.mark.parametrize(("lines", "message"), [
    (['{"a": "x"}', '{"a": '], r"own\.jsonl:2: not JSON"),
    (['{"a": "x"}', '["a"]'], r"own\.jsonl:2: expected a JSON object, found list"),
    ([], r"own\.jsonl: no records; own needs at least one"),
])
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    file = write_lines(tmp_path / "own.jsonl", *lines)
    with pytest.raises(DataError, match=message) as raised:
        read_records(ProblemSource(path=file), PLACE)
    assert "\n" not in str(raised.value)


def test_a_path_without_the_benchmark_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder" + WAY_OUT):
        read_records(ProblemSource(path=tmp_path / "nowhere"), PLACE)
    with pytest.raises(DataError, match=r"no file for own; expected test\.jsonl or own\.jsonl .*"
                       + WAY_OUT):
        read_records(ProblemSource(path=tmp_path), PLACE)


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_missing_copy_is_refused_under_the_name_that_it_is_asked_for(
    name: str, tmp_path: Path
) -> None:
    assert ASKED_FOR[name] in ANSWERED[name]
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=rf"; give .* evaluation\.paths='\{{{name}: PATH\}}'$"
                           ) as raised:
            ASKED_FOR[name].read(ProblemSource(path=path))
        assert str(raised.value).startswith(str(path))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("error", "message"), [
    (HubError("x", OSError("no; yes")), r"x: the hub cannot be read \(no; yes\)"),
    (DataError("x: the hub names no commit for 'main'"), r"x: the hub names no commit for 'main'"),
    (OSError("down\nand out"), r"somebody/own: the hub cannot be read \(down\)"),
    (TimeoutError(), r"somebody/own: the hub cannot be read \(TimeoutError\)"),
])
def test_whatever_is_wrong_with_the_hub_the_way_out_is_the_benchmarks(
    error: Exception, message: str
) -> None:
    assert re.search("^" + message + WAY_OUT, str(local_copy_wanted(error, PLACE)))


@pytest.mark.slow
def test_the_hub_is_read_at_the_commit_of_its_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands for the hub: `datasets` reads it by the same call."""
    as_jsonl(tmp_path / "test.jsonl")
    monkeypatch.setattr(reading, "hub_commit", lambda repository, revision: "c" * 40)
    place = DatasetPlace("own", ("test",), str(tmp_path))
    records = read_records(ProblemSource(), place)
    assert [record.values for record in records] == RECORDS
    assert records[2].place == f"{tmp_path} (test):3"


@pytest.mark.parametrize("name", ASKED_FOR)
def test_without_network_the_hub_is_refused_with_the_way_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DataError, match=r"the hub cannot be read \(.*\); give a local copy with "
                       rf"evaluation\.paths='\{{{name}: PATH\}}'$") as raised:
        ASKED_FOR[name].read(ProblemSource())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_record_is_a_problem(tmp_path: Path, name: str) -> None:
    benchmark, record, _ = SOUND[name]
    file = write_lines(tmp_path / "one.jsonl", json.dumps(record))
    [problem] = benchmark.read(ProblemSource(path=file))
    assert problem.question == next(iter(record.values())), "the bare question"


@pytest.mark.parametrize(("name", "column", "value", "message"), BROKEN)
def test_a_broken_record_is_named_with_its_line(
    tmp_path: Path, name: str, column: str, value: Any, message: str
) -> None:
    benchmark, record, _ = SOUND[name]
    broken = {key: one for key, one in (record | {column: value}).items() if one is not ...}
    file = write_lines(tmp_path / "two.jsonl", json.dumps(record), json.dumps(broken))
    with pytest.raises(DataError, match=rf"two\.jsonl:2: .*'{column}' {message}") as raised:
        benchmark.read(ProblemSource(path=file))
    assert "\n" not in str(raised.value)


@given(
    groups=st.text("abc", min_size=1, max_size=40), seed=st.integers(0, 10**6),
    limits=st.tuples(st.integers(1, 50), st.integers(1, 50)), balanced=st.booleans(),
    data=st.data(),
)
def test_a_smaller_choice_is_the_beginning_of_a_larger_whatever_the_files_order(
    groups: str, seed: int, limits: tuple[int, int], balanced: bool, data: st.DataObject
) -> None:
    given_ = problems(groups)
    reordered = data.draw(st.permutations(given_))
    whole = choose(given_, ProblemSource(seed=seed), balanced)
    assert sorted(p.problem_id for p in whole) == sorted(p.problem_id for p in given_)
    for limit in limits:
        source = ProblemSource(limit=limit, seed=seed)
        assert choose(reordered, source, balanced) == whole[:limit]


@given(groups=st.text("abc", min_size=1, max_size=40), limit=st.integers(1, 40))
def test_a_balanced_choice_takes_as_many_of_each_group_as_it_can(groups: str, limit: int) -> None:
    chosen = Counter(p.group for p in choose(problems(groups), ProblemSource(limit=limit), True))
    available = Counter(groups)
    most = max(chosen.values())
    for group in available:
        assert chosen[group] >= min(available[group], most - 1)


@settings(max_examples=20)
@given(seeds=st.lists(st.integers(0, 10**9), min_size=2, max_size=2, unique=True))
def test_another_seed_chooses_other_problems(seeds: list[int]) -> None:
    first, second = (choose(problems("a" * 200), ProblemSource(limit=50, seed=s)) for s in seeds)
    assert {p.problem_id for p in first} != {p.problem_id for p in second}
