"""BFCL: what is declared, and that the scorer takes accepted calls and no others."""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from svend.data.documents import Message, Role, dump_json
from svend.errors import DataError
from svend.evaluation import bfcl
from svend.evaluation.benchmark import Answer, Problem, ProblemSource, Sample, Score
from svend.evaluation.bfcl import BFCL, CATEGORIES, json_schema
from svend.evaluation.call_matching import AcceptedCall
from tests.conftest import SHARED_DATA

FOLDER = SHARED_DATA / "bfcl"
with_data = pytest.mark.skipif(not FOLDER.exists(), reason="needs BFCL's files")
Calls = list[dict[str, Any]]

# Our own problem, in BFCL's schema.
MIX_PAINT = {
    "name": "paint.mix",
    "description": "Mix two colours.",
    "parameters": {
        "type": "dict",
        "properties": {
            "colours": {"type": "array", "items": {"type": "string"}},
            "litres": {"type": "float"},
            "coats": {"type": "integer"},
            "shade": {"type": "tuple", "items": {"type": "float"}},
            "glossy": {"type": "boolean", "optional": True},
            "note": {"type": "string"},
            "room": {"type": "dict", "properties": {"type": {"type": "any"}}},
        },
        "required": ["colours", "litres"],
    },
}
TRUTH = {
    "colours": [["sky blue", "white"]], "litres": [2.0, 2.5], "coats": [2, ""],
    "shade": ["", [0.5, 1.0]], "glossy": [True, ""], "note": ["two coats, please", ""],
    "room": ["", {"type": ["hall", "Hallway"], "doors": [2, ""]}],
}
ALL = {"colours": ["Sky-Blue", "WHITE"], "litres": 2, "coats": 2, "shade": [0.5, 1],
       "glossy": True, "note": "Two coats please.", "room": {"type": "Hall", "doors": 2}}


def answer_of(calls: Sequence[Any]) -> Answer:
    return Answer(tuple(
        Message(Role.TOOL_CALL, call if isinstance(call, str) else dump_json(call))
        for call in calls
    ), 1)


def score(problem: Problem, calls: Sequence[Any]) -> Score:
    return BFCL.score(problem, answer_of(calls))


def own_problem(*truths: dict[str, Any]) -> Problem:
    accepted = tuple(AcceptedCall("paint.mix", t, MIX_PAINT["parameters"]) for t in truths)
    return Problem("own_0", "parallel", (), "", accepted)


def mix(**arguments: Any) -> dict[str, Any]:
    return {"name": "paint.mix", "arguments": arguments}


@pytest.mark.parametrize("arguments", [
    ALL,
    {"colours": ["sky blue", "white"], "litres": 2.5},
    ALL | {"litres": 2.0, "room": {"type": "hallway"}},
    ALL | {"note": ""},
    ALL | {"shade": []},
])
def test_an_accepted_call_is_right_in_every_way_of_writing_it(arguments: dict[str, Any]) -> None:
    found = score(own_problem(TRUTH), [mix(**arguments)])
    assert found.correct, found.reason


@pytest.mark.parametrize(("change", "reason"), [
    ({"colours": None}, "required colours is missing"),
    ({"colours": ["white", "sky blue"]}, 'colours = ["white", "sky blue"] is not an accepted'),
    ({"colours": ["sky blue"]}, 'colours = ["sky blue"] is not an accepted value'),
    ({"colours": "sky blue"}, 'colours = "sky blue" is no array'),
    ({"litres": 3}, "litres = 3 is not an accepted value"),
    ({"litres": "2"}, 'litres = "2" is no float'),
    ({"coats": 2.0}, "coats = 2.0 is no integer"),
    ({"coats": ""}, 'coats = "" is no integer'),
    ({"glossy": 1}, "glossy = 1 is no boolean"),
    ({"glossy": False}, "glossy = false is not an accepted value"),
    ({"coats": True}, "coats = true is no integer"),
    ({"room": {}}, "room = {} is not an accepted value"),
    ({"room": {"type": "hall", "colour": "red"}}, "room = "),
    ({"room": {"type": "hall", "doors": True}}, "room = "),
    ({"extra": 1}, "unexpected extra"),
])
def test_a_wrong_argument_is_wrong_with_its_reason(change: dict[str, Any], reason: str) -> None:
    arguments = {k: v for k, v in (ALL | change).items() if v is not None}
    found = score(own_problem(TRUTH), [mix(**arguments)])
    assert not found.correct
    assert found.reason.startswith(f"paint.mix: {reason}")


