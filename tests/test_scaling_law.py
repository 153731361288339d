"""The law that predicts the next size: found again where it is known, and tried where it is not."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.cli import main
from svend.errors import UserError
from svend.planning.loss_table import read_points
from svend.planning.scaling_law import (
    Point,
    ScalingLaw,
    TooFewPoints,
    backtest,
    expected_end,
    fit_law,
    left_out_error,
    predict,
    why_too_few,
)
from tests.conftest import SHARED_DATA
from tests.refusals import refusal_of

OLMO = SHARED_DATA / "olmo_ladder" / "ladder.csv"
HORIZONS = (0.2, 0.3, 0.5, 1.0)
SIZES = (1e8, 2e8, 4e8, 8e8)
LAW = ScalingLaw(irreducible=1.7, a=400.0, alpha=0.34, b=400.0, beta=0.28, gamma=0.0)


def points_of(
    law: ScalingLaw, sizes: tuple[float, ...] = SIZES, noise: float = 0.0, seed: int = 0
) -> list[Point]:
    """Points of a ladder of 20 tokens per parameter, each rung off by noise of its own."""
    random = np.random.default_rng(seed)
    return [
        Point(size, share * 20 * size, law.loss(size, share * 20 * size) * off, f"{size:g}")
        for size in sizes for off in [1 + noise * random.standard_normal()] for share in HORIZONS
    ]


@settings(max_examples=6, deadline=None)
@given(
    alpha=st.floats(0.2, 0.5), beta=st.floats(0.2, 0.5), gamma=st.sampled_from([0.0, 0.5, 1.0]),
    irreducible=st.floats(1.0, 2.5),
)
def test_a_law_is_found_again_from_its_points(
    alpha: float, beta: float, gamma: float, irreducible: float
) -> None:
    at_smallest = (SIZES[0] ** alpha, (20 * SIZES[0] ** (1 - gamma)) ** beta)
    law = ScalingLaw(irreducible, 0.6 * at_smallest[0], alpha, 0.7 * at_smallest[1], beta, gamma)
    found = predict(points_of(law), 1.6e9, 3.2e10)
    truth = law.loss(1.6e9, 3.2e10)
    assert found.loss == pytest.approx(truth, rel=0.01)
    assert found.low <= truth * 1.001 and found.high >= truth * 0.999


def test_the_interval_holds_the_truth_where_rungs_are_off_by_their_seeds() -> None:
    truth = LAW.loss(1.6e9, 3.2e10)
    held = 0
    for seed in range(8):
        found = predict(points_of(LAW, noise=0.002, seed=seed), 1.6e9, 3.2e10)
        assert found.low < found.loss < found.high
        held += found.low <= truth <= found.high
    assert held >= 7


def test_a_fitted_law_never_rises_with_size_or_data() -> None:
    law = fit_law(points_of(LAW, noise=0.01))
    losses = [[law.loss(n, d) for d in (1e9, 1e10, 1e11)] for n in (1e8, 1e9, 1e10)]
    assert all(a >= b for row in losses for a, b in itertools.pairwise(row))


def test_two_sizes_are_enough_to_predict_a_third_and_less_is_refused() -> None:
    two = points_of(LAW, SIZES[:2])
    assert predict(two, SIZES[2], 20 * SIZES[2]).loss == pytest.approx(
        LAW.loss(SIZES[2], 20 * SIZES[2]), rel=0.01)
    assert why_too_few(two) is None
    for few, reason in (
        (points_of(LAW, SIZES[:1]), "too few sizes (1), at least 2"),
        (two[:7], "too few points (7), at least 8"),
        ([p for p in points_of(LAW) if p.tokens >= 10 * p.parameters], "too few horizons (2)"),
    ):
        assert why_too_few(few) is not None
        with pytest.raises(TooFewPoints) as told:
            predict(few, 1e9, 1e10)
        assert reason in str(told.value)


def test_a_loss_that_is_not_finite_is_no_point() -> None:
    points = [*points_of(LAW)[:-1], Point(8e8, 1.6e10, math.nan, "8e+08")]
    with pytest.raises(UserError, match="not finite"):
        predict(points, 1e9, 1e10)


def test_the_backtest_knows_nothing_of_the_rung_it_predicts() -> None:
    points = points_of(LAW, noise=0.001)
    # The largest rung is made bad: what is predicted for it must not change.
    bad = [p if p.parameters < 8e8 else Point(p.parameters, p.tokens, 2 * p.loss, p.rung)
           for p in points]
    good_rows, bad_rows = (
        table[table["parameters"] == 8e8].reset_index(drop=True)
        for table in (backtest(points), backtest(bad))
    )
    assert list(good_rows["predicted"]) == list(bad_rows["predicted"])
    assert (bad_rows["error"] > 0.9).all() and (good_rows["error"].abs() < 0.02).all()
    assert set(good_rows["fitted_on"]) == {"others", "below"}
    assert left_out_error(bad) > 10 * left_out_error(points)


def test_the_end_is_expected_where_the_run_below_fell_alike() -> None:
    assert expected_end(3.0, 4.0, 3.2) == pytest.approx(2.4)


@pytest.mark.skipif(not OLMO.exists(), reason="OLMo's ladder is not here")
def test_every_size_of_a_published_ladder_is_predicted_from_the_others_within_a_percent() -> None:
    table = backtest(read_points(OLMO))
    assert len(table[table["fitted_on"] == "others"]) == 24
    assert table["error"].abs().max() < 0.01


def table_of(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def ladder_table(folder: Path) -> Path:
    """A table with two rows of each run, of which the later is the run's end."""
    lines = ["run,parameters,tokens,val_loss,step"]
    for number, point in enumerate(points_of(LAW)):
        lines.append(f"{number},{point.parameters},{point.tokens / 2},{2 * point.loss},1")
        lines.append(f"{number},{point.parameters},{point.tokens},{point.loss},2")
    return table_of(folder, "\n".join(lines) + "\n")


