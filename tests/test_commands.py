"""Every command keeps what is promised of all: help, examples that work, JSON, completion."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import argcomplete
import numpy as np
import pytest
from argcomplete.lexers import split_line
from rich.console import Console

from svend.answers import to_json
from svend.bench import faults, faults_command
from svend.bench.options import finish
from svend.cli import COMMANDS, main, make_parser, parse
from svend.command import Call, Command, CommandParser, Takes
from svend.completion_command import declare_keys
from svend.errors import ConfigError
from svend.pipeline import progress
from svend.pipeline.config import PipelineConfig, group_members, load_config
from svend.pipeline.ladder.options import load_ladder
from svend.pipeline.progress import CountProgress
from svend.pipeline.sweep.options import load_sweep
from tests.conftest import DEBUG_OVERRIDES, ROOT, Workplace
from tests.registry import make_version, store

PAGE = ROOT / "docs" / "commands.md"


def commands() -> Iterator[tuple[str, Command]]:
    """Yield each command and each kind with what is typed for it."""
    for command in COMMANDS:
        yield command.name, command
        for kind in command.kinds:
            yield f"{command.name} {kind.name}", kind


ALL = [pytest.param(name, command, id=name) for name, command in commands()]
EXAMPLES = [
    pytest.param(example, id=example) for _, command in commands() for example in command.examples
]


known_parser = functools.cache(make_parser)


def parser_of(name: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = known_parser()
    for word in name.split():
        [below] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        parser = below.choices[word]
    return parser


@pytest.mark.parametrize(("name", "command"), ALL)
def test_a_command_says_what_it_does_what_it_makes_and_what_its_options_mean(
    name: str, command: Command
) -> None:
    assert command.examples
    assert all(example.lstrip('eval "$(').startswith(("svend ", "SVEND_TOKEN=... svend "))
               for example in command.examples)
    assert f"svend {name}" in " ".join(command.examples)
    assert 0 < len(command.summary) <= 70 and not command.summary.endswith(".")
    assert command.description.endswith(".")
    assert command.makes and not command.makes.endswith(".")
    parser = parser_of(name)
    shown = parser.format_help()
    assert all(example in shown for example in command.examples)
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, (name, action.dest)
        if action.nargs != 0:
            assert action.metavar, (name, action.dest)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_a_command_line_that_holds(example: str) -> None:
    inner = re.fullmatch(r'eval "\$\((.*)\)"', example)
    words = shlex.split(inner[1] if inner else example)
    call = parse(words[words.index("svend") + 1:])
    load_configuration_of(call)


def load_configuration_of(call: Call) -> None:
    """Load what the command would; raises ConfigError for a key or value that does not fit.

    The members of `conf/` by themselves are loaded in other tests, which takes long for some.
    """
    command: Command = call.options.command
    for group in (*call.groups, *command.sections):
        assert getattr(call.options, group) in (*group_members(group), "all")
    if not (call.overrides or getattr(call.options, "search", None)):
        return
    if command.name == "sweep":
        load_sweep(call.options.sweep, {"scale": "tiny"}, call.overrides, call.options.search)
    elif command.name == "ladder":
        load_ladder(call.options.ladder, {}, call.overrides)
    elif command.takes is not Takes.NOTHING:
        load_config(call.groups, call.overrides)


def test_the_settings_that_notes_show_are_settings() -> None:
    """What stands before the examples, indented: options to be added to a command."""
    required = {"evaluate": ["--model", "m"], "promote": ["--model", "m"],
                "serve": ["models:/m/1"]}
    for name, command in commands():
        shown = [line for line in command.notes.splitlines() if line.startswith("  --")]
        # Of an option that is given twice, argparse takes the last: each is tried.
        together = [" ".join(line for line in shown if "--search" not in line),
                    *(line for line in shown if "--search" in line)]
        for line in filter(None, together):
            load_configuration_of(parse(
                [*name.split(), *required.get(name, []), *shlex.split(line)]
            ))


def test_the_overview_lists_every_command_with_its_line_and_ends_with_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0  # and does not end a notebook
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command.name} " in shown and command.summary.split(",")[0] in shown
    examples = re.findall(r"^  (svend .*?)(?:  |$)", shown, re.M)
    assert len(examples) == 3
    for example in examples:
        parse(shlex.split(example)[1:])
    assert "docs/commands.md" in shown and "svend completion" in shown


def test_help_fits_a_narrow_terminal_but_for_lines_to_be_pasted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for name, _ in commands():
        for line in parser_of(name).format_help().splitlines():
            assert len(line) <= 60 or line.startswith("  "), (name, line)
    shown = make_parser().format_help().splitlines()
    assert [line for line in shown if len(line) > 60 and not line.startswith("  svend")] == []


def test_settings_may_stand_before_an_argument() -> None:
    call = parse(["serve", "--training.precision", "bf16", "models:/a/1", "--training.device=cpu"])
    assert call.options.uri == "models:/a/1"
    assert call.overrides == [("training.precision", "bf16"), ("training.device", "cpu")]
    call = parse(["ladder", "status", "--training.max_steps", "5", "--ladder", "miniature"])
    assert (call.options.action, call.overrides) == ("status", [("training.max_steps", "5")])


def test_what_is_nearly_an_option_is_refused_with_what_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--scal", "small"]) == 1
    assert capsys.readouterr().err == "error: --scal is not an option: did you mean --scale?\n"


@pytest.mark.parametrize(("name", "command"), ALL)
def test_no_key_of_the_configuration_is_taken_for_a_misspelt_option(
    name: str, command: Command
) -> None:
    if command.takes is Takes.NOTHING:
        return
    parser = parser_of(name)
    assert isinstance(parser, CommandParser)
    for key in (field.name for field in dataclasses.fields(PipelineConfig)):
        if f"--{key}" not in parser._option_string_actions:
            assert parser._split([f"--{key}", "x"]) == ([], [(key, "x")])


@pytest.mark.parametrize("words", [
    ["scales", "--training.max_steps", "5"], ["bench", "data", "--training.max_steps", "5"],
    ["export", "models:/a/1", "--training.max_steps", "5"], ["train", "more"], ["sweep", "-x"],
])
def test_what_a_command_does_not_take_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*(takes no option|is not an option)[^\n]*$"):
        parse(words)


def test_the_planted_faults_are_those_that_there_are() -> None:
    assert ("none", *faults.FAULTS) == faults_command.PLANTED


def test_the_next_command_is_what_was_given_but_for_what_only_looked() -> None:
    words = ["sweep", "--dry-run", "--json", "--search", "{a.b: null}"]
    assert parse(words).words("--dry-run") == "--search '{a.b: null}'"
    words = ["ladder", "--dry-run", "true", "--end=small"]
    assert parse(words).words("--dry-run") == "--end=small"


@pytest.mark.parametrize(("words", "told"), [
    (["bench", "data", "--rounds", "1"], "bench data --rounds 1 --json data.json"),
    (["coordcheck"], "coordcheck --json coordcheck.json --plot coordcheck.png"),
    (["bench", "data", "--json", "a.json"], f"wrote {Path('a.json').absolute()}"),
])
def test_a_benchmark_ends_with_what_it_wrote_or_how_to_have_it_written(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(parse(words), words[1] if words[0] == "bench" else words[0])
    assert capsys.readouterr().out.endswith(f"{told}\n")


# JSON

class Colour(Enum):
    RED = "red"


def test_a_document_holds_no_number_that_json_has_not() -> None:
    told = {"a": math.nan, "b": [np.float64("inf"), np.int64(3)], Colour.RED: Path("x"),
            "c": Colour.RED, 4: (None, True, 1.5)}
    assert json.loads(to_json(told), parse_constant=pytest.fail) == {
        "a": None, "b": [None, 3], "Colour.RED": "x", "c": "red", "4": [None, True, 1.5],
    }
    with pytest.raises(TypeError, match="object is nothing that JSON knows"):
        to_json(object())


def document(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    """Return the one document that a command prints with --json."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    shown = capsys.readouterr()
    return json.loads(shown.out, parse_constant=pytest.fail)


