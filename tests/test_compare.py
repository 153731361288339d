"""One report of runs and ladders: what it holds, what it says is missing, how it refuses."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs

import mlflow
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from svend.cli import main
from svend.errors import ConfigError
from svend.pipeline.compare.comparison import FILES, read_comparison
from svend.pipeline.compare.figures import DRAWN, Comparison, draw_figures
from svend.pipeline.compare.predictions import COMPARED, came_true, differences
from svend.pipeline.compare.report import comparability_line, comparison_html, missing_lines
from svend.pipeline.compare.runs import label_runs, matrix_parameters
from svend.pipeline.compare.selection import Wanted, choose_runs
from svend.planning.scaling_law import ScalingLaw
from svend.tracking.history import LoggedRun
from svend.tracking.pages import SCALES_VIEW, SHARED_VIEW_TAG, compare_page
from svend.tracking.runs import PARENT_TAG, metric_history
from tests.conftest import Workplace
from tests.refusals import refusal_of
from tests.registry import store

LAW = ScalingLaw(irreducible=1.6, a=40.0, alpha=0.30, b=60.0, beta=0.32, gamma=0.1)
STEPS, TOKENS_PER_STEP = 8, 50_000
GATES = {"quick.no_nan": "nonfinite_parameters == 0", "full.min_accuracy": "accuracy > 0.1",
         "production.latency_p99": "latency_p99 < 5"}
VERDICTS = (
    "level,gate,metric,value,low_95,high_95,sample_size,comparison,threshold,required,decision\n"
    "quick,no_nan,nonfinite_parameters,1,,,,==,0,True,fail\n"
    "quick,no_nan,nonfinite_parameters,0,,,,==,0,True,pass\n"
    "full,min_accuracy,accuracy,{accuracy},{low},{high},200,>,0.1,True,{decision}\n"
)


@dataclass(frozen=True)
class Rung:
    """What a run of the made ladder is made of."""

    scale: str
    hidden_size: int
    accuracy: float = 0.3
    predicted: tuple[float, float, float] | None = None
    finished: bool = True
    steps: int = STEPS

    @property
    def parameters(self) -> int:
        d = self.hidden_size
        return 2 * (2 * d * d + 2 * d * d // 2 + 3 * d * 2 * d + 2 * d) + 4096 * d


def log_rung(experiment_id: str, rung: Rung, parent: str | None = None, **tags: str) -> str:
    """Log what a rung logs, of losses that lie on LAW; return the run's id."""
    client = MlflowClient()
    model = {"name": f"debug-{rung.scale}", "hidden_size": rung.hidden_size,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 2 * rung.hidden_size, "vocab_size": 4096,
             "max_position_embeddings": 256, "rope_theta": 10000.0, "train_memory_gb": 4,
             "recommended_samples": 1000, "rms_norm_eps": 1e-05}
    params = {f"config.model.{key}": str(value) for key, value in model.items()}
    params |= {f"config.gates.{gate}": must_be for gate, must_be in GATES.items()}
    params |= {"config.training.schedule": "wsd", "config.training.warmup_ratio": "0.05",
               "config.training.decay_ratio": "0.2",
               "config.training.min_learning_rate_ratio": "0.0",
               "config.training.heldout_sequences": "16",
               "config.training.data.max_seq_length": "128"}
    if rung.predicted is not None:
        for name, value in zip(("loss", "low", "high"), rung.predicted, strict=True):
            params[f"ladder.predicted_{name}"] = str(value)
    all_tags = {
        "svend.scale": rung.scale, "svend.device": "NVIDIA H100 80GB HBM3",
        "svend.data_fingerprint": "d" * 64, "svend.tokenizer_sha256": "e" * 64, **tags,
    }
    if parent is not None:
        all_tags |= {PARENT_TAG: parent, "svend.ladder": "made", "svend.ladder.verdict": "pass"}
    run_id = str(client.create_run(experiment_id, run_name=rung.scale).info.run_id)
    metrics: dict[tuple[str, int], float] = {
        ("plan/parameters", 0): rung.parameters, ("plan/tokens", 0): STEPS * TOKENS_PER_STEP,
        ("plan/flops", 0): 1e12, ("plan/peak_memory_gb", 0): 10.0, ("plan/seconds", 0): 400.0,
        ("gate/quick/no_nan", STEPS): 1.0,
    }
    for step in range(1, rung.steps + 1):
        tokens = step * TOKENS_PER_STEP
        loss = LAW.loss(rung.parameters, tokens)
        metrics |= {
            ("train/loss", step): loss + 0.1, ("train/tokens", step): tokens,
            ("train/flops", step): 6.0 * rung.parameters * tokens,
            ("train/tokens_per_second", step): 900.0 + 50 * step,
            ("train/peak_fraction", step): 0.4,
        }
        if step % 2 == 0:
            metrics |= {("eval/heldout_loss", step): loss + 0.05,
                        ("horizon/heldout_loss", step): loss, ("horizon/tokens", step): tokens,
                        ("horizon/flops", step): 6.0 * rung.parameters * tokens}
    if rung.finished:
        metrics |= {("measured/peak_memory_gb", STEPS): 12.0, ("measured/seconds", STEPS): 360.0,
                    ("eval/accuracy", STEPS): rung.accuracy,
                    ("eval/accuracy/low_95", STEPS): rung.accuracy - 0.06,
                    ("eval/accuracy/high_95", STEPS): rung.accuracy + 0.06,
                    ("eval/accuracy/n", STEPS): 200.0, ("eval/accuracy/easy", STEPS): 0.9}
        decision = "pass" if rung.accuracy > 0.1 else "fail"
        client.log_text(run_id, VERDICTS.format(
            accuracy=rung.accuracy, low=rung.accuracy - 0.06, high=rung.accuracy + 0.06,
            decision=decision), "verdicts.csv")
    client.log_batch(
        run_id, [Metric(key, value, 1, step) for (key, step), value in metrics.items()],
        [Param(key, value) for key, value in params.items()],
        [RunTag(key, value) for key, value in all_tags.items()],
    )
    client.set_terminated(run_id, "FINISHED" if rung.finished else "KILLED")
    return run_id


