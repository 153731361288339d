"""The coordinate check passes CompleteP, and notices each missing rule that it can see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svend.bench.coordinates import Check, Point, measure_coordinates, slopes_of
from svend.cli import main
from svend.models.parametrisation import Rule
from svend.pipeline.config import Optimizer, Parametrisation

# What in a few steps changes the size of no activation: test_parametrisation.py holds these.
INVISIBLE = {Rule.ATTENTION, Rule.HIDDEN_DECAY, Rule.EPSILON}
SMALL = ["--widths", "32", "256", "--depths", "2", "16", "--steps", "6", "--seeds", "1"]


def steep(
    optimizer: Optimizer, removed: Rule | None = None,
    parametrisation: Parametrisation = Parametrisation.COMPLETEP,
) -> set[str]:
    """Return what grows or shrinks, as "width residual"."""
    check = Check(
        optimizer=optimizer, parametrisation=parametrisation, widths=(32, 64, 256),
        depths=(2, 8, 16), steps=6, seeds=1, learning_rate=1e-2, removed=removed,
    )
    slopes = slopes_of(measure_coordinates(check, lambda _: None))
    assert len(slopes) == 8
    return {f"{slope.varied} {slope.activation}" for slope in slopes if not slope.flat}


@pytest.mark.parametrize("optimizer", Optimizer)
def test_completep_is_flat_and_the_standard_parametrisation_is_not(optimizer: Optimizer) -> None:
    assert steep(optimizer) == set()
    standard = steep(optimizer, parametrisation=Parametrisation.STANDARD)
    assert {"width attention", "width feed-forward", "width residual", "width logits"} <= standard


@pytest.mark.parametrize("optimizer", [
    Optimizer.ADAMW, pytest.param(Optimizer.MUON, marks=pytest.mark.slow),
])
@pytest.mark.parametrize(("rule", "seen_in"), [
    (Rule.HIDDEN_RATE, "width feed-forward"),
    (Rule.HIDDEN_INIT, "width attention"),
    (Rule.DOWN_PROJECTION, "width feed-forward"),
    (Rule.OUTPUT_PROJECTION, "width attention"),
    (Rule.RESIDUAL, "depth residual"),
    (Rule.LOGITS, "width logits"),
])
def test_a_missing_rule_is_seen(optimizer: Optimizer, rule: Rule, seen_in: str) -> None:
    assert seen_in in steep(optimizer, rule)


def test_every_rule_is_seen_here_or_by_its_value() -> None:
    (marks,) = (
        mark for mark in test_a_missing_rule_is_seen.pytestmark  # type: ignore[attr-defined]
        if len(mark.args[1]) > len(Optimizer)
    )
    assert {rule for rule, _ in marks.args[1]} | INVISIBLE == set(Rule)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_whole_check_passes_from_three_seeds(
    optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coordcheck", "--optimizer", optimizer]) == 0


def test_the_slope_is_that_of_a_power_law_and_nan_is_not_flat() -> None:
    points = [Point("width", n, 2, {"a": 3 * n**0.75, "b": float("nan")}) for n in (64, 128, 512)]
    a, b = slopes_of(points)
    assert (a.varied, a.value) == ("width", pytest.approx(0.75))
    assert not a.flat and not b.flat


def test_the_command_prints_writes_and_tells_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    assert main(["coordcheck", *SMALL, "--json", str(figures), "--plot", str(picture)]) == 0
    assert "flat: every slope" in capsys.readouterr().out
    told = json.loads(figures.read_text())
    assert [(p["width"], p["depth"]) for p in told["points"]] == [(32, 2), (256, 2), (32, 2),
                                                                  (32, 16)]
    assert all(slope["flat"] for slope in told["slopes"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["coordcheck", *SMALL, "--without", "residual-multiplier"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "not flat:" in out and "residual by depth" in out


@pytest.mark.parametrize(("options", "message"), [
    (["--without", "nothing"], "--without nothing: known: hidden-rate, "),
    (["--parametrisation", "mup"], "--parametrisation mup: known: standard, completep"),
    (["--optimizer", "sgd"], "--optimizer sgd: known: adamw, muon"),
    (["--widths", "40", "80"], "--widths must be multiples of 16"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--widths", "64", "--depths", "2"], "give at least two --widths or two --depths"),
])
def test_a_mistake_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coordcheck", *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1 and not captured.out
