"""GSM8K: what is read out of an answer, and what models score that know nothing."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svend.data.documents import Message, Role
from svend.evaluation.benchmark import Answer, Problem, ProblemSource, Sample
from svend.evaluation.gsm8k import GSM8K, read_result
from svend.evaluation.measurement import Measurement
from tests.conftest import SHARED_DATA

FOLDER = SHARED_DATA / "gsm8k"
with_data = pytest.mark.skipif(not FOLDER.exists(), reason="needs GSM8K's files")


def is_right(expected: str, text: str) -> bool:
    problem = Problem("x", "gsm8k", (), expected, Decimal(expected))
    return GSM8K.score(problem, Answer((Message(Role.ASSISTANT, text),), 1)).correct


def accuracy(problems: list[Problem], text: str) -> Measurement:
    answer = Answer((Message(Role.ASSISTANT, text),), 1)
    samples = [Sample(p, answer, GSM8K.score(p, answer)) for p in problems]
    return GSM8K.summarize(samples)["gsm8k_accuracy"]


@pytest.mark.parametrize("text", [
    "9 * 2 = 18\n#### 18", "#### 18.", "#### 18.00", "#### $18", "#### 18 dollars", "#### 18%",
    "#### \\$18", "#### €18.0", "####18", "####  18", "#### 18\n#### 19", "####\n#### 18",
    "#### x\n#### 18", "#### 18<|end|>", "#### 018", "#### 18, as said",
])
def test_the_number_after_the_mark_counts_whatever_stands_around_it(text: str) -> None:
    assert is_right("18", text)


@pytest.mark.parametrize("text", [
    "18", "The answer is 18.", "", "####", "#### eighteen", "### 18", "#### 1.8.", "#### 1.2.3",
    "#### 19\n#### 18", "#### -18", "#### $-18", "#### .", "#### ,", "#### 180", "#### 18.01",
])
def test_another_number_or_none_after_the_mark_is_wrong(text: str) -> None:
    assert not is_right("18", text)


@pytest.mark.parametrize(("expected", "text"), [
    ("1200", "#### $1,200"), ("1200", "#### 1,200.00 a year"), ("-5", "#### -5"),
    ("-5", "#### -$5"), ("-5", "#### $-5"), ("-5", "#### \u22125"), ("0.5", "#### .5"),
    ("0.5", "#### 0.50"), ("1000000", "#### 1,000,000"),
])
def test_commas_signs_and_currencies_do_not_hide_the_number(expected: str, text: str) -> None:
    assert is_right(expected, text)


def test_a_number_is_exact_whatever_its_length() -> None:
    digits = "7" * 1_500_000  # more than decimal arithmetic has room for
    assert read_result(f"#### -{digits}") == Decimal(f"-{digits}")
    assert not is_right("-" + digits[:60], f"#### -{digits[:59]}8")


def test_what_a_tool_returned_is_no_answer() -> None:
    problem = Problem("x", "gsm8k", (), "18", Decimal(18))
    called = Answer((Message(Role.TOOL_CALL, "{}"), Message(Role.TOOL, "#### 18")), 1)
    assert not GSM8K.score(problem, called).correct


@given(st.decimals(-10**9, 10**9, places=2), st.sampled_from(["", "$", "£"]), st.booleans())
def test_a_written_number_is_read_back(number: Decimal, currency: str, commas: bool) -> None:
    digits = f"{abs(number):,f}" if commas else f"{abs(number):f}"
    sign = "-" if number < 0 else ""
    assert read_result(f"thus\n#### {sign}{currency}{digits} units") == number


@given(st.text("#0123456789.,-$ \n", max_size=60))
def test_no_text_is_beyond_the_reader(text: str) -> None:
    number = read_result(text)
    assert number is None or number.is_finite()


@with_data
def test_every_reference_answer_of_the_real_test_is_right() -> None:
    problems = GSM8K.read(ProblemSource(path=FOLDER))
    assert len(problems) == 1319
    lines = (FOLDER / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(problems)
    for problem in problems:
        assert is_right(problem.expected, f"#### {problem.expected}")
        assert problem.messages == (Message(Role.USER, problem.question),)


@with_data
def test_answers_that_look_at_no_question_score_three_percent_at_most() -> None:
    problems = GSM8K.read(ProblemSource(path=FOLDER))
    five = accuracy(problems, "#### 5")
    assert five.value == 40 / 1319
    assert five.interval == pytest.approx((0.0223, 0.0410), abs=1e-4)
    # 5 is also the most frequent of the test's results; the training data's is 4.
    [(most_frequent, count)] = Counter(p.reference for p in problems).most_common(1)
    assert (most_frequent, count) == (5, 40)
    train = GSM8K.read(ProblemSource(path=FOLDER / "train.jsonl"))
    [(of_training, _)] = Counter(p.reference for p in train).most_common(1)
    assert of_training == 4
    assert accuracy(problems, "#### 4").value == 35 / 1319
    assert accuracy(problems, "5").value == 0.0
