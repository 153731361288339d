"""The pages on own data and own models: each command does what the page says, as it is pasted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from svend.pipeline import groups, loading
from tests.conftest import ROOT, Workplace
from tests.pages import (
    Fence,
    carry_out,
    commands_of,
    is_as_shown,
    read_fences,
    told_commands,
)

OWN_DATA = read_fences(ROOT / "docs" / "own-data.md")
OWN_MODEL = read_fences(ROOT / "docs" / "own-model.md")


@pytest.fixture
def working_copy(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A folder with the project's conf/, which the pages add to."""
    conf = workplace.folder / "conf"
    shutil.copytree(groups.CONF_DIR, conf)
    for module in (groups, loading):
        monkeypatch.setattr(module, "CONF_DIR", conf)
    return workplace


def read_along(fences: list[Fence], place: Workplace) -> dict[str, str]:
    """Do what the blocks say; return, by section, what the commands that should succeed said."""
    said: dict[str, str] = {}
    for fence in fences:
        if fence.language == "bash":
            for command in commands_of(fence.source):
                done = carry_out(command, place)
                assert done.returncode == 0, f"{command}\n{done.stdout}"
                said[fence.section] = said.get(fence.section, "") + done.stdout
        elif fence.language == "console":
            check_console(fence, place)
    return said


def check_console(fence: Fence, place: Workplace) -> None:
    for command, shown in told_commands(fence.source):
        done = carry_out(command, place)
        told = done.stdout.replace(f"{place.folder}/", "").splitlines()
        # What stands before it, the plan or the data, is not shown.
        last = told[len(told) - len(shown):]
        assert len(last) == len(shown), command
        assert all(map(is_as_shown, last, shown)), f"{command}\n{done.stdout}"
        assert done.returncode == (1 if shown else 0), command


@pytest.mark.slow
def test_the_page_on_own_data_does_what_it_says(working_copy: Workplace) -> None:
    said = read_along(OWN_DATA, working_copy)
    assert "256 chats in desk.jsonl" in said["The file"]
    trained = said["One command"]
    assert "registered   desk version 1 (@quick, @standard)" in trained
    assert "perplexity" in trained and "wrote desk-v1-hf" in trained
    mixed = said["A recipe of your own"]
    assert "tool_use 80%" in mixed and "reasoning 20%" in mixed
    assert "registered   desk version 3 (@quick, @standard, @full)" in said["A gate of your own"]


def test_own_records_are_read_as_the_page_says(working_copy: Workplace) -> None:
    """The quick part of the page: one function, and every refusal."""
    [make_file] = [f for f in OWN_DATA if f.section == "The file" and f.language == "bash"]
    [_, own_function] = [f for f in OWN_DATA if f.section == "A recipe of your own"]
    refusals = [f for f in OWN_DATA if f.section == "What goes wrong"]
    said = read_along([make_file, own_function, *refusals], working_copy)
    assert "calls: calls (calls of tools)" in said["A recipe of your own"]


@pytest.mark.slow
def test_the_page_on_own_models_does_what_it_says(working_copy: Workplace) -> None:
    said = read_along(OWN_MODEL, working_copy)
    trained = said["One command"]
    assert "Mixer, made by mixer.py:make_model" in trained
    assert "registered   mixer version 1 (@quick, @standard)" in trained
    assert "full: not decided; needs accuracy, tool_accuracy too" in trained  # of svend evaluate


def test_every_block_of_the_pages_is_run() -> None:
    for fences in (OWN_DATA, OWN_MODEL):
        assert {fence.language for fence in fences} <= {"bash", "console"}
        assert len(fences) >= 3


def test_the_pages_stand_where_they_are_looked_for() -> None:
    data = Path(ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    guide = Path(ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert "docs/own-data.md" in data
    assert "docs/own-model.md" in guide
