"""MATH: problems from mathematics competitions (Hendrycks et al. 2021, arXiv:2103.03874).

By default its 500 test problems of Lightman et al. 2023 (arXiv:2305.20050).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from svend.data.documents import Message, Role
from svend.evaluation.benchmark import (
    Answer,
    Benchmark,
    Problem,
    ProblemSource,
    Score,
    share_correct,
)
from svend.evaluation.reading import DatasetPlace, PlacedRecord, choose, read_records
from svend.isolation import IsolatedCaller, IsolatedCallError, TimeLimitExceeded

DATASET = DatasetPlace("math", ("test", "math"), "HuggingFaceH4/MATH-500")
TIMEOUT_SECONDS = 5.0
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
# Longer text is no answer, and takes the parser time by its square.
MAX_ANSWER_CHARACTERS = 300


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` or `\fbox{...}` holds, or the one token of `\boxed 5`.

    Braces may nest; escaped ones, as of a set, need no partner. None where there is no box, or the
    last one is not closed.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    after = text[boxes[-1].end():].lstrip()
    if not after.startswith("{"):
        token = re.match(r"\\?[^\s${}\\]+", after)
        return token.group().rstrip(".,;") if token else None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", after, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return after[1:brace.start()].strip()
    return None


def equivalent(expected: str, answered: str) -> bool:
    """Return whether two LaTeX expressions are equal in value, by the library math-verify.

    May take any time and memory: call it in a process of its own. What the library cannot read is
    equal to nothing but its own text.
    """
    import math_verify  # loads sympy

    # Its own limits are off, and that they are is not worth a warning: the caller has another.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [
        math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=0) for text in (expected, answered)
    ]
    if not all(parsed):
        return False
    return bool(math_verify.verify(*parsed, timeout_seconds=0))


def warm_up() -> None:
    """Load the libraries and build the parsers before the first call counts against its limit."""
    equivalent(r"\frac{1}{2}", "0.5")


def read_problems(source: ProblemSource) -> list[Problem]:
    """Return the problems: the bare question.

    The expected answer is the column `answer` where there is one, else the last box of `solution`.
    """
    problems = [
        _problem(record, index) for index, record in enumerate(read_records(source, DATASET))
    ]
    return choose(problems, source)


def score(problem: Problem, answer: Answer) -> Score:
    """Score one answer; where there are many, `score_many` starts its process but once."""
    return score_many([problem], [answer])[0]


def score_many(problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Score]:
    """Compare each answer's last box to the expected answer, as expressions.

    An answer without a box is wrong, and so is one that cannot be compared within the time limit.
    The process that compares them is started when first needed, and ends with the last answer.
    """
    with IsolatedCaller(prepare=(f"{__name__}:warm_up",)) as caller:
        return [_score(p, a, caller) for p, a in zip(problems, answers, strict=True)]


def _score(problem: Problem, answer: Answer, caller: IsolatedCaller) -> Score:
    answered = last_boxed(answer.text)
    if not answered:
        return Score(False, "", r"no \boxed{} with an answer")
    if answered == problem.expected:
        return Score(True, answered)
    if len(answered) > MAX_ANSWER_CHARACTERS:
        return Score(False, answered[:MAX_ANSWER_CHARACTERS], "too long for an answer")
    try:
        equal = caller.call(
            f"{__name__}:equivalent", [problem.expected, answered], TIMEOUT_SECONDS
        )
    except TimeLimitExceeded:
        return Score(False, answered, f"could not be compared within {TIMEOUT_SECONDS:g} s")
    except IsolatedCallError as error:
        return Score(False, answered, f"could not be compared ({error})")
    return Score(equal, answered, "" if equal else "not equivalent to what is expected")


def _problem(record: PlacedRecord, index: int) -> Problem:
    if "answer" in record.values:
        expected = record.text("answer").strip()
    else:
        boxed = last_boxed(record.text("solution"))
        if not boxed:
            raise record.error(r"'solution' has no \boxed{} with the expected answer")
        expected = boxed
    subject = next((str(record.values[name]) for name in ("subject", "type")
                    if record.values.get(name)), "")
    return Problem(
        f"math/{index}", _level(record), (Message(Role.USER, record.text("problem")),), expected,
        {"subject": subject},
    )


def _level(record: PlacedRecord) -> str:
    """The level as a metric's name can hold it: `Level 5` and 5 are level_5, the rest unknown."""
    digit = re.search(r"[1-5]", str(record.column("level")))
    return f"level_{digit.group()}" if digit else "level_unknown"


MATH = Benchmark(
    name="math",
    read=read_problems,
    score=score,
    score_many=score_many,
    summarize=share_correct("math_accuracy"),
    max_new_tokens=1024,
    metrics=("math_accuracy",),
)