def test_calls_are_assigned_so_that_their_order_does_not_matter() -> None:
    """The first accepted call also fits the second's: whoever takes greedily may leave none."""
    wide, narrow = TRUTH | {"litres": [2.0, 2.5]}, TRUTH | {"litres": [2.0]}
    calls = [mix(**ALL | {"litres": 2.0}), mix(**ALL | {"litres": 2.5})]
    assert score(own_problem(wide, narrow), calls).correct
    assert score(own_problem(wide, narrow), calls[::-1]).correct
    assert not score(own_problem(wide, narrow), [calls[1], calls[1]]).correct
    assert score(own_problem(wide, narrow), calls[:1]).reason == "1 calls where 2 are expected"


@pytest.mark.parametrize("content", [
    "paint.mix(litres=2)", "", "[]", '{"name": "paint.mix"}', '{"name": 1, "arguments": {}}',
    '{"name": "paint.mix", "arguments": "{}"}',
    '{"name": "paint.mix", "arguments": {"litres": NaN}}',
    "[" * 100_000,
])
def test_a_malformed_call_is_wrong_for_every_category(content: str) -> None:
    found = score(own_problem(TRUTH), [content])
    assert not found.correct
    assert found.reason.startswith("call 1: ")
    assert not score(Problem("own_1", "irrelevance", (), "no call", ()), [content]).correct


def test_declarations_are_json_schema() -> None:
    schema = json_schema(MIX_PAINT["parameters"])
    assert schema["type"] == "object"
    properties = schema["properties"]
    assert properties["litres"] == {"type": "number"}
    assert properties["shade"] == {"type": "array", "items": {"type": "number"}}
    assert properties["glossy"] == {"type": "boolean"}
    # A property that is called `type` is no keyword; what may be anything has no type.
    assert properties["room"] == {"type": "object", "properties": {"type": {}}}
    assert schema["required"] == ["colours", "litres"]


def write_folder(folder: Path, version: int = 4, **changes: Any) -> Path:
    """Write one problem of each category."""
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    for category, names in CATEGORIES.items():
        record = {"id": f"{category}_0", "function": [MIX_PAINT],
                  "question": [[{"role": "user", "content": "Mix sky blue and white."}]]}
        name = names[-1] if version < 4 else names[0]
        file = f"BFCL_v{version}_{name}.json"
        (folder / file).write_text(json.dumps(record | changes) + "\n")
        truth = {"id": f"{category}_0", "ground_truth": [{"paint.mix": TRUTH}]}
        if category != "irrelevance":
            (folder / "possible_answer" / file).write_text(json.dumps(truth) + "\n")
    return folder


def test_a_folder_of_either_version_is_read_with_its_tools_before_the_question(
    tmp_path: Path
) -> None:
    for version in (3, 4):
        problems = BFCL.read(ProblemSource(path=write_folder(tmp_path / str(version), version)))
        assert sorted(p.group for p in problems) == sorted(CATEGORIES)
        for problem in problems:
            tools, user = problem.messages
            assert (tools.role, user.role) == (Role.TOOLS, Role.USER)
            [declared] = json.loads(tools.content)
            assert declared == MIX_PAINT | {"parameters": json_schema(MIX_PAINT["parameters"])}
            assert problem.question == "Mix sky blue and white."
        expected = {p.group: p.expected for p in problems}
        assert expected["irrelevance"] == "no call"
        assert "litres=2.0 | 2.5, coats=2 | left out" in expected["simple"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"id": 7}, "'id' must be text"),
    ({"function": []}, "'function' must be a list of objects with name and parameters"),
    *(({"function": [MIX_PAINT | {"parameters": parameters}]}, "'function' must be a list of")
      for parameters in (None, {"properties": []}, {"properties": {"a": "string"}},
                         {"properties": {"a": {"type": ["string"]}}}, {"required": "a"},
                         {"properties": {"a": {"items": [{"type": "string"}]}}})),
    ({"question": [["hi"]]}, "'question' must be turns of messages with role and content"),
    ({"question": [[{"role": "tool", "content": "x"}]]}, "'question' has the unknown role 'tool'"),
    ({"question": [[{"role": "user", "content": " "}]]}, "'question' has a message without text"),
    ({"question": []}, "'question' is empty"),
    ({"id": "simple_99"}, "possible_answer has no 'simple_99'"),
])
def test_a_broken_problem_is_named_with_its_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write_folder(tmp_path, **changes)
    with pytest.raises(DataError, match=rf"BFCL_v4_simple_python\.json:1: {message}"):
        BFCL.read(ProblemSource(path=folder))


