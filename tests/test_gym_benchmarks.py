"""Problems made on the spot: new to every model, right by the library's word, not to be guessed."""

from __future__ import annotations

from collections import Counter

import pytest

from svend.data.documents import Message, Role, dump_json
from svend.data.embedded import reasoning_documents
from svend.data.gym_problems import LEVELS, REASONING_TASKS
from svend.data.selection import heldout_bound_of
from svend.data.tool_dialogues import MOST_OFFERED, tool_use_documents
from svend.data.tool_problems import TOOL_TASKS
from svend.evaluation.benchmark import Answer, Problem, ProblemSource
from svend.evaluation.gym import ACCURACY, TOOL_EXECUTION
from svend.tools.toolbox import InvalidCall, Toolbox, is_error

BOTH = pytest.mark.parametrize("benchmark", [ACCURACY, TOOL_EXECUTION], ids=lambda b: b.name)
TOOLBOX = Toolbox()


def _called(problem: Problem, *calls: str, said: str) -> Answer:
    messages = []
    for call in calls:
        messages += [Message(Role.TOOL_CALL, call), Message(Role.TOOL, TOOLBOX.call(call))]
    return Answer((*messages, Message(Role.ASSISTANT, said)), 9)


def _right_call(problem: Problem) -> str:
    solved = problem.reference
    return dump_json({"name": solved.tool, "arguments": dict(solved.arguments)})


def test_the_librarys_verifier_takes_the_worked_answers_and_not_other_ones() -> None:
    problems = ACCURACY.read(ProblemSource(limit=120))
    for problem in problems:
        worked = Answer((Message(Role.ASSISTANT, problem.reference.worked_answer),), 9)
        assert ACCURACY.score(problem, worked).correct, problem.question
        for said in (f"#### {problem.expected}1", problem.expected, "", "#### "):
            answer = Answer((Message(Role.ASSISTANT, said),), 9)
            assert not ACCURACY.score(problem, answer).correct, (problem.question, said)


def test_an_answer_counts_only_through_a_valid_call_that_returns_it() -> None:
    for problem in TOOL_EXECUTION.read(ProblemSource(limit=120)):
        call, said = _right_call(problem), f"#### {problem.expected}"
        broken = call[:-1]
        other = '{"name": "calculate", "arguments": {"expression": "1 + 1"}}'
        right = {
            (call,): True, (broken, call): True, (other, call): True,
            (): False, (broken,): False, (other,): problem.expected == "2",
        }
        for calls, correct in right.items():
            assert TOOL_EXECUTION.score(problem, _called(problem, *calls, said=said)).correct is (
                correct
            ), (problem.question, calls)
        assert not TOOL_EXECUTION.score(problem, _called(problem, call, said="#### 0.7")).correct
        assert not TOOL_EXECUTION.score(problem, _called(problem, call, said="done")).correct


@BOTH
@pytest.mark.parametrize("seed", [0, 7])
def test_every_question_is_of_the_part_that_training_holds_out(benchmark, seed: int) -> None:
    problems = benchmark.read(ProblemSource(limit=150, seed=seed))
    bound = heldout_bound_of(0.05)
    generate = reasoning_documents if benchmark is ACCURACY else tool_use_documents
    seen = {d.question_digest for s in (0, seed, 99) for d in generate(400, s)
            if d.question_digest >= bound}
    assert seen
    for problem in problems:
        from svend.data.documents import Document

        digest = Document(problem.messages).question_digest
        assert digest < bound
        assert digest not in seen
    assert len({problem.question for problem in problems}) == len(problems)


@BOTH
def test_a_smaller_limit_is_the_beginning_of_a_larger_one_and_every_task_has_its_turn(
    benchmark,
) -> None:
    many, few = (benchmark.read(ProblemSource(limit=n)) for n in (90, 40))
    assert [p.question for p in many[:40]] == [p.question for p in few]
    tasks = REASONING_TASKS if benchmark is ACCURACY else TOOL_TASKS
    counts = Counter(problem.group for problem in many)
    assert len(counts) == len(LEVELS) * len(tasks)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert benchmark.read(ProblemSource(limit=40, seed=1))[0].question != few[0].question


@BOTH
def test_guessing_the_most_frequent_answer_of_each_task_is_far_below_the_gate(benchmark) -> None:
    problems = benchmark.read(ProblemSource(limit=400))
    frequent: dict[str, Counter[str]] = {}
    for problem in problems:
        task = problem.group.split("/")[0]
        frequent.setdefault(task, Counter())[problem.expected] += 1
    guessed = sum(counts.most_common(1)[0][1] for counts in frequent.values())
    assert guessed / len(problems) < 0.08


def test_each_dialogue_has_a_valid_call_whose_result_is_its_answer() -> None:
    kinds: Counter[str] = Counter()
    for document in tool_use_documents(600, 3):
        roles = [message.role for message in document.messages]
        assert roles[:2] == [Role.TOOLS, Role.USER]
        assert roles[-3:] == [Role.TOOL_CALL, Role.TOOL, Role.ASSISTANT]
        *_, call, result, answer = (message.content for message in document.messages)
        assert not isinstance(TOOLBOX.parse_call(call), InvalidCall)
        assert TOOLBOX.call(call) == result
        assert answer == f"#### {result}"
        offered = document.messages[0].content
        assert f'"name": "{TOOLBOX.parse_call(call).name}"' in offered  # type: ignore[union-attr]
        assert 1 <= offered.count('"description"') <= MOST_OFFERED
        kinds["words" if roles[2] is Role.ASSISTANT else
              "mistake" if len(roles) == 7 else "plain"] += 1
        if len(roles) == 7:
            assert is_error(document.messages[3].content)
    assert set(kinds) == {"words", "mistake", "plain"}
    assert kinds["plain"] > 500


def test_dialogues_are_the_same_for_a_seed_and_others_for_another() -> None:
    first, again, other = (list(tool_use_documents(50, seed)) for seed in (5, 5, 6))
    assert first == again
    assert not {d.question_digest for d in first} & {d.question_digest for d in other}
