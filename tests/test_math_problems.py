"""MATH: boxes, equivalence of expressions, and hostile ones within the time limit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svend.data.documents import Message, Role
from svend.errors import DataError
from svend.evaluation import math_problems
from svend.evaluation.benchmark import Answer, Problem, ProblemSource, Sample, Score
from svend.evaluation.math_problems import MATH, last_boxed
from svend.isolation import IsolatedCaller

# Our own problems, in the schema of HuggingFaceH4/MATH-500 and of hendrycks/competition_math.
WITH_ANSWER = [
    {"problem": "How many sides have three triangles in all?", "solution": "It is $\\boxed{9}$.",
     "answer": "9", "subject": "Prealgebra", "level": 1, "unique_id": "own/1"},
    {"problem": "Find the positive root of $x^2 = 12$.", "solution": "$x = \\boxed{2\\sqrt{3}}$",
     "answer": "2\\sqrt{3}", "subject": "Algebra", "level": 5, "unique_id": "own/2"},
]
WITHOUT_ANSWER = [
    {"problem": "Halve one.", "level": "Level 2", "type": "Prealgebra",
     "solution": "First \\boxed{1} is halved: $\\boxed{\\frac{1}{2}}$."},
    {"problem": "Which set has just 1 and 2?", "level": "Level ?", "type": "Algebra",
     "solution": "$\\boxed{\\{1, 2\\}}$"},
]

EQUAL = [
    (r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", r"\dfrac12"), ("x^2+2x+1", "(x+1)^2"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("1,000", "1000"), (r"\{1, 2\}", r"\{2,1\}"), ("(3,4)", "(3, 4)"),
    (r"\text{even}", "even"), (r"90^\circ", "90"), ("5", "x = 5"), (r"1 \le x \le 2", "[1,2]"),
]
UNEQUAL = [
    ("2", "3"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("(3,4)", "(4,3)"), ("[3,4)", "(3,4)"),
    (r"\text{even}", "odd"), (r"\pi", "3.14"), ("x+1", "x-1"), ("5", "None"), ("None", ""),
    ("None", "null"), (r"\quad", r"\,"),
]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def scored(*pairs: tuple[str, str]) -> list[Score]:
    """Score texts, each against what is expected."""
    problems = [Problem(f"p{n}", "level_1", (), expected) for n, (expected, _) in enumerate(pairs)]
    return MATH.score_all(
        problems, [Answer((Message(Role.ASSISTANT, text),), 1) for _, text in pairs]
    )


@pytest.fixture(scope="module")
def compared() -> dict[tuple[str, str], bool]:
    """Whether each pair of both tables counts as equal, by one process."""
    pairs = [*EQUAL, *UNEQUAL]
    scores = scored(*((e, rf"Therefore $\boxed{{{answered}}}$.") for e, answered in pairs))
    return {pair: score.correct for pair, score in zip(pairs, scores, strict=True)}


@pytest.mark.parametrize(("text", "boxed"), [
    (r"so \boxed{4}", "4"),
    (r"\boxed{3}, no: \boxed{ 4 }.", "4"),
    (r"\boxed{\frac{1}{2}} of it", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.} and {more}", r"\left\{ x \right."),
    (r"\fbox{7}", "7"),
    (r"\boxed {8}", "8"),
    (r"\boxed 5.", "5"),
    (r"$\boxed5$", "5"),
    (r"\boxed{}", ""),
    (r"\boxed{5", None),
    (r"\boxed{4} then \boxed{5", None),
    (r"\boxedx{4}", None),
    (r"\boxed", None),
    ("4", None),
])
def test_the_last_box_is_read_with_its_braces(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@given(st.recursive(
    st.text("ab1+ ", max_size=5) | st.sampled_from(["\\{", "\\}", "\\frac", "\\\\"]),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
))
def test_whatever_is_boxed_is_read_back(content: str) -> None:
    assert last_boxed(f"before {{ \\boxed{{0}} then \\boxed{{{content}}} after }}") == (
        content.strip()
    )


def test_problems_of_both_schemas_have_their_answer_and_level(tmp_path: Path) -> None:
    file = write(tmp_path / "test.jsonl", *WITH_ANSWER, *WITHOUT_ANSWER)
    problems = sorted(MATH.read(ProblemSource(path=tmp_path)), key=lambda p: p.problem_id)
    assert [p.expected for p in problems] == ["9", r"2\sqrt{3}", r"\frac{1}{2}", r"\{1, 2\}"]
    assert [p.group for p in problems] == ["level_1", "level_5", "level_2", "level_unknown"]
    assert [p.reference["subject"] for p in problems] == [
        "Prealgebra", "Algebra", "Prealgebra", "Algebra"
    ]
    assert [p.question for p in problems] == [r["problem"] for r in WITH_ANSWER + WITHOUT_ANSWER]
    broken = WITHOUT_ANSWER[0] | {"solution": "It is one half."}
    write(file, *WITH_ANSWER, broken)
    with pytest.raises(DataError, match=r"test\.jsonl:3: 'solution' has no \\boxed\{\}"):
        MATH.read(ProblemSource(path=tmp_path))


@pytest.mark.parametrize("pair", EQUAL, ids=str)
def test_equal_expressions_are_right_however_they_are_written(
    pair: tuple[str, str], compared: dict[tuple[str, str], bool]
) -> None:
    assert compared[pair]


@pytest.mark.parametrize("pair", UNEQUAL, ids=str)
def test_other_expressions_are_wrong_also_where_neither_can_be_read(
    pair: tuple[str, str], compared: dict[tuple[str, str], bool]
) -> None:
    assert not compared[pair]


def test_an_answer_without_a_box_is_wrong() -> None:
    no_box, empty = scored(("4", "The answer is 4."), ("4", ""))
    assert no_box.reason == r"no \boxed{} with an answer"
    assert not no_box.correct
    assert not empty.correct


@pytest.mark.parametrize("hostile", [
    r"9^{9^{9^{9}}}",
    *(pytest.param(text, marks=pytest.mark.slow)
      for text in ("10000000000!", r"\binom{10000000}{5000000}", "(" * 140 + "2" + ")" * 140)),
])
def test_a_hostile_answer_costs_its_time_limit_and_the_next_is_scored(
    hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math_problems, "TIMEOUT_SECONDS", 0.5)
    start = time.monotonic()
    before, found, after = scored(
        ("5", r"\boxed{4+1}"), ("2", rf"\boxed{{{hostile}}}"), ("5", r"\boxed{10/2}")
    )
    # Without the limit it would be hours; most of it is the start of two processes.
    assert time.monotonic() - start < 60.0
    assert not found.correct
    assert "could not be compared" in found.reason
    assert before.correct
    assert after.correct


def test_scoring_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[psutil.Process] = []
    this, had = psutil.Process(), psutil.Process().children(recursive=True)

    class Watched(IsolatedCaller):
        def call(self, *arguments: Any) -> Any:
            result = super().call(*arguments)
            started.extend(child for child in this.children() if child not in had)
            return result

    monkeypatch.setattr(math_problems, "IsolatedCaller", Watched)
    assert scored(("5", r"\boxed{5}"))[0].correct
    assert not started, "equal text needs no process"
    assert all(score.correct for score in scored(("5", r"\boxed{4+1}"), ("6", r"\boxed{7-1}")))
    assert len(set(started)) == 1, "one process for all answers"
    assert this.children(recursive=True) == had


def test_an_answer_that_is_no_answer_by_its_length_is_not_parsed() -> None:
    start = time.monotonic()
    [found] = scored(("2", r"\boxed{" + "x+" * 100_000 + "1}"))
    assert found.reason == "too long for an answer"
    assert time.monotonic() - start < 1.0


def test_accuracy_is_reported_by_level(tmp_path: Path) -> None:
    problems = MATH.read(ProblemSource(path=write(tmp_path / "test.jsonl", *WITH_ANSWER)))
    nine = Answer((Message(Role.ASSISTANT, r"\boxed{9}"),), 1)
    scores = MATH.score_all(problems, [nine] * len(problems))
    assert [score.extracted for score in scores] == ["9", "9"]
    [right] = [problem for problem in problems if problem.expected == "9"]
    assert MATH.score(right, nine) == scores[problems.index(right)]
    measured = MATH.summarize([Sample(p, nine, s) for p, s in zip(problems, scores, strict=True)])
    assert {name: m.value for name, m in measured.items()} == {
        "math_accuracy": 0.5, "math_accuracy/level_1": 1.0, "math_accuracy/level_5": 0.0,
    }
