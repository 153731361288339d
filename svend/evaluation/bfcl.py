"""BFCL: calls of functions that are declared in the prompt, scored by structure (call_matching).

Of the Berkeley Function Calling Leaderboard, its five Python categories of one turn: Patil et al.
2025, ICML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svend.data.documents import Message, Role, dump_json
from svend.data.records import hub_commit
from svend.errors import DataError
from svend.evaluation.benchmark import Answer, Benchmark, Problem, ProblemSource, Sample, Score
from svend.evaluation.call_matching import AcceptedCall, calls_fault
from svend.evaluation.measurement import Measurement, mean_of_proportions, proportion
from svend.evaluation.reading import (
    DatasetPlace,
    PlacedRecord,
    benchmark_folder,
    choose,
    local_copy_wanted,
    read_records,
)
from svend.tools.toolbox import Call, InvalidCall, read_call

# Its files are several: read by category, not by these stems.
DATASET = DatasetPlace("bfcl", (), "gorilla-llm/Berkeley-Function-Calling-Leaderboard",
                       asked_as="tool_accuracy")
IRRELEVANCE = "irrelevance"
# Each category, and what its file was called in older versions.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "simple": ("simple_python", "simple"),
    "multiple": ("multiple",),
    "parallel": ("parallel",),
    "parallel_multiple": ("parallel_multiple",),
    IRRELEVANCE: ("irrelevance",),
}
METRIC = "tool_structure_accuracy"
SPEAKERS = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
# BFCL's type names, which are Python's, and JSON schema's; "any" is a schema without a type.
SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
# Not part of JSON schema: `required` says the same.
OWN_KEYWORDS = ("optional",)


def json_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's declaration as JSON schema has it."""
    converted: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in OWN_KEYWORDS or (keyword == "type" and value == "any"):
            continue
        if keyword == "type":
            converted[keyword] = SCHEMA_TYPES.get(value, value)
        elif keyword == "properties":
            converted[keyword] = {name: json_schema(part) for name, part in value.items()}
        elif keyword == "items":
            converted[keyword] = json_schema(value)
        else:
            converted[keyword] = value
    return converted


def read_problems(source: ProblemSource) -> list[Problem]:
    """Return the problems of all five categories, by turns.

    Raises DataError if a category's file, or the accepted answer to a problem, is missing.
    """
    folder = _download() if source.path is None else benchmark_folder(source.path, DATASET)
    problems = []
    for category in CATEGORIES:
        file = _category_file(folder, category)
        accepted: dict[str, PlacedRecord] = {}
        if category != IRRELEVANCE:
            answers = _category_file(folder / "possible_answer", category)
            accepted = {record.text("id"): record for record in _records(answers)}
        problems += [_problem(record, category, accepted) for record in _records(file)]
    return choose(problems, source, balanced=True)


def score(problem: Problem, answer: Answer) -> Score:
    """Decide whether the calls are the accepted ones; for irrelevance, whether there are none.

    Whatever the model wrote as a call is one, so that a malformed call is wrong there too.
    """
    shown = "\n".join(answer.calls)
    accepted: Sequence[AcceptedCall] = problem.reference
    if not accepted:
        none = not answer.calls
        return Score(none, shown, "" if none else "called a function, and none of them fits")
    calls: list[Call] = []
    for content in answer.calls:
        call = read_call(content)
        if isinstance(call, InvalidCall):
            return Score(False, shown, f"call {len(calls) + 1}: {call.reason}")
        calls.append(call)
    fault = calls_fault(calls, accepted)
    return Score(not fault, shown, fault)


def summarize(samples: Sequence[Sample]) -> dict[str, Measurement]:
    """Return each category's accuracy, and their mean, in which categories count alike."""
    parts = {}
    for category in CATEGORIES:
        right = [s.score.correct for s in samples if s.problem.group == category]
        if right:
            parts[category] = sum(right), len(right)
    measured = {METRIC: mean_of_proportions(list(parts.values()))}
    measured.update({f"{METRIC}/{category}": proportion(*part) for category, part in parts.items()})
    return measured


def _records(file: Path) -> list[PlacedRecord]:
    return read_records(ProblemSource(path=file), DATASET)


