"""HumanEval: problems from files, code out of answers, unit tests in the sandbox, pass@k."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.data.documents import Message, Role
from svend.errors import DataError
from svend.evaluation.benchmark import Answer, Problem, ProblemSource, Sample, Score
from svend.evaluation.humaneval import (
    HUMANEVAL,
    complete_program,
    extract_code,
    pass_at_k,
    score_answers,
)
from svend.evaluation.measurement import wilson_interval
from tests.conftest import SHARED_DATA

HUMANEVAL_FILE = SHARED_DATA / "humaneval" / "HumanEval.jsonl.gz"
with_data = pytest.mark.skipif(not HUMANEVAL_FILE.exists(), reason="needs HumanEval's file")
with_sandbox = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

PROMPT = '''from math import floor

def half(x):
    return x / 2

def half_down(x: float) -> int:
    """ Return half of x, rounded down.
    >>> half_down(5)
    2
    """
'''
RECORD = {
    "task_id": "Own/0",
    "prompt": PROMPT,
    "canonical_solution": "    return floor(half(x))\n",
    "test": "def check(candidate):\n    assert candidate(5) == 2, 'odd'\n"
            "    assert half(3) == 1.5\n",
    "entry_point": "half_down",
}
WHOLE = "def half_down(x):\n    return floor(x / 2)\n"


def answer(text: str) -> Answer:
    return Answer((Message(Role.ASSISTANT, text),), tokens=1)


def write_records(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    [read] = HUMANEVAL.read(ProblemSource(write_records(tmp_path / "own.jsonl", RECORD)))
    return read


def test_the_prompt_is_asked_in_the_documented_wording(problem: Problem) -> None:
    assert problem.problem_id == "Own/0"
    assert problem.expected == RECORD["canonical_solution"]
    assert problem.messages == (Message(
        Role.USER,
        "Complete this Python function. Answer with the whole function in one code block.\n\n"
        f"```python\n{PROMPT}```",
    ),)


@pytest.mark.parametrize("name", ["HumanEval.jsonl.gz", "test.jsonl",
                                  "data/test-00000-of-00001.parquet", "humaneval/test.jsonl"])
def test_a_folder_may_hold_the_file_under_the_names_it_goes_by(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".parquet"):
        import pandas as pd

        pd.DataFrame([RECORD]).to_parquet(path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(json.dumps(RECORD).encode()))
    else:
        write_records(path, RECORD)
    assert [p.problem_id for p in HUMANEVAL.read(ProblemSource(tmp_path))] == ["Own/0"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"task_id": ', "not JSON"),
        ("[1]", "expected a JSON object, found list"),
        ({"test": None}, "'test' must be text, found NoneType"),
        ({"canonical_solution": 3}, "'canonical_solution' must be text, found int"),
        ({"prompt": " \n"}, "'prompt' is empty"),
        ({"entry_point": ""}, "'entry_point' is empty"),
        ({"entry_point": "third"}, "'prompt' does not define the entry point third"),
        ({"task_id": "Own/0"}, "task_id Own/0 is there twice"),
        (None, "column 'entry_point' is missing"),
    ],
    ids=["broken", "list", "null", "number", "blank prompt", "no entry point", "other function",
         "twice", "missing column"],
)
def test_a_line_that_is_no_problem_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write_records(tmp_path / "own.jsonl", RECORD)
    if not isinstance(line, str):
        changed = {**RECORD, "task_id": "Own/1", **(line or {})}
        if line is None:
            del changed["entry_point"]
        line = json.dumps(changed)
    with path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError) as caught:
        HUMANEVAL.read(ProblemSource(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert said in message
    assert "\n" not in message


def test_a_path_without_the_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        HUMANEVAL.read(ProblemSource(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no file for humaneval; expected HumanEval\.jsonl"):
        HUMANEVAL.read(ProblemSource(tmp_path))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: no records"):
        HUMANEVAL.read(ProblemSource(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (WHOLE, WHOLE),
        (f"Sure:\n\n```python\n{WHOLE}```\nIt rounds.", WHOLE),
        (f"```\n{WHOLE}```", WHOLE),
        (f"```py\r\n{WHOLE}```", WHOLE),
        (f"Cut off: \n```python\n{WHOLE}", WHOLE),
        (f"Use it so:\n```python\nhalf_down(3)\n```\n\n```python\n{WHOLE}```", WHOLE),
        (f"```python\n{WHOLE}```\n```python\ndef half_down(x): pass\n```", WHOLE),
        ("```python\n    return 1\n```", "    return 1\n"),
        ("```\nfirst\n```\n```\nsecond\n```", "first\n"),
        ("    return 1\n", "    return 1\n"),
        ("    return 1\n\ndef other():\n    return half_down(2)\n", "    return 1\n\n"),
        ("    return 1\nprint(half_down(2))", "    return 1\n"),
        ("    if x:\n        return 1\n    return 2\nif __name__", "    if x:\n        return 1\n"
                                                              "    return 2\n"),
        ("    return 1\n# Test\nclass A: pass", "    return 1\n"),
        ("half_down = lambda x: x", "half_down = lambda x: x"),
        ("    half_down == 3\n", "    half_down == 3\n"),
        ("def half_down_more(x): pass", ""),
        ("", ""),
    ],
)
def test_code_is_read_out_of_an_answer(text: str, code: str) -> None:
    assert extract_code(text, "half_down") == code


def test_a_continuation_follows_the_prompt_and_a_definition_what_precedes_it(
    problem: Problem,
) -> None:
    before = PROMPT.partition("def half_down")[0]
    assert complete_program("    return 1\n", problem.reference) == f"{PROMPT}    return 1\n"
    assert complete_program(WHOLE, problem.reference) == f"{before}\n{WHOLE}"


@with_sandbox
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"```python\n{WHOLE}```", ""),
        (PROMPT + "    return floor(half(x))\n", ""),
        ("    return floor(half(x))\n", ""),
        ("    return round(x)\n", "AssertionError: odd"),
        ("I do not know.", "SyntaxError: "),
        ("```python\ndef half_down(x):\n    return flor(x)\n```", "NameError: "),
        ("```python\nimport sys\nsys.exit(0)\n```", "SystemExit: 0"),
        (f"```python\n{WHOLE}raise SystemExit\n```", "SystemExit"),
        ("    while True: pass\n", "CPU time over 3 s"),
        ("  \n", "the answer holds no code"),
    ],
)
def test_an_answer_is_right_if_the_unit_tests_pass(
    problem: Problem, text: str, reason: str
) -> None:
    score = HUMANEVAL.score(problem, answer(text))
    assert score.correct == (reason == "")
    assert score.reason.startswith(reason)
    assert score.extracted == (extract_code(text, "half_down") if text.strip() else "")


@with_sandbox
def test_many_answers_get_the_scores_that_each_gets(problem: Problem) -> None:
    answers = [(problem, answer(text)) for text in ("", WHOLE, "    return 1\n", "", WHOLE)]
    assert score_answers(answers, parallel=3) == [HUMANEVAL.score(*pair) for pair in answers]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_correct_one(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9))
    correct = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    choices = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    expected = sum(any(choice) for choice in choices) / len(choices)
    assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_does_not_overflow_and_refuses_more_than_there_is() -> None:
    assert pass_at_k(10**6, 10**5, 100) == pytest.approx(1 - 0.9**100, rel=1e-4)
    with pytest.raises(ValueError, match="k = 3"):
        pass_at_k(2, 1, 3)


def samples_of(*correct: list[bool]) -> list[Sample]:
    return [
        Sample(Problem(f"Own/{index}", "humaneval", (), ""), answer(""), Score(passed))
        for index, of_problem in enumerate(correct) for passed in of_problem
    ]


def test_one_sample_of_each_problem_gives_a_proportion() -> None:
    measured = HUMANEVAL.summarize(samples_of([True], [False], [False], [True], [True]))
    assert list(measured) == ["humaneval_pass_at_1"]
    assert measured["humaneval_pass_at_1"].value == 0.6
    assert measured["humaneval_pass_at_1"].interval == wilson_interval(3, 5, 0.95)
    assert measured["humaneval_pass_at_1"].sample_size == 5


def test_several_samples_give_each_k_that_all_problems_allow() -> None:
    easy, hard, never = [True] * 12, [True] + [False] * 19, [False] * 10
    measured = HUMANEVAL.summarize(samples_of(easy, hard, never))
    assert list(measured) == ["humaneval_pass_at_1", "humaneval_pass_at_10"]
    assert measured["humaneval_pass_at_1"].value == pytest.approx((1 + 1 / 20) / 3)
    assert measured["humaneval_pass_at_10"].value == pytest.approx((1 + 10 / 20) / 3)
    # The samples of one problem are no independent ones: the interval knows three units.
    assert measured["humaneval_pass_at_1"].sample_size == 3
    low, high = measured["humaneval_pass_at_1"].interval or (0.0, 0.0)
    assert (low, high) == (0.0, 1.0)


@with_data
def test_a_limit_chooses_by_the_seed() -> None:
    def ids(limit: int | None, seed: int) -> list[str]:
        source = ProblemSource(HUMANEVAL_FILE, limit, seed)
        return [problem.problem_id for problem in HUMANEVAL.read(source)]

    assert sorted(ids(None, 0)) == sorted(f"HumanEval/{n}" for n in range(164))
    assert ids(8, 0) == ids(8, 0) != ids(8, 1)
    assert len(set(ids(8, 0))) == 8


@with_data
@with_sandbox
@pytest.mark.parametrize("count", [10, pytest.param(164, marks=pytest.mark.slow)])
def test_reference_solutions_pass_and_empty_bodies_do_not(count: int) -> None:
    problems = HUMANEVAL.read(ProblemSource(SHARED_DATA, limit=count))
    assert len(problems) == count
    references = [(p, answer(p.expected)) for p in problems]
    # Every other one is answered as by a chat model.
    fenced = [
        (p, answer(f"Here it is.\n\n```python\n{p.reference.prompt}{p.expected}```\n"))
        for p in problems
    ]
    empty = [(p, answer("    pass\n")) for p in problems]
    scores = score_answers([*references[::2], *fenced[1::2], *empty])
    failures = {p.problem_id: s.reason for (p, _), s in
                zip([*references[::2], *fenced[1::2]], scores, strict=False) if not s.correct}
    assert failures == {}
    assert [s.correct for s in scores[count:]] == [False] * count