def test_a_table_is_predicted_from_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(ladder_table(tmp_path)), "--parameters", "1.6e9", "--tokens",
               "3.2e10"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["points"] == 16
    assert told["loss"] == pytest.approx(LAW.loss(1.6e9, 3.2e10), rel=0.01)
    assert told["low"] <= told["loss"] <= told["high"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "16 points of 4 sizes" in shown and "Each size predicted from the others" in shown


@pytest.mark.parametrize(("text", "line"), [
    ("a,b\n1,2\n", "which column is the loss is not plain (none of a, b); name it with --loss"),
    ("parameters,loss\n1,2\n", "has no column tokens; it has parameters, loss"),
    ("parameters,tokens,loss\n1,x,2\n", "line 2: tokens = x: must be a number above 0"),
    ("parameters,tokens,loss\n1,2,-3\n", "line 2: loss = -3: must be a number above 0"),
    ("parameters,tokens,loss\n1,2,inf\n", "line 2: loss = inf: must be a number above 0"),
    ("parameters,tokens,loss,val_loss\n1,2,3,4\n", "several: loss, val_loss"),
    ("parameters,tokens,loss\n1,2,3\n", "no prediction: too few sizes (1)"),
    ("", "cannot be read as CSV"),
])
def test_a_table_that_says_nothing_is_refused_in_one_line(
    tmp_path: Path, text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(table_of(tmp_path, text)), "--parameters", "1e9", "--tokens", "1e10"]
    assert line in refusal_of(command, tmp_path, capsys)


@pytest.mark.parametrize(("options", "line"), [
    (["--parameters", "many", "--tokens", "1"], "parameters = many: must be a number above 0"),
    (["--parameters", "1", "--tokens", "0"], "tokens = 0: must be a number above 0"),
    (["--parameters", "1"], "--tokens"),
    (["--parameters", "1", "--tokens", "1"], "cannot be read as CSV (No such file or directory)"),
])
def test_a_wrong_option_of_predict_is_refused_in_one_line(
    options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(tmp_path / "absent.csv"), *options]
    assert line in refusal_of(command, tmp_path, capsys)