def test_scales_are_given_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    scales = document(["scales"], capsys)["scales"]
    assert [row["scale"] for row in scales][::6] == ["tiny", "flagship"]
    assert (scales[0]["parameters"], scales[0]["context_tokens"]) == (52_175_360, 2048)


def test_a_plan_is_given_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [word for key, text in DEBUG_OVERRIDES.items() for word in (f"--{key}", text)]
    plan = document(["plan", *settings], capsys)
    assert (plan["model"], plan["steps"], plan["fits"]) == ("svend-debug", 40, True)
    assert plan["tokens"] == plan["steps"] * plan["tokens_per_step"]
    assert 0 < plan["peak_memory_bytes"] < plan["available_memory_bytes"]


def test_what_the_registry_holds_is_given_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with store(tmp_path):
        made = make_version(tmp_path, 1, model="m-json")
        moved = document(
            ["promote", "--model", "m-json", "--version", made.version, "--to", "standard"], capsys
        )["moved"]
        assert [(move["level"], move["version"]) for move in moved] == [
            ("quick", made.version), ("standard", made.version)]
        history = document(["history", "m-json"], capsys)
        assert [move.get("level") for move in history] == [None, "quick", "standard"]
        assert {row["metric"] for row in history[-1]["decided"]["rows"]} >= {"perplexity"}
        lineage = document(["lineage", "models:/m-json@standard"], capsys)
        assert (lineage["model"], lineage["step"]) == ("m-json", "7")
        assert document(["audit", "--model", "m-json"], capsys) == []
        (made.folder / "model.safetensors").write_bytes(b"others")
        findings = document(["audit", "--model", "m-json"], capsys, code=1)
        assert {finding["model"] for finding in findings} == {"m-json"}


