"""GSM8K: word problems of grade-school arithmetic (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from svend.data.documents import Message, Role
from svend.evaluation.benchmark import (
    Answer,
    Benchmark,
    Problem,
    ProblemSource,
    Score,
    share_correct,
)
from svend.evaluation.reading import DatasetPlace, choose, read_records

DATASET = DatasetPlace("gsm8k", ("test", "gsm8k"), "openai/gsm8k", subset="main")
# A sign may stand before or after the currency; U+2212 is the typographic minus.
RESULT = re.compile(r"####[ \t]*([-\u2212]?)[ \t]*\\?[$€£¥]?[ \t]*([-\u2212]?)([0-9.,]+)")


def read_result(text: str) -> Decimal | None:
    """Return the number after the first `####` that one follows; None where there is none.

    As in the reference evaluation, commas are dropped, and what follows the number does not count,
    such as a unit. Beyond it, a currency sign may come first, and a full stop last. None also where
    the characters are no number, as in `#### 1.2.3`.
    """
    found = RESULT.search(text)
    if found is None:
        return None
    before, after, digits = found.groups()
    try:
        value = Decimal(digits.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    # Unlike unary minus, this neither rounds nor overflows, however long the number.
    return value.copy_negate() if before or after else value


def read_problems(source: ProblemSource) -> list[Problem]:
    """Return the problems: the bare question, as training data in this format has it."""
    problems = []
    for index, record in enumerate(read_records(source, DATASET)):
        result = read_result(record.text("answer"))
        if result is None:
            raise record.error("'answer' has no `#### NUMBER`; the expected result stands there")
        problems.append(Problem(
            f"gsm8k/{index}", "gsm8k", (Message(Role.USER, record.text("question")),),
            f"{result:f}", result,
        ))
    return choose(problems, source)


def score(problem: Problem, answer: Answer) -> Score:
    """Compare the answer's result to the expected one, as numbers: 18.00 is 18.

    The reference evaluation compares the characters, and is what this comes to where results are
    written as the data set writes them. An answer without `####` is wrong: no other number in it is
    looked for.
    """
    result = read_result(answer.text)
    if result is None:
        return Score(False, "", "no `#### NUMBER` in the answer")
    correct = result == problem.reference
    return Score(correct, f"{result:f}", "" if correct else "another number than expected")


GSM8K = Benchmark(
    name="gsm8k",
    read=read_problems,
    score=score,
    summarize=share_correct("gsm8k_accuracy"),
    max_new_tokens=512,
    metrics=("gsm8k_accuracy",),
)