@dataclass(frozen=True)
class Made:
    """A store with a ladder of four rungs, one of them tried twice, and runs beside it."""

    folder: Path
    ladder: str
    rungs: dict[str, str]
    first_attempt: str
    killed: str
    empty: str
    without_ladder: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("compare")
    with store(folder):
        client = MlflowClient()
        experiment = mlflow.set_experiment("scales").experiment_id
        with pytest.raises(ConfigError) as without_ladder:
            choose_runs(Wanted())
        ladder = client.create_run(experiment, run_name="ladder",
                                   tags={"svend.ladder.name": "made"}).info.run_id
        first = log_rung(experiment, Rung("small", 64, accuracy=0.02), ladder)
        expected = {scale: LAW.loss(Rung(scale, size).parameters, STEPS * TOKENS_PER_STEP)
                    for scale, size in (("medium", 128), ("large", 192))}
        rungs = {
            "tiny": log_rung(experiment, Rung("tiny", 32, accuracy=0.05), ladder),
            "small": log_rung(experiment, Rung("small", 64), ladder),
            "medium": log_rung(experiment, Rung(
                "medium", 128, predicted=(expected["medium"], expected["medium"] - 0.01,
                                          expected["medium"] + 0.01)), ladder),
            "large": log_rung(experiment, Rung(
                "large", 192, predicted=(expected["large"] - 0.2, expected["large"] - 0.3,
                                         expected["large"] - 0.1)), ladder),
        }
        log_rung(experiment, Rung("large", 192, steps=2), ladder, **{"svend.ladder.stress": "true"})
        other = client.create_experiment("others")
        killed = log_rung(other, Rung("killed", 64, finished=False), **{
            "svend.data_fingerprint": "f" * 64})
        empty = client.create_run(other, run_name="empty").info.run_id
        client.create_experiment("nothing")
        yield Made(folder, ladder, rungs, first, killed, empty, str(without_ladder.value))


def compared(*runs: str, price: float | None = None) -> Comparison:
    """Return what the command would make a report of."""
    chosen = choose_runs(Wanted(runs))
    return read_comparison(chosen.runs, chosen.left_out, price)


