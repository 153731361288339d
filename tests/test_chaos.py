"""Chaos itself: killed runs end as the one that was not, and a difference would be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from svend.bench.chaos import EndState
from svend.cli import main


def test_end_states_differ_where_any_part_does() -> None:
    one = EndState({"step_00000010/model.pt": "aa", "metric train/loss": [[1, 0.5]]})
    same = EndState({"metric train/loss": [[1, 0.5]], "step_00000010/model.pt": "aa"})
    lost = EndState({"step_00000010/model.pt": "aa", "metric train/loss": []})
    more = EndState({**one.parts, "runs": 2})
    assert one.sha256 == same.sha256 and one.differences(same) == []
    assert one.sha256 != lost.sha256 and one.differences(lost) == ["metric train/loss"]
    assert one.sha256 != more.sha256 and one.differences(more) == ["runs"]


def test_no_kills_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "--kills", "0"]) == 1
    assert capsys.readouterr().err == "error: --kills 0: must be at least 1\n"


@pytest.mark.slow
def test_killed_runs_end_as_the_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chaos", "--kills", "4", "--folder", str(tmp_path), "--training.compile", "off",
                 "--training.max_steps", "40"]) == 0
    assert "4 of 4 ended as the run that was never killed" in capsys.readouterr().out
