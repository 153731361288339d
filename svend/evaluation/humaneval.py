"""HumanEval: complete a Python function so that its unit tests pass (Chen et al. 2021).

The model is shown a function's signature and docstring in the wording of `INSTRUCTION`. Its answer
becomes a program as follows.

- Code is the first fenced block that defines the function; else the first fenced block; without
  fences, the whole text. A block that is not closed ends with the text.
- Code that defines the function stands alone, after what the prompt has before it (imports, and
  helpers that the tests may call).
- Other code continues the prompt, and without a fence it ends where the paper ends a completion:
  before a line that begins with `class`, `def`, `#`, `if` or `print` (section 2.1).

The program and the benchmark's tests run in the sandbox, with the standard library alone. The
paper's own harness allows 3 seconds of wall-clock time; here it is CPU time, so that a busy machine
does not decide. Metrics are pass@k, by the paper's unbiased estimator.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from svend.data.documents import Message, Role
from svend.evaluation.benchmark import Answer, Benchmark, Problem, ProblemSource, Sample, Score
from svend.evaluation.measurement import Measurement, mean_of_samples, proportion
from svend.evaluation.reading import DatasetPlace, PlacedRecord, choose, read_records
from svend.evaluation.sandbox import Program, SandboxLimits, run_program, run_programs

DATASET = DatasetPlace(
    "humaneval", ("HumanEval", "test", "humaneval"), "openai/openai_humaneval"
)
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one code block.\n\n"
    "```python\n{prompt}\n```"
)
LIMITS = SandboxLimits(cpu_seconds=3, wall_seconds=15.0)
PASS_AT = (1, 10, 100)

FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
COMPLETION_END = re.compile(r"^(?:class|def|#|if|print)", re.MULTILINE)


@dataclass(frozen=True)
class UnitTests:
    """What the scorer knows of a problem: the prompt, the tests, and the function that they call.

    `tests` define `check(candidate)`.
    """

    prompt: str
    tests: str
    entry_point: str


def read_problems(source: ProblemSource) -> list[Problem]:
    """Return the problems, under the identifiers that the data set gives them."""
    problems: dict[str, Problem] = {}
    for record in read_records(source, DATASET):
        problem = _problem(record)
        if problem.problem_id in problems:
            raise record.error(f"task_id {problem.problem_id} is there twice; remove one")
        problems[problem.problem_id] = problem
    return choose(list(problems.values()), source)


def _problem(record: PlacedRecord) -> Problem:
    prompt, entry_point = record.text("prompt"), record.text("entry_point")
    if not _definition(entry_point).search(prompt):
        raise record.error(f"'prompt' does not define the entry point {entry_point}")
    question = INSTRUCTION.format(prompt=prompt.strip("\n"))
    return Problem(
        record.text("task_id"), DATASET.name, (Message(Role.USER, question),),
        record.text("canonical_solution"), UnitTests(prompt, record.text("test"), entry_point),
    )


def _definition(entry_point: str) -> re.Pattern[str]:
    """What begins a function's definition, or a lambda's that is given its name."""
    name = re.escape(entry_point)
    return re.compile(rf"^(?:(?:async[ \t]+)?def[ \t]+{name}\b|{name}[ \t]*=(?!=))", re.MULTILINE)


def extract_code(text: str, entry_point: str) -> str:
    """Return the code in an answer's text; empty where there is none."""
    definition = _definition(entry_point)
    blocks = [match[1] for match in FENCED.finditer(text)]
    if blocks:
        return next((block for block in blocks if definition.search(block)), blocks[0])
    if definition.search(text):
        return text
    end = COMPLETION_END.search(text)
    return text[:end.start()] if end else text


def complete_program(code: str, unit_tests: UnitTests) -> str:
    """Return the source that answers a problem: what stands before it in the prompt, and code."""
    definition = _definition(unit_tests.entry_point)
    if not definition.search(code):
        return unit_tests.prompt + code
    in_prompt = definition.search(unit_tests.prompt)
    assert in_prompt is not None  # `read_problems` refuses a prompt without it
    return f"{unit_tests.prompt[:in_prompt.start()]}\n{code}"


def score(problem: Problem, answer: Answer) -> Score:
    """Run an answer and its unit tests in the sandbox. May be called from several threads."""
    code, program = _program(problem, answer)
    if not code.strip():
        return NO_CODE
    result = run_program(program, LIMITS)
    return Score(result.passed, code, result.reason)


def score_answers(
    answers: Sequence[tuple[Problem, Answer]], parallel: int = 2
) -> list[Score]:
    """Score many answers, `parallel` at a time; the same as `score` for each."""
    coded = [_program(problem, answer) for problem, answer in answers]
    results = iter(run_programs([p for code, p in coded if code.strip()], LIMITS, parallel))
    scores = []
    for code, _ in coded:
        if not code.strip():
            scores.append(NO_CODE)
            continue
        result = next(results)
        scores.append(Score(result.passed, code, result.reason))
    return scores


NO_CODE = Score(False, "", "the answer holds no code")


def _program(problem: Problem, answer: Answer) -> tuple[str, Program]:
    unit_tests: UnitTests = problem.reference
    code = extract_code(answer.text, unit_tests.entry_point)
    checks = f"{unit_tests.tests}\n\ncheck({unit_tests.entry_point})\n"
    return code, Program(complete_program(code, unit_tests), checks)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that of k samples, drawn from n without replacement, one is correct.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1), as a product that does not overflow.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: must be between 1 and the {n} samples")
    if n - correct < k:
        return 1.0
    none_correct = 1.0
    for i in range(n - correct + 1, n + 1):
        none_correct *= 1.0 - k / i
    return 1.0 - none_correct


def summarize(samples: Sequence[Sample]) -> dict[str, Measurement]:
    """Return pass@k over the problems, for each k of `PASS_AT` that every problem has samples for.

    The unit of the interval is the problem: Wilson's where each has one sample, else a bootstrap.
    """
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        by_problem[sample.problem.problem_id].append(sample.score.correct)
    fewest = min(len(correct) for correct in by_problem.values())
    if len(samples) == len(by_problem):
        passed = sum(sample.score.correct for sample in samples)
        return {_metric(1): proportion(passed, len(samples))}
    return {
        _metric(k): mean_of_samples(
            [pass_at_k(len(correct), sum(correct), k) for correct in by_problem.values()]
        )
        for k in PASS_AT if k <= fewest
    }


def _metric(k: int) -> str:
    return f"{DATASET.name}_pass_at_{k}"


HUMANEVAL = Benchmark(
    name=DATASET.name,
    read=read_problems,
    score=score,
    summarize=summarize,
    max_new_tokens=512,
    score_many=lambda problems, answers: score_answers(list(zip(problems, answers, strict=True))),
    metrics=tuple(_metric(k) for k in PASS_AT),
)
