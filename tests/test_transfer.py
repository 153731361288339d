"""`svend bench transfer`: what it finds in given losses, and that it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from svend.bench.results import write_results
from svend.bench.transfer import (
    Case,
    Result,
    Setting,
    known_results,
    learning_rates,
    plan_cases,
)
from svend.bench.transfer_report import (
    best_rate,
    curves_of,
    describe_shifts,
    plot_transfer,
    shifts_of,
    transfer_table,
    transferred_excess,
)
from svend.cli import main
from svend.errors import UserError

RATES = learning_rates(1e-3, 6, 2.0)


def losses_of(vertex: float, floor: float = 2.0) -> list[float]:
    """A parabola over log2 of the rate, with its lowest point at 2^vertex."""
    return [floor + 0.1 * (math.log2(rate) - vertex) ** 2 for rate in RATES]


def results_of(shifts: dict[tuple[str, int, int], float], seeds: int = 2) -> list[Result]:
    return [
        Result(Case(seed, name, width, depth, rate), loss + 0.01 * seed, 1.0)
        for (name, width, depth), vertex in shifts.items()
        for seed in range(seeds)
        for rate, loss in zip(RATES, losses_of(vertex), strict=True)
    ]


def test_rates_are_a_geometric_grid() -> None:
    assert RATES == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    assert np.diff(np.log2(learning_rates(3e-4, 5, math.sqrt(2)))) == pytest.approx(0.5, abs=1e-4)


def test_widths_vary_at_the_first_depth_and_depths_at_the_first_width() -> None:
    cases = plan_cases(["standard"], [64, 128], [2, 4], [0.1], 2)
    assert [(c.seed, c.width, c.depth) for c in cases] == [
        (0, 128, 2), (0, 64, 4), (0, 64, 2), (1, 128, 2), (1, 64, 4), (1, 64, 2),
    ]


def test_the_best_rate_is_the_vertex_of_the_parabola() -> None:
    for vertex in (-8.3, -7.0, -6.6):
        at, loss, at_edge = best_rate(RATES, losses_of(vertex))
        assert (at, loss, at_edge) == (pytest.approx(vertex), pytest.approx(2.0), False)


def test_a_lowest_loss_at_the_edge_is_said_to_be_there() -> None:
    assert best_rate(RATES, losses_of(-12.0)) == (
        math.log2(RATES[0]), losses_of(-12.0)[0], True
    )
    beside_divergence = [3.0, 2.5, 2.0, math.inf, math.inf, math.inf]
    assert best_rate(RATES, beside_divergence) == (math.log2(RATES[2]), 2.0, False)


def test_shifts_are_per_four_times_the_size() -> None:
    curves = curves_of(results_of({
        ("completep", 64, 2): -7.5, ("completep", 128, 2): -7.6, ("completep", 256, 2): -7.7,
        ("completep", 64, 8): -7.3,
        ("standard", 64, 2): -7.0, ("standard", 128, 2): -7.7, ("standard", 256, 2): -8.4,
        ("standard", 64, 8): -13.0,
    }))
    shifts = {(s.parametrisation, s.varied): s for s in shifts_of(curves)}
    assert shifts["completep", "width"].per_four_times == pytest.approx(-0.2)
    assert shifts["completep", "depth"].per_four_times == pytest.approx(0.2)
    assert shifts["standard", "width"].per_four_times == pytest.approx(-1.4)
    assert [s.holds for s in shifts.values()] == [True, True, False, False]
    lines = describe_shifts(list(shifts.values()))
    assert lines[0].endswith("per four times the width; transfers")
    assert lines[2].endswith("does not transfer") and lines[3].endswith("edge of the grid")


def test_curves_have_mean_and_spread_over_seeds_and_the_excess_at_the_bases_rate(
    tmp_path: Path,
) -> None:
    base, other = curves_of(results_of({("standard", 64, 2): -7.0, ("standard", 256, 2): -8.0}, 3))
    assert base.means[0] == pytest.approx(losses_of(-7.0)[0] + 0.01)
    assert base.spreads == pytest.approx([0.01] * 6)
    assert base.best_spread == pytest.approx(0, abs=1e-6)
    assert transferred_excess(base, base) == pytest.approx(0, abs=0.02)
    assert transferred_excess(other, base) == pytest.approx(0.05, abs=0.01)
    assert transfer_table([base, other]).row_count == 2
    plot_transfer([base, other], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_run_counts_as_an_infinite_loss(tmp_path: Path) -> None:
    results = results_of({("standard", 64, 2): -7.0})
    gone = [
        dataclasses.replace(r, loss=None) if r.case.learning_rate == RATES[-1] else r
        for r in results
    ]
    (curve,) = curves_of(gone)
    assert math.isinf(curve.means[-1]) and math.isinf(curve.spreads[-1])
    assert curve.best_log2 == pytest.approx(-7.0)
    plot_transfer([curve], tmp_path / "plot.png")


SETTING = Setting("adamw", 32, 1, 32, 0.02, 300, 2, 16, 3, "cpu", "fp32", "hash")


def test_results_are_read_back_and_those_of_another_setting_refused(tmp_path: Path) -> None:
    results, file = results_of({("standard", 64, 2): -7.0}), tmp_path / "results.json"
    assert known_results(file, SETTING) == {}
    write_results(file, SETTING, results)
    assert list(known_results(file, SETTING).values()) == results
    with pytest.raises(UserError, match="holds results with steps = 3, now 9"):
        known_results(file, dataclasses.replace(SETTING, steps=9))
    file.write_text('{"runs": []}')
    with pytest.raises(UserError, match="not results of bench transfer"):
        known_results(file, SETTING)


@pytest.mark.slow
def test_the_command_runs_only_what_is_not_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = tmp_path / "text.jsonl", tmp_path / "results.json"
    data.write_text("".join(
        json.dumps({"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."}) + "\n"
        for i in range(200)
    ))
    command = [
        "bench", "transfer", "--data", str(data), "--json", str(file), "--widths", "32",
        "--depths", "1", "--parametrisations", "completep", "--seeds", "1", "--rates", "3",
        "--steps", "12", "--batch", "4", "--length", "16", "--vocabulary", "400",
    ]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "3 runs, 0 of them done before" in captured.out
    assert "3 of 3: completep 32x1" in captured.out
    told = json.loads(file.read_text())
    assert [run["case"]["learning_rate"] for run in told["runs"]] == [0.0005, 0.001, 0.002]
    losses = [run["loss"] for run in told["runs"]]
    assert losses[2] < losses[1] < losses[0] < math.log(400) + 0.1

    told["runs"][0]["loss"] = 1.25  # would be another if it were run again
    file.write_text(json.dumps(told))
    assert main([*command, "--plot", str(tmp_path / "plot.svg")]) == 0
    captured = capsys.readouterr()
    assert "3 runs, 3 of them done before" in captured.out
    assert "1.250" in captured.out
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(("options", "message"), [
    (["--rates", "2"], "--rates must be at least 3"),
    (["--widths", "48"], "--widths must be multiples of 32"),
    (["--factor", "1"], "--lowest and --init-std must be above 0, and --factor above 1"),
    (["--parametrisations", "mup"], "--parametrisations mup: known: standard, completep"),
    (["--device", "tpu"], "--device tpu: known: cpu, cuda"),
    (["--data", "missing.txt"], "missing.txt: cannot be read (No such file or directory)"),
])
def test_a_mistake_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "transfer", "--data", "x.txt", *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