@pytest.mark.parametrize(("truth", "message"), [
    ([], "'ground_truth' must be a list of objects with one function each"),
    ([{"paint.dry": {}}], "'ground_truth' calls 'paint.dry', which the problem does not declare"),
    ([{"paint.mix": {"litres": 2}}], "'ground_truth' must list accepted values"),
])
def test_a_broken_accepted_answer_is_named_with_its_line(
    tmp_path: Path, truth: Any, message: str
) -> None:
    file = write_folder(tmp_path) / "possible_answer" / "BFCL_v4_multiple.json"
    file.write_text(json.dumps({"id": "multiple_0", "ground_truth": truth}))
    with pytest.raises(DataError, match=rf"possible_answer/BFCL_v4_multiple\.json:1: {message}"):
        BFCL.read(ProblemSource(path=tmp_path))


def test_a_folder_without_a_category_names_it(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "BFCL_v4_parallel.json").unlink()
    with pytest.raises(DataError, match=r"no file for bfcl's category parallel; expected BFCL_v4_"
                       r"parallel\.json; give .*tool_accuracy: PATH"):
        BFCL.read(ProblemSource(path=tmp_path))
    with pytest.raises(DataError, match=r"BFCL_v4_multiple\.json: not a folder; give "):
        BFCL.read(ProblemSource(path=tmp_path / "BFCL_v4_multiple.json"))


def test_the_hubs_files_are_those_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path, version=3)
    unwanted = ("BFCL_v3_java.json", "BFCL_v3_live_simple.json")
    for name in unwanted:
        (folder / name).write_text("not wanted")
    wanted: list[str] = []

    def snapshot(repository: str, *, allow_patterns: list[str], **place: str) -> str:
        assert place == {"repo_type": "dataset", "revision": "c" * 40}
        wanted.extend(str(file.relative_to(folder)) for file in folder.rglob("*.json") if any(
            fnmatch.fnmatch(str(file.relative_to(folder)), pattern) for pattern in allow_patterns
        ))
        return str(folder)

    monkeypatch.setattr(bfcl, "hub_commit", lambda repository, revision: "c" * 40)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert len(BFCL.read(ProblemSource())) == 5
    assert len(wanted) == 9
    assert not set(unwanted) & set(wanted)


@functools.cache
def real_problems() -> list[Problem]:
    return BFCL.read(ProblemSource(path=FOLDER))


def with_calls() -> list[Problem]:
    return [problem for problem in real_problems() if problem.reference]


def accepted_calls(problem: Problem, choose: Callable[[Sequence[Any]], Any], full: bool) -> Calls:
    """Build a call of each accepted one, with or without what may be left out."""
    calls = []
    for one in problem.reference:
        required = one.parameters["required"]
        # Two real problems accept, and let be left out, a parameter that nothing declares.
        arguments = {
            name: concrete(choose([v for v in values if v != ""]), choose)
            for name, values in one.values.items()
            if name in one.parameters["properties"] and any(v != "" for v in values)
            and (name in required or "" not in values or full)
        }
        calls.append({"name": one.name, "arguments": arguments})
    return calls


def concrete(accepted: Any, choose: Callable[[Sequence[Any]], Any]) -> Any:
    """A value of one that is accepted: an object's fields have a list of accepted values each."""
    if isinstance(accepted, dict):
        return {key: choose(values) for key, values in accepted.items() if "" not in values}
    if isinstance(accepted, list):
        return [concrete(one, choose) if isinstance(one, dict) else one for one in accepted]
    return accepted


@with_data
@pytest.mark.parametrize("full", [True, False])
def test_every_real_problem_is_right_by_its_accepted_calls_in_any_order(full: bool) -> None:
    rng = random.Random(0)
    assert len(with_calls()) == 1000
    for problem in with_calls():
        calls = accepted_calls(problem, rng.choice, full)
        rng.shuffle(calls)
        found = score(problem, calls)
        assert found.correct, (problem.problem_id, found)


@with_data
def test_real_declarations_are_valid_json_schema() -> None:
    for problem in real_problems()[::4]:
        for function in json.loads(problem.messages[0].content):
            jsonschema.Draft202012Validator.check_schema(function["parameters"])


Mutation = Callable[[Problem, Calls, st.DataObject], None]


def some_argument(calls: Calls, data: st.DataObject) -> tuple[dict[str, Any], str, int]:
    index = data.draw(st.integers(0, len(calls) - 1))
    names = sorted(calls[index]["arguments"])
    assume(names)
    return calls[index]["arguments"], data.draw(st.sampled_from(names)), index