def test_a_refusal_leaves_standard_output_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--scale", "huge", "--json"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ")


# Progress

@pytest.mark.parametrize("console", [
    lambda pipe: Console(file=pipe),
    lambda pipe: Console(file=pipe, force_terminal=True, _environ={"TERM": "dumb"}),
], ids=["pipe", "dumb terminal"])
def test_progress_where_no_bar_can_be_drawn_is_a_plain_line_now_and_then(
    console: Callable[[io.StringIO], Console], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    pipe = io.StringIO()
    with CountProgress(console(pipe), "answers") as bar:
        for done in range(1, 11):
            bar.advance("gsm8k", done, 10)
    lines = pipe.getvalue().splitlines()
    assert lines == ["gsm8k: 3 of 10 answers", "gsm8k: 6 of 10 answers", "gsm8k: 9 of 10 answers",
                     "gsm8k: 10 answers"]
    assert pipe.getvalue().replace("\n", "").isprintable()


# Completion

def completions(line: str) -> set[str]:
    """Return what argcomplete offers; its `autocomplete` would end the process."""
    parser = make_parser()
    declare_keys(parser)
    quote, prefix, _, words, position = split_line(line, len(line))
    finder = argcomplete.CompletionFinder(parser)
    return {word.strip() for word in finder._get_completions(words, prefix, quote, position)}


@pytest.mark.parametrize(("line", "some", "none"), [
    ("svend ", {"train", "ladder", "completion"}, {"tiny"}),
    ("svend bench ", {"train", "recipes", "--gpu-report"}, {"sweep"}),
    ("svend train --scale ", {"tiny", "flagship"}, {"guide"}),
    ("svend train --preset ", {"laptop", "gate"}, {"tiny"}),
    ("svend plan --gpu a100", {"a100-40gb", "a100-80gb"}, {"l4"}),
    ("svend train --training.lear", {"--training.learning_rate"}, {"--training.seed"}),
    ("svend train --training.optimizer ", {"adamw", "muon"}, {"fp32"}),
    ("svend train --training.gradient_checkpointing ", {"true", "false"}, {"adamw"}),
    ("svend plan --data.max", {"--data.max_seq_length"}, {"--training.data.max_seq_length"}),
    ("svend sweep --sweep.samp", {"--sweep.sampler"}, {"--ladder.start"}),
    ("svend sweep --sweep ", {"minute", "default"}, {"miniature"}),
    ("svend ladder --ladder ", {"miniature", "default"}, {"minute"}),
    ("svend ladder --ladder.trend.ho", {"--ladder.trend.hold_above"}, {"--sweep.sampler"}),
    ("svend evaluate --model models:/m/1 --evaluation.pr", {"--evaluation.problems"}, {"--scale"}),
    ("svend promote --model m --to f", {"full"}, {"quick"}),
    ("svend evaluate --benchmarks accuracy,gs", {"accuracy,gsm8k"}, {"gsm8k"}),
    ("svend bench recipes --recipes bf16-", {"bf16-int8"}, {"fp32-fp32"}),
    ("svend scales --train", set(), {"--training.learning_rate"}),
])
def test_a_shell_is_offered_what_may_come_next(
    line: str, some: set[str], none: set[str]
) -> None:
    offered = completions(line)
    assert some <= offered and not none & offered, offered


def test_bash_completes_by_what_the_command_prints(workplace: Workplace) -> None:
    script = """
        eval "$(svend completion bash)"
        [[ "$(complete -p svend)" =~ -F\\ ([^ ]+) ]]
        COMP_LINE="svend train --training.learning_r"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
        COMP_WORDS=(svend train --training.learning_r); COMP_CWORD=2
        "${BASH_REMATCH[1]}" svend --training.learning_r train
        printf '<%s>' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], text=True, capture_output=True, check=False, timeout=60,
        env=workplace.environment, cwd=workplace.folder,
    )
    assert done.stdout.replace(" >", ">") == "<--training.learning_rate>", done


# The page

def table() -> str:
    """Return the table of docs/commands.md, as the commands say of themselves."""
    lines = ["| `svend` | what it does | what it makes | `--json` |", "|---|---|---|---|"]
    for name, command in commands():
        files = any("--json" in action.option_strings and action.nargs is None
                    for action in parser_of(name)._actions)
        answer = command.answer or ("to a file" if files else "")
        lines.append(f"| `{name}` | {command.summary} | {command.makes} | {answer} |")
    return "\n".join(lines) + "\n"


def test_the_page_of_all_commands_says_what_they_say() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), f"docs/commands.md must have:\n{table()}"


def test_svend_is_in_the_environment_that_python_is_of() -> None:
    assert (Path(sys.executable).parent / "svend").exists(), os.environ["PATH"]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m svend scales | head -1"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, capture_output=True,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert len(done.stdout.splitlines()) == 1