def _category_file(folder: Path, category: str) -> Path:
    """Return the newest version's file of a category."""
    for name in CATEGORIES[category]:
        files = {int(version.group(1)): file
                 for file in folder.glob(f"BFCL_v*_{name}.json")
                 if (version := re.fullmatch(rf"BFCL_v(\d+)_{name}\.json", file.name))}
        if files:
            return files[max(files)]
    raise DataError(
        f"{folder.absolute()}: no file for bfcl's category {category}; expected "
        f"BFCL_v4_{CATEGORIES[category][0]}.json; {DATASET.way_out}"
    )


def _download() -> Path:
    """Fetch the categories' files from the hub; those that were fetched before are kept."""
    from huggingface_hub import snapshot_download

    names = [name for names in CATEGORIES.values() for name in names]
    patterns = [f"{folder}BFCL_v[0-9]_{name}.json" for name in names
                for folder in ("", "possible_answer/")]
    try:
        commit = hub_commit(DATASET.repository, "main")
        return Path(snapshot_download(
            DATASET.repository, repo_type="dataset", revision=commit, allow_patterns=patterns
        ))
    except Exception as error:
        raise local_copy_wanted(error, DATASET) from error


def _problem(
    record: PlacedRecord, category: str, accepted: Mapping[str, PlacedRecord]
) -> Problem:
    problem_id = record.text("id")
    functions = _functions(record)
    calls: tuple[AcceptedCall, ...] = ()
    if category != IRRELEVANCE:
        if problem_id not in accepted:
            raise record.error(f"possible_answer has no '{problem_id}'; fetch the file again")
        calls = _accepted_calls(accepted[problem_id], functions)
    declarations = [
        {**function, "parameters": json_schema(function["parameters"])} for function in functions
    ]
    return Problem(
        problem_id, category,
        (Message(Role.TOOLS, dump_json(declarations)), *_turns(record)),
        "\n".join(map(str, calls)) or "no call", calls,
    )


def _functions(record: PlacedRecord) -> list[dict[str, Any]]:
    functions = record.column("function")
    if not isinstance(functions, list) or not functions or not all(
        isinstance(function, dict) and isinstance(function.get("name"), str)
        and _is_schema(function.get("parameters")) for function in functions
    ):
        raise record.error(
            "'function' must be a list of objects with name and parameters, as a JSON schema"
        )
    return functions


def _is_schema(value: Any) -> bool:
    """Whether a declaration has the parts that are read here in the shape of JSON schema's."""
    if not isinstance(value, dict) or not isinstance(value.get("type", ""), str):
        return False
    properties = value.get("properties", {})
    return (
        isinstance(properties, dict) and all(map(_is_schema, properties.values()))
        and ("items" not in value or _is_schema(value["items"]))
        and isinstance(value.get("required", []), list)
    )


def _turns(record: PlacedRecord) -> list[Message]:
    """What is said before the model speaks: the data has a list of messages for each turn."""
    question = record.column("question")
    try:
        said = [(message["role"], message["content"]) for turn in question for message in turn]
    except (TypeError, KeyError):
        raise record.error("'question' must be turns of messages with role and content") from None
    messages = []
    for role, content in said:
        if role not in SPEAKERS:
            raise record.error(f"'question' has the unknown role {role!r}")
        if not isinstance(content, str) or not content.strip():
            raise record.error("'question' has a message without text")
        messages.append(Message(SPEAKERS[role], content))
    if not messages:
        raise record.error("'question' is empty")
    return messages


def _accepted_calls(
    record: PlacedRecord, functions: Sequence[dict[str, Any]]
) -> tuple[AcceptedCall, ...]:
    parameters = {function["name"]: function["parameters"] for function in functions}
    truth = record.column("ground_truth")
    if not isinstance(truth, list) or not truth or not all(
        isinstance(call, dict) and len(call) == 1 for call in truth
    ):
        raise record.error("'ground_truth' must be a list of objects with one function each")
    calls = []
    for call in truth:
        (name, values), = call.items()
        if name not in parameters:
            raise record.error(f"'ground_truth' calls '{name}', which the problem does not declare")
        if not isinstance(values, dict) or not all(isinstance(v, list) for v in values.values()):
            raise record.error(f"'ground_truth' must list accepted values for each of {name}'s "
                               "parameters")
        calls.append(AcceptedCall(name, values, parameters[name]))
    return tuple(calls)


BFCL = Benchmark(
    name="bfcl",
    read=read_problems,
    score=score,
    summarize=summarize,
    max_new_tokens=512,
    metrics=(METRIC, *(f"{METRIC}/{category}" for category in CATEGORIES)),
)