def page_of(comparison: Comparison) -> str:
    """Return the page without its figures."""
    return comparison_html(comparison, [], Path(), "Made.", [])


@pytest.fixture(scope="module")
def ladder_report(made: Made) -> Path:
    """The folder that the command writes of the ladder, which it finds as the newest."""
    out = made.folder / "report"
    assert main(["compare", "--out", str(out), "--gpu-hour-price", "2.50"]) == 0
    return out


class Page(HTMLParser):
    """The rows of a page's tables as lists of (text, class), and the addresses it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str]]] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", dict(attrs).get("class") or ""))
            self._in_cell = True
        if tag == "small":
            self.handle_data(" | ")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            text, kind = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, kind)

    def row(self, first: str) -> list[tuple[str, str]]:
        (found,) = [row[1:] for row in self.rows if row and row[0][0].startswith(first)]
        return found


def test_a_ladder_is_its_rungs_the_newest_attempt_of_each_by_size(ladder_report: Path,
                                                                  made: Made) -> None:
    table = pd.read_parquet(ladder_report / "comparison.parquet")
    assert dict(zip(table["run"], table["run_id"], strict=True)) == made.rungs
    assert list(table["run"]) == ["tiny", "small", "medium", "large"]
    page = (ladder_report / "comparison.html").read_text(encoding="utf-8")
    assert f"small ({made.first_attempt[:8]}): an earlier attempt of a rung" in page


def test_the_table_holds_what_the_runs_logged(ladder_report: Path) -> None:
    row = pd.read_parquet(ladder_report / "comparison.parquet").set_index("run").loc["small"]
    parameters = Rung("small", 64).parameters
    assert row["matrix_parameters"] == parameters
    assert row["tokens"] == STEPS * TOKENS_PER_STEP
    assert row["flops"] == 6.0 * parameters * STEPS * TOKENS_PER_STEP
    assert row["heldout_loss"] == pytest.approx(LAW.loss(parameters, row["tokens"]) + 0.05)
    assert row["tokens_per_second"] == 1125.0
    assert row["planned_tokens_per_second"] == 1000.0
    assert row["speed_ratio"] == pytest.approx(1.125)
    assert row["memory_ratio"] == pytest.approx(1.2)
    assert row["seconds_ratio"] == pytest.approx(0.9)
    assert (row["device_kind"], row["hours"], row["cost"]) == ("GPU", 0.1, pytest.approx(0.25))
    assert (row["eval/accuracy"], row["eval/accuracy/n"]) == (0.3, 200)
    assert row["gate/full/min_accuracy"] == "pass"
    assert row["schedule"] == "wsd, warmup 0.05, decay 0.2, end at 0.0"


def test_parquet_and_csv_are_one_table(ladder_report: Path) -> None:
    parquet = pd.read_parquet(ladder_report / "comparison.parquet")
    csv = pd.read_csv(ladder_report / "comparison.csv")
    pd.testing.assert_frame_equal(
        parquet.astype(object).where(parquet.notna(), None),
        csv.astype(object).where(csv.notna(), None), check_exact=True, check_dtype=False,
    )


def test_curves_are_long_and_know_tokens_and_flops(ladder_report: Path) -> None:
    curves = pd.read_parquet(ladder_report / "curves.parquet")
    own = curves[curves["run"] == "tiny"]
    assert dict(own["kind"].value_counts()) == {"train": 8, "heldout": 4, "horizon": 4}
    assert (own["tokens"] == own["step"] * TOKENS_PER_STEP).all()
    assert own["flops"].notna().all()
    train = own[own["kind"] == "train"]
    assert list(train["step"]) == list(range(1, STEPS + 1))
    assert train["loss"].is_monotonic_decreasing


def test_the_law_is_fitted_and_each_rung_predicted_by_others(ladder_report: Path,
                                                             made: Made) -> None:
    fit = compared(made.ladder).fit
    assert fit.law is not None
    assert fit.law.loss(1e7, 1e7) == pytest.approx(LAW.loss(1e7, 1e7), rel=0.02)
    page = (ladder_report / "comparison.html").read_text(encoding="utf-8")
    assert f"L(N, D) = {fit.law}, fitted to 16 horizons of 4 runs" in page
    large = [row for row in Page(page).rows
             if row[0][0] == "large" and row[1][0] == "from those below"]
    assert large[0][2][0] == "4"
    assert float(large[0][3][0].rstrip("%")) < 1


def test_predictions_stand_beside_what_came_true(ladder_report: Path, made: Made) -> None:
    rows = came_true(compared(made.ladder).runs).set_index("run")
    assert list(rows["came_true"]) == ["inside", "above"]
    assert rows.loc["medium", "error"] == pytest.approx(0, abs=1e-9)
    page = Page((ladder_report / "comparison.html").read_text(encoding="utf-8"))
    shown = [row for row in page.rows if ("above", "above") in row]
    assert [row[0][0] for row in shown] == ["large"]


def test_a_rung_that_was_stopped_is_not_held_against_the_prediction_of_its_end(made: Made) -> None:
    experiment = MlflowClient().create_experiment("stopped")
    rungs = [Rung("stopped", 64, predicted=(7.0, 6.9, 7.1), finished=False, steps=4),
             Rung("ended", 64, predicted=(7.0, 6.9, 7.1))]
    frame = compared(*(log_rung(experiment, rung) for rung in rungs)).runs
    rows = came_true(frame).set_index("run")
    assert rows.loc["stopped", "came_true"] == "not at its end"
    assert math.isnan(rows.loc["stopped", "measured"])
    assert rows.loc["ended", "measured"] == frame.set_index("run").loc["ended", "horizon_loss"]


def test_the_gate_matrix_says_each_decision_in_words_and_colour(ladder_report: Path) -> None:
    page = Page((ladder_report / "comparison.html").read_text(encoding="utf-8"))
    assert [text for text, _ in next(row for row in page.rows if row[0][0] == "gate")[1:]] == [
        "tiny", "small", "medium", "large"]
    accuracy = page.row("full: min_accuracy | accuracy > 0.1")
    assert accuracy[0] == ("FAIL | 0.05, -0.01 to 0.11, n 200", "fail")
    assert accuracy[1] == ("pass | 0.3, 0.24 to 0.36, n 200", "pass")
    # The last decision of a gate counts.
    assert {kind for _, kind in page.row("quick: no_nan")} == {"pass"}
    assert page.row("production: latency_p99") == [("not decided", "none")] * 4


def test_all_figures_are_drawn_and_in_the_page(ladder_report: Path) -> None:
    names = {figure.name for figure in DRAWN}
    pngs = {path.stem: path.read_bytes() for path in ladder_report.glob("*.png")}
    assert set(pngs) == names
    assert all(content.startswith(b"\x89PNG") for content in pngs.values())
    page = Page((ladder_report / "comparison.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == len(names)


def test_the_page_loads_nothing_and_is_small(ladder_report: Path) -> None:
    text = (ladder_report / "comparison.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 2_000_000


def test_the_page_fits_a_phone_and_paper(ladder_report: Path) -> None:
    text = (ladder_report / "comparison.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    style = re.findall(r"<style>(.*?)</style>", text, re.S)[0]
    assert not re.search(r"(?<!max-)width:\s*\d+(px|em|in|cm)", style)
    assert "img{width:100%;height:auto" in style
    assert text.count("<table>") == text.count('<div class="scroll"><table>')
    assert "@media print" in style


def test_the_report_is_logged_on_a_run_of_its_own(ladder_report: Path, made: Made) -> None:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("scales")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`svend.comparison` != ''")
    assert run.info.run_name == "comparison"
    assert run.info.status == "FINISHED"
    assert run.data.tags["svend.comparison"].split(",") == list(made.rungs.values())
    logged = {Path(f.path).name for f in client.list_artifacts(run.info.run_id, "comparison")}
    assert logged == {path.name for path in ladder_report.iterdir()} == set(FILES)
    # A comparison is none of the runs of its experiment that trained.
    chosen = choose_runs(Wanted(experiment="scales"))
    assert run.info.run_id not in {other.run_id for other in chosen.runs}
    assert len(chosen.runs) == 6


def test_the_experiment_offers_the_columns_for_scales(ladder_report: Path) -> None:
    experiment = MlflowClient().get_experiment_by_name("scales")
    assert experiment is not None
    view = json.loads(experiment.tags[f"{SHARED_VIEW_TAG}{SCALES_VIEW}"])
    runs = MlflowClient().search_runs([experiment.experiment_id], view["searchFilter"])
    assert {run.info.run_name for run in runs} == {"tiny", "small", "medium", "large"}
    assert all(_has(runs, column) for column in view["selectedColumns"])
    for chart in view["compareRunCharts"]:
        assert all(chart["metricKey"] in run.data.metrics for run in runs)
        assert all(chart["selectedXAxisMetricKey"] in run.data.metrics for run in runs)


def test_the_page_of_chosen_runs_is_that_of_the_server() -> None:
    address = compare_page("https://tracking.example/", ["1", "2"], ["a", "b"])
    place, _, query = address.partition("/#/compare-runs?")
    assert place == "https://tracking.example"
    fields = parse_qs(query)
    assert json.loads(fields["runs"][0]) == ["a", "b"]
    assert json.loads(fields["experiments"][0]) == ["1", "2"]


def _has(runs: list[Run], column: str) -> bool:
    """Return whether some run has what a column shows."""
    kind, key = column.split(".", 1)
    return any(key.strip("`") in getattr(run.data, kind) for run in runs)


def test_what_a_run_did_not_log_is_said(made: Made) -> None:
    comparison = compared(made.rungs["small"], made.killed)
    lines = missing_lines(comparison)
    assert "measured time: not logged by killed (KILLED); a run logs it as it finishes" in lines
    assert any(line.startswith("gates without a decision, killed: full/min_accuracy (must be "
                               "accuracy > 0.1)") for line in lines)
    page = page_of(comparison)
    text = comparability_line(comparison.runs)
    assert f"data fingerprint: {'d' * 12} (small); {'f' * 12} (killed)" in text
    assert text in page
    assert "No law is fitted: the runs differ in data fingerprint." in page
    assert ("not logged", "none") in [cell for row in Page(page).rows for cell in row]
    assert [("killed", ""), ("not measured", "none")] in Page(page).rows
    assert not re.search(r"<td[^>]*></td>|>nan<|>None<", page.replace(
        # The sum has no device.
        "<td>sum of what is logged</td><td></td>", ""))


def test_a_run_alone_has_a_report(made: Made) -> None:
    comparison = compared(made.killed)
    page = page_of(comparison)
    assert "One run: there is nothing to hold it against." in page
    assert "No law is fitted: no prediction: too few sizes (1), at least 2 are needed." in page
    assert "No run carries a prediction" in page
    assert "No run has measured a benchmark." in page


def test_hours_on_a_cpu_are_not_priced_as_those_of_a_gpu(made: Made) -> None:
    experiment = MlflowClient().create_experiment("cpu")
    run_id = log_rung(experiment, Rung("laptop", 32), **{"svend.device": "AMD EPYC, 2 threads"})
    comparison = compared(run_id, price=2.5)
    assert comparison.runs.loc[0, "device_kind"] == "CPU"
    assert math.isnan(comparison.runs.loc[0, "cost"])
    assert ("no GPU", "none") in [
        cell for row in Page(page_of(comparison)).rows for cell in row]


def test_figures_of_an_earlier_report_do_not_stay(made: Made) -> None:
    out = made.folder / "again"
    out.mkdir()
    for name in ("fit.png", "accuracy.png", "notes.txt"):
        (out / name).write_text("mine", encoding="utf-8")
    assert main(["compare", made.killed[:12], "--out", str(out)]) == 0
    assert not (out / "fit.png").exists()
    assert not (out / "accuracy.png").exists()
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_disk_that_fills_up_leaves_the_earlier_report_whole(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    out.mkdir()
    for name in FILES:
        (out / name).write_text("earlier", encoding="utf-8")
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("shutil.copytree", side_effect=full):
        line = refusal_of(["compare", made.killed, "--out", str(out)], tmp_path, capsys)
    assert "report: cannot be written (No space left on device)" in line


def test_the_run_of_mlflow_run_is_joined(made: Made) -> None:
    client = MlflowClient()
    experiment = client.create_experiment("joined")
    run_id = client.create_run(experiment, run_name="bold-hare-17").info.run_id
    with mock.patch.dict(os.environ, {"MLFLOW_RUN_ID": run_id}):
        out = made.folder / "joined"
        # As `mlflow run` passes what is left out.
        assert main(["compare", f"{made.rungs['tiny']},{made.killed}", "--ladder", "",
                     "--experiment", "", "--out", str(out)]) == 0
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("comparison", "FINISHED")
    assert [f.path for f in client.list_artifacts(run_id)] == ["comparison"]


def test_a_joined_run_says_why_it_failed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    with mock.patch.dict(os.environ, {"MLFLOW_RUN_ID": run_id}):
        assert main(["compare", "fffff"]) == 1
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert any("run fffff: not in the tracking store" in value for value in run.data.tags.values())


REFUSALS = [
    ("nonesuch", "run nonesuch: not in the tracking store"),
    ("0123456789abcdef0123456789abcdef", "not in the tracking store"),
    ("{empty}", "has logged no loss, and no run below it has"),
    ("--ladder nonesuch", "ladder nonesuch: no ladder of the tracking store has this name"),
    ("--ladder {tiny}", "the run tiny is not a ladder's; give it as RUN"),
    ("--ladder o'clock", "ladder o'clock: no ladder"),
    ("--experiment nonesuch", "experiment nonesuch: not in the tracking store"),
    ("--experiment nothing", "experiment nothing: none of its 0 runs has logged a loss"),
    ("{tiny} --out {here}/file", "{here}/file: cannot be written"),
    ("{tiny} --out {here}/file/below", "cannot be written"),
    ("{tiny} --out {here}/" + "a" * 300, "cannot be written (File name too long)"),
    ("{tiny} --gpu-hour-price cheap", "gpu-hour-price = cheap: must be a number, 0 or more"),
    ("{tiny} --gpu-hour-price -1", "gpu-hour-price"),
    ("{tiny} --gpu-hour-price nan", "gpu-hour-price = nan"),
    ("{tiny} --colour red", "compare takes no option --colour"),
    ("--ladder", "--ladder: expected at least one argument"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSALS)
def test_bad_input_is_one_line_and_nothing_is_written(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, says: str
) -> None:
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    before = _run_count()
    place = {"here": tmp_path, "empty": made.empty, "tiny": made.rungs["tiny"]}
    words = arguments.format(**place).split()
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    assert says.format(**place) in refusal_of(["compare", *words], tmp_path, capsys)
    assert _run_count() == before


def _run_count() -> int:
    client = MlflowClient()
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return len(client.search_runs(ids))


def test_an_id_that_fits_two_runs_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [run.info.run_id for run in MlflowClient().search_runs(
        [e.experiment_id for e in MlflowClient().search_experiments()])]
    first = next(c for c in "0123456789abcdef" if sum(i.startswith(c) for i in ids) > 1)
    assert "runs begin so" in refusal_of(
        ["compare", first, "--out", str(tmp_path / "out")], tmp_path, capsys)


def test_a_store_without_ladders_says_what_to_give(made: Made) -> None:
    assert made.without_ladder == (
        "nothing to compare: the tracking store has no ladder; give runs by their ids, or "
        "--experiment NAME"
    )


def test_where_a_run_went_back_the_last_value_of_a_step_counts(made: Made) -> None:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    points = [(1, 5.0), (2, 9.0), (3, 9.5), (2, 4.0), (3, 3.0)]
    client.log_batch(run_id, [Metric("train/loss", value, 1000 + time, step)
                              for time, (step, value) in enumerate(points)])
    assert metric_history(run_id, "train/loss") == {1: 5.0, 2: 4.0, 3: 3.0}


def _bare_run(run_id: str, name: str, scale: str, model: str) -> LoggedRun:
    return LoggedRun(run_id, name, "1", "e", "FINISHED", 0.0, {},
                     {"config.model.name": model} if model else {},
                     {"svend.scale": scale} if scale else {})


NAMES = st.sampled_from(["", "tiny", "small", "a_b", "$x$", "<b>"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES, NAMES), min_size=1, max_size=8))
def test_every_run_has_a_name_of_its_own(named: list[tuple[str, str, str]]) -> None:
    runs = [_bare_run(f"{number % 2:031x}{number:x}", *names) for number, names in enumerate(named)]
    labels = label_runs(runs)
    assert set(labels) == {run.run_id for run in runs}
    assert len(set(labels.values())) == len(runs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=6),
       st.sampled_from(sorted(COMPARED)))
def test_runs_are_comparable_exactly_where_all_is_alike(values: list[str | None],
                                                        column: str) -> None:
    runs = pd.DataFrame({"run": [f"r{number}" for number in range(len(values))],
                         **{other: ["same"] * len(values) for other in COMPARED}})
    runs[column] = pd.Series(values, dtype=object)
    found = differences(runs)
    assert bool(found) == (len(set(values)) > 1)
    if found:
        (having,) = found.values()
        assert sorted(itertools.chain(*having.values())) == sorted(runs["run"])
        assert all(run in comparability_line(runs) for run in runs["run"])


@settings(max_examples=10, deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_names_are_shown_and_never_obeyed(comparison_of_two: Comparison, name: str) -> None:
    hostile = f"<script src=http://x>{name}"
    page = comparison_html(renamed(comparison_of_two, {"killed": hostile}), [], Path(), name,
                           [(hostile, hostile)])
    assert "<script" not in page
    assert not {"script", "b"} & set(Page(page).tags)


@pytest.fixture(scope="module")
def comparison_of_two(made: Made) -> Comparison:
    return compared(made.rungs["small"], made.killed)


def renamed(comparison: Comparison, names: dict[str, str]) -> Comparison:
    """Return a comparison whose runs have other names."""
    frames = {part: getattr(comparison, part).replace({"run": names})
              for part in ("runs", "curves", "gates")}
    return dataclasses.replace(comparison, **frames)


def test_any_name_can_be_drawn(made: Made, tmp_path: Path) -> None:
    comparison = compared(made.ladder, made.killed)
    names = ["$x_{", "_hidden", "日本語 🙂", "a\\b%", "x" * 200]
    hostile = renamed(comparison, dict(zip(comparison.runs["run"], names, strict=True)))
    assert set(hostile.runs["run"]) == set(names)
    drawn = draw_figures(hostile, tmp_path)
    assert {"loss_by_tokens", "predicted", "planned", "accuracy"} <= {f.name for f in drawn}


def test_a_shape_that_is_not_on_record_has_no_n() -> None:
    assert math.isnan(matrix_parameters(_bare_run("0", "a", "tiny", "m")))


@pytest.mark.slow
def test_mlflow_run_makes_the_report_of_real_runs(workplace: Workplace) -> None:
    for name in ("one", "two"):
        done = workplace.run(workplace.train_command(model__name=f"svend-{name}",
                                                     training__experiment_name="real"))
        assert done.returncode == 0, done.stdout
    root = Path(__file__).resolve().parents[1]
    done = workplace.run([
        sys.executable, "-m", "mlflow", "run", str(root), "--env-manager", "local", "-e",
        "compare", "-P", "experiment=real", "-P", f"out={workplace.folder / 'report'}",
    ])
    assert done.returncode == 0, done.stdout
    table = pd.read_csv(workplace.folder / "report" / "comparison.csv")
    assert sorted(table["run"]) == ["svend-one", "svend-two"]
    assert table["heldout_loss"].notna().all()
    assert table["seconds_ratio"].gt(0).all()
    assert (table["gate/quick/no_nan"] == "pass").all()


def test_help_needs_neither_mlflow_nor_matplotlib() -> None:
    code = ("import sys; from svend.cli import main\n"
            "try: main(['compare', '--help'])\nexcept SystemExit: pass\n"
            "assert not {'mlflow', 'matplotlib', 'torch'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--gpu-hour-price" in done.stdout