def drop_what_is_needed(problem: Problem, calls: Calls, data: st.DataObject) -> None:
    arguments, name, index = some_argument(calls, data)
    accepted = problem.reference[index]
    assume(name in accepted.parameters["required"] or "" not in accepted.values[name])
    del arguments[name]


def give_another_value(problem: Problem, calls: Calls, data: st.DataObject) -> None:
    arguments, name, _ = some_argument(calls, data)
    value = arguments[name]
    if isinstance(value, bool):
        taken = [one for a in problem.reference for one in a.values.get(name, ())]
        assume((not value) not in taken)
        arguments[name] = not value
    elif isinstance(value, int | float):
        arguments[name] = value + 987654
    elif isinstance(value, str):
        arguments[name] = value + " qqq"
    elif isinstance(value, list):
        arguments[name] = [*value, "qqq"]
    elif isinstance(value, dict):
        arguments[name] = value | {"qqq": 1}
    else:
        arguments[name] = "qqq"


def give_another_type(problem: Problem, calls: Calls, data: st.DataObject) -> None:
    arguments, name, index = some_argument(calls, data)
    accepted = problem.reference[index]
    value = arguments[name]
    declared = accepted.parameters["properties"][name]["type"]
    # An integer is a float; the other way round it is another type.
    if declared == "integer" and type(value) is int:
        arguments[name] = data.draw(st.sampled_from([float(value), str(value), [value]]))
    else:
        arguments[name] = [value] if not isinstance(value, list) else {"items": value}
    types = {type(one) for a in problem.reference for one in a.values.get(name, ())}
    assume(type(arguments[name]) not in types)


def add_an_argument(problem: Problem, calls: Calls, data: st.DataObject) -> None:
    data.draw(st.sampled_from(calls))["arguments"]["qqq"] = 1


def call_another_function(problem: Problem, calls: Calls, data: st.DataObject) -> None:
    call = data.draw(st.sampled_from(calls))
    declared = [function["name"] for function in json.loads(problem.messages[0].content)]
    names = [call["name"] + "_qqq", call["name"].replace(".", "_"), *declared]
    call["name"] = data.draw(st.sampled_from([n for n in names if n != call["name"]]))


def leave_a_call_out(problem: Problem, calls: Calls, data: st.DataObject) -> None:
    calls.pop(data.draw(st.integers(0, len(calls) - 1)))


def call_once_more(problem: Problem, calls: Calls, data: st.DataObject) -> None:
    calls.append(copy.deepcopy(data.draw(st.sampled_from(calls))))


@with_data
@pytest.mark.parametrize("mutate", [
    drop_what_is_needed, give_another_value, give_another_type, add_an_argument,
    call_another_function, leave_a_call_out, call_once_more,
])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_real_problem_is_wrong_by_a_mutation_of_its_accepted_calls(
    mutate: Mutation, data: st.DataObject
) -> None:
    problem = data.draw(st.sampled_from(with_calls()))
    calls = accepted_calls(
        problem, lambda v: data.draw(st.sampled_from(v)), data.draw(st.booleans())
    )
    assert score(problem, calls).correct
    mutated = copy.deepcopy(calls)
    mutate(problem, mutated, data)
    found = score(problem, mutated)
    assert not found.correct, (problem.problem_id, mutated)
    assert found.reason


def accuracies(answer: Callable[[Problem], Calls]) -> dict[str, float]:
    samples = []
    for problem in real_problems():
        given_ = answer_of(answer(problem))
        samples.append(Sample(problem, given_, BFCL.score(problem, given_)))
    return {name: m.value for name, m in BFCL.summarize(samples).items()}


@with_data
def test_models_that_look_at_no_question_score_one_category_or_none() -> None:
    def first_function(problem: Problem) -> Calls:
        return [{"name": json.loads(problem.messages[0].content)[0]["name"], "arguments": {}}]

    never = accuracies(lambda problem: [])
    assert never.pop("tool_structure_accuracy") == pytest.approx(0.2)
    assert never.pop("tool_structure_accuracy/irrelevance") == 1.0
    assert len(never) == 4
    assert set(never.values()) == {0.0}
    assert set(accuracies(first_function).values()) == {0.0}
    right = accuracies(lambda problem: accepted_calls(problem, lambda v: v[0], True))
    assert set(right.values()) == {1.0}


@with_data
def test_a_limit_takes_every_category_alike() -> None:
    chosen = BFCL.read(ProblemSource(path=SHARED_DATA, limit=50, seed=3))
    assert sorted(p.group for p in chosen) == sorted([*CATEGORIES] * 10)
