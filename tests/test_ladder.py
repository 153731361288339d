"""The ladder: what is predicted before, looked at on the way, judged after, and refused."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from svend.errors import ConfigError, UserError
from svend.pipeline import replica
from svend.pipeline.config import ModelScale
from svend.pipeline.console import make_console
from svend.pipeline.ladder.below import find_below
from svend.pipeline.ladder.climb import LadderClimb, Wish
from svend.pipeline.ladder.display import plan_rungs, show_standing, standing_table
from svend.pipeline.ladder.options import Ladder, find_differences, load_ladder
from svend.pipeline.ladder.standing import (
    LADDER_FILE,
    Attempt,
    FrozenPrediction,
    Look,
    Override,
    Standing,
    State,
    ladder_folder,
)
from svend.pipeline.ladder.trend import (
    BELOW_PLAUSIBLE,
    PREDICTION_ERROR,
    Bounds,
    Trend,
    backtest_bound,
    judge_early,
    prediction_gates,
)
from svend.pipeline.run_folder import folder_name
from svend.pipeline.runner import PipelineResult
from svend.pipeline.validation import GateResult, Measurement
from svend.planning.scaling_law import Point, Prediction, ScalingLaw
from svend.training.loop import train_steps
from svend.training.state import Horizon
from svend.training.trend import LossTrend
from tests.conftest import Workplace
from tests.prepared import data_cache
from tests.refusals import refusal_of
from tests.registry import store

# Three rungs of seconds; bounds so wide that the loss of so short a run passes.
MICRO = {
    "ladder.end": "medium", "ladder.tokens_per_parameter": "null", "training.max_steps": "40",
    "ladder.trend.hold_above": "9", "ladder.trend.stop_above": "9",
    "ladder.trend.investigate_below": "-0.9", "ladder.trend.early_stop_above": "9",
    "training.batch_size": "4", "training.heldout_sequences": "8", "training.logging_steps": "10",
    "data.max_seq_length": "64", "data.num_samples": "150", "model.vocab_size": "320",
    "eval_benchmarks": "[]", "health.every_steps": "null",
}
WIDE = Bounds(0.01, 0.02, -0.015)
AS_IT_STANDS = Wish()
TREND = load_ladder("miniature", {}, []).config.trend


def micro_ladder(folder: Path, **changes: str) -> Ladder:
    settings = {
        **MICRO, "checkpoint_dir": str(folder / "checkpoints"),
        "data.cache_dir": str(data_cache()),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return load_ladder("miniature", {}, list(settings.items()))


def climb(folder: Path, wish: Wish = AS_IT_STANDS, **changes: str) -> list[PipelineResult]:
    ladder = micro_ladder(folder, **changes)
    return LadderClimb(ladder, "micro", folder / "ladder").go(wish)


def standing(folder: Path) -> Standing:
    return Standing.open(folder / "ladder")


@dataclass(frozen=True)
class Climbed:
    """A ladder of three rungs that was climbed, and what the store had at each first step."""

    folder: Path
    results: list[PipelineResult]
    at_first_step: list[dict[str, str]]

    def run_of(self, number: int) -> Run:
        return MlflowClient().get_run(str(self.results[number].run_id))


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Climbed]:
    folder = tmp_path_factory.mktemp("ladder")
    seen: list[dict[str, str]] = []

    def looked_at(state: Any, *others: Any) -> Iterator[Any]:
        first = state.step == 0
        for metrics in train_steps(state, *others):
            if first:
                runs = MlflowClient().search_runs(["1"], order_by=["attributes.start_time DESC"])
                seen.append(dict(runs[0].data.params))
                first = False
            yield metrics

    with store(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "train_steps", looked_at)
        yield Climbed(folder, climb(folder), seen)


def test_every_rung_is_a_run_below_the_ladders_and_rests_on_the_one_before(
    climbed: Climbed
) -> None:
    assert [result.success for result in climbed.results] == [True] * 3
    parent = standing(climbed.folder).run_id
    runs = [climbed.run_of(number) for number in range(3)]
    assert [run.data.tags["mlflow.parentRunId"] for run in runs] == [parent] * 3
    assert [run.data.tags["svend.ladder.rung"] for run in runs] == ["tiny", "small", "medium"]
    assert [run.data.tags.get("svend.parent_scale_run_id") for run in runs] == [
        None, runs[0].info.run_id, runs[1].info.run_id]
    assert MlflowClient().get_run(parent).info.status == "FINISHED"
    for run, width in zip(runs, (24, 32, 48), strict=True):
        version = MlflowClient().get_model_version_by_alias(f"svend-miniature-{width}", "full")
        assert version.run_id == run.info.run_id


def test_a_prediction_is_in_the_store_before_the_first_step_and_cannot_be_changed(
    climbed: Climbed
) -> None:
    predicted = [params.get("ladder.predicted_loss") for params in climbed.at_first_step]
    assert predicted[:2] == [None, None] and predicted[2] is not None
    run = climbed.run_of(2)
    assert run.data.params["ladder.predicted_loss"] == predicted[2]
    with pytest.raises(MlflowException, match="already"):
        MlflowClient().log_param(run.info.run_id, "ladder.predicted_loss", "1.0")
    attempt = standing(climbed.folder).newest(ModelScale.MEDIUM)
    assert attempt is not None and attempt.predicted is not None and attempt.loss is not None
    assert f"{attempt.predicted.loss:.6f}" == predicted[2]
    assert attempt.error == pytest.approx(attempt.loss / attempt.predicted.loss - 1)
    first = standing(climbed.folder).newest(ModelScale.TINY)
    assert first is not None and first.unpredicted.startswith("too few sizes (0)")


def test_each_horizon_is_a_point_on_record_and_the_looks_are_at_those_before_the_end(
    climbed: Climbed
) -> None:
    for number, scale in enumerate((ModelScale.TINY, ModelScale.SMALL, ModelScale.MEDIUM)):
        attempt = standing(climbed.folder).newest(scale)
        assert attempt is not None
        assert [h.step for h in attempt.horizons] == [8, 12, 20, 40]
        history = MlflowClient().get_metric_history(
            str(climbed.results[number].run_id), "horizon/heldout_loss")
        assert {p.step: p.value for p in history} == {h.step: h.loss for h in attempt.horizons}
    assert attempt is not None
    assert [look.step for look in attempt.looks] == [8, 12, 20]


def test_a_ladder_that_is_climbed_trains_nothing_more(climbed: Climbed) -> None:
    before = (climbed.folder / "ladder" / LADDER_FILE).read_text()
    assert climb(climbed.folder) == []
    assert (climbed.folder / "ladder" / LADDER_FILE).read_text() == before


def test_full_is_decided_on_the_trend_of_the_loss_too(climbed: Climbed) -> None:
    client, run = MlflowClient(), climbed.run_of(2)
    for gate in ("loss_falls", "loss_as_predicted", "loss_not_too_good"):
        assert run.data.metrics[f"gate/full/{gate}"] == 1.0
    assert "gate/full/loss_as_predicted" not in climbed.run_of(1).data.metrics
    assert run.data.metrics["train/loss_slope_bound"] < 0
    assert client.get_run(run.info.run_id).data.tags["svend.ladder.verdict"] == "pass"


def test_the_rungs_below_are_found_by_the_registry(climbed: Climbed) -> None:
    ladder = micro_ladder(climbed.folder, ladder__start="medium")
    assert ladder.below is not None
    found = find_below(ladder.below, ladder.rungs[ModelScale.MEDIUM])
    assert [(a.scale.value, len(a.horizons)) for a in found] == [("tiny", 4), ("small", 4)]
    of_ladder = standing(climbed.folder).attempts
    assert [a.points() for a in found] == [a.points() for a in of_ladder[:2]]
    assert [a.data_fingerprint for a in found] == [a.data_fingerprint for a in of_ladder[:2]]


def test_a_start_above_what_the_registry_has_is_refused(climbed: Climbed) -> None:
    with pytest.raises(UserError) as told:
        climb(climbed.folder / "other", ladder__start="medium",
              model__name="svend-absent")
    assert "the registry has no version of svend-absent, the rung below (small)" in str(
        told.value)
    ladder = micro_ladder(climbed.folder, ladder__start="medium")
    other = replace(ladder.rungs[ModelScale.MEDIUM], training=replace(
        ladder.rungs[ModelScale.MEDIUM].training, horizons=[0.5]))
    assert ladder.below is not None
    with pytest.raises(UserError, match=r"training.horizons is \[0.5\].*not comparable"):
        find_below(ladder.below, other)


@pytest.mark.slow
def test_a_rung_on_other_data_than_the_one_below_is_refused(climbed: Climbed) -> None:
    before = (climbed.folder / "ladder" / LADDER_FILE).read_text()
    climb(climbed.folder, ladder__end="large", data__num_samples="160")
    attempt = standing(climbed.folder).newest(ModelScale.LARGE)
    assert attempt is not None and not attempt.may_go_on
    assert "the data's fingerprint is" in attempt.reason and "not comparable" in attempt.reason
    (climbed.folder / "ladder" / LADDER_FILE).write_text(before)


@pytest.mark.slow
def test_a_rung_that_fails_stays_failed_until_it_is_retried_or_overridden(
    climbed: Climbed, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = {"ladder__end": "large",
              "training__validation_gates": "{loss_falls: -99}"}
    results = climb(climbed.folder, **strict)
    assert [result.success for result in results] == [False]
    attempt = standing(climbed.folder).newest(ModelScale.LARGE)
    assert attempt is not None and attempt.state is State.FAILED
    assert "loss_falls" in attempt.reason
    run = MlflowClient().get_run(str(results[0].run_id))
    assert run.info.status == "FAILED"
    parent = MlflowClient().get_run(standing(climbed.folder).run_id)
    assert parent.info.status == "FAILED"
    assert parent.data.tags["svend.reason"].startswith("rung large: FULL gate failed")
    with pytest.raises(UserError, match=r"stopped at rung large: .*--retry.*--override REASON"):
        climb(climbed.folder, **strict)

    retried = climb(climbed.folder, Wish(retry=True), **strict)
    assert [result.success for result in retried] == [False]
    attempts = standing(climbed.folder).attempts
    assert [(a.scale.value, a.number) for a in attempts[-2:]] == [("large", 1), ("large", 2)]

    assert climb(climbed.folder, Wish(override="it is a test"), **strict) == []
    overridden = standing(climbed.folder).newest(ModelScale.LARGE)
    assert overridden is not None and overridden.may_go_on and overridden.override is not None
    assert overridden.override.reason == "it is a test" and "@" in overridden.override.by
    tags = MlflowClient().get_run(standing(climbed.folder).run_id).data.tags
    assert tags["svend.ladder.override.large"].startswith("it is a test (")
    with pytest.raises(UserError, match="no rung of it has failed"):
        climb(climbed.folder, Wish(retry=True), **strict)
    capsys.readouterr()
    show_standing(make_console(), standing(climbed.folder))
    shown = capsys.readouterr().out
    assert "overridden by" in shown and "it is a test" in shown


def test_a_plan_says_what_each_rung_will_cost_and_lose(climbed: Climbed) -> None:
    ladder = micro_ladder(climbed.folder, ladder__end="large")
    history = standing(climbed.folder).attempts[:3]
    plans = plan_rungs(ladder, history)
    assert [plan.scale.value for plan in plans] == ["tiny", "small", "medium", "large"]
    assert all(plan.fits and plan.seconds is not None and plan.measured for plan in plans)
    assert all(plan.predicted is not None for plan in plans)
    assert plan_rungs(ladder, history[:1])[3].predicted is None


@pytest.mark.slow
def test_a_ladder_that_is_killed_goes_on_at_its_rung_and_step(workplace: Workplace) -> None:
    settings = {**MICRO, "checkpoint_dir": str(workplace.checkpoints), "training.max_steps": "150",
                "training.save_steps": "30", "data.cache_dir": str(data_cache())}
    command = [sys.executable, "-m", "svend", "ladder", "--ladder", "miniature",
               *(word for key, value in settings.items() for word in (f"--{key}", value))]
    whole = workplace.run([*command, "--name", "whole"])
    assert whole.returncode == 0, whole.stdout
    place = workplace.checkpoints / "ladders" / "cut"
    kills = 0
    while kills < 3:
        process = workplace.start([*command, "--name", "cut"])
        # At a checkpoint of the second rung, at its first horizon, and soon after a start.
        waits_for = (place / "small-1" / "svend" / "step_00000060", place / "small-1" / "svend"
                     / "step_00000090", place / "medium-1" / "svend")[kills]
        while not waits_for.exists():
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    resumed = workplace.run([*command, "--name", "cut"])
    assert resumed.returncode == 0, resumed.stdout
    one, other = (Standing.open(workplace.checkpoints / "ladders" / name).attempts
                  for name in ("whole", "cut"))
    assert [a.scale.value for a in other] == ["tiny", "small", "medium"]
    for a, b in zip(one, other, strict=True):
        assert (a.horizons, a.looks, a.predicted, a.error) == (
            b.horizons, b.looks, b.predicted, b.error)
        assert a.state is b.state is State.PASSED


@pytest.mark.slow
def test_a_stress_run_comes_before_the_rung_and_warns_or_stops_where_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with store(tmp_path):
        climb(tmp_path, ladder__end="tiny", ladder__stress__steps="10")
        attempt = standing(tmp_path).newest(ModelScale.TINY)
        assert attempt is not None and attempt.stressed and attempt.state is State.PASSED
        runs = MlflowClient().search_runs(["1"], "tags.`svend.ladder.stress` = 'true'")
        assert [run.info.run_name for run in runs] == ["tiny-stress"]
        assert float(runs[0].data.params["config.training.learning_rate"]) == pytest.approx(0.04)
        assert runs[0].data.tags["mlflow.parentRunId"] == standing(tmp_path).run_id

        too_high = {"ladder__end": "tiny", "ladder__stress__steps": "10",
                    "ladder__stress__rate_factor": "1e5"}
        ladder = micro_ladder(tmp_path, **too_high)
        LadderClimb(ladder, "warns", tmp_path / "warns").go()
        assert "stress run failed" in capsys.readouterr().out
        ladder = micro_ladder(tmp_path, ladder__stress__action="fail", **too_high)
        with pytest.raises(UserError, match="rung tiny: stress run failed"):
            LadderClimb(ladder, "stops", tmp_path / "stops").go()


@given(error=st.floats(-1, 1))
def test_a_loss_is_judged_by_where_it_lies(error: float) -> None:
    judged = WIDE.judge(error)
    expected = (Trend.STOP if error > 0.02 else Trend.HOLD if error > 0.01
                else Trend.INVESTIGATE if error < -0.015 else Trend.PASS)
    assert judged is expected
    measured = {PREDICTION_ERROR: error,
                BELOW_PLAUSIBLE: max(0.0, WIDE.investigate_below - error)}
    opened = [GateResult(gate, Measurement(measured[gate.metric_name])).passed
              for gate in prediction_gates(WIDE.hold_above)]
    assert all(opened) is (judged is Trend.PASS)


@given(experiment=st.text(max_size=20))
def test_every_experiment_gives_its_ladder_a_folder(experiment: str) -> None:
    folder = ladder_folder("checkpoints", folder_name(experiment))
    assert folder.parent == Path("checkpoints/ladders")


def test_a_loss_that_is_no_number_stops() -> None:
    assert WIDE.judge(math.nan) is Trend.STOP
    assert judge_early([math.nan, math.nan], 0.015, -0.015, 2) is Trend.STOP


@given(errors=st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=5))
def test_a_rung_ends_early_only_where_the_last_looks_agree(errors: list[float]) -> None:
    judged = judge_early(errors, 0.015, -0.03, 2)
    last = errors[-2:]
    too_high = len(last) == 2 and min(last) > 0.015
    too_low = len(last) == 2 and max(last) < -0.03
    assert judged is (Trend.STOP if too_high else Trend.INVESTIGATE if too_low else Trend.PASS)


def test_after_enough_rungs_the_bounds_are_what_leaving_one_out_shows() -> None:
    points = [Point(n, share * 20 * n, 2 + (1e6 / n) ** 0.3 * off + (share * 20) ** -0.3, f"{n}")
              for n, off in ((1e6, 1.0), (2e6, 1.1), (4e6, 0.95), (8e6, 1.1))
              for share in (0.2, 0.3, 0.5, 1.0)]
    sure = Prediction(3.0, 2.99, 3.01, ScalingLaw(1.0, 1.0, 0.3, 1.0, 0.3, 0.0))
    few = Bounds.of(TREND, points[:12], sure)
    assert few == Bounds(TREND.hold_above, TREND.stop_above, TREND.investigate_below)
    assert Bounds.of(TREND, points[:12], replace(sure, low=2.7)).investigate_below == (
        pytest.approx(-0.1))
    assert Bounds.of(TREND, points, sure).hold_above > TREND.hold_above
    assert backtest_bound(TREND, points) == Bounds.of(TREND, points, sure).hold_above
    assert backtest_bound(TREND, points[:12]) == 0.0


@pytest.mark.parametrize(("losses", "falls"), [
    ([4 - 0.01 * n for n in range(100)], True),
    ([4.0 + 0.2 * (-1) ** n for n in range(100)], False),
    ([3 + 0.01 * n for n in range(100)], False),
])
def test_a_loss_falls_where_the_bound_of_its_slope_is_below_zero(
    losses: list[float], falls: bool
) -> None:
    trend = LossTrend(0, 100)
    for step, loss in enumerate(losses, start=1):
        trend.add(step, loss)
    assert (trend.slope_bound() < 0) is falls


def test_a_trend_leaves_out_warm_up_decay_and_what_is_no_number_and_is_resumed() -> None:
    whole, first, second = LossTrend(10, 90), LossTrend(10, 90), LossTrend(10, 90)
    for step in range(1, 101):
        loss = 1e9 if step <= 10 or step > 90 else math.nan if step % 7 == 0 else 5 - step / 50
        whole.add(step, loss)
        (first if step <= 50 else second).add(step, loss)
        if step == 50:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert whole.slope_bound() == second.slope_bound() < 0
    assert math.isnan(LossTrend(0, 3).slope_bound())


def test_a_standing_is_read_as_it_was_written(tmp_path: Path) -> None:
    told = Standing("a", tmp_path, "run", "e", [Attempt(
        ModelScale.SMALL, 2, 7, "m", 1e6, State.FAILED, "r", "f", 60, 100, "d", "t",
        [Horizon(20, 2000, 3.5), Horizon(100, 10000, 3.0)],
        FrozenPrediction(3.1, 3.0, 3.2, "law", ["tiny"], 8, 0.01, 0.02, -0.015), "",
        [Look(20, 3.05, -0.01)], -0.4, -0.03, Trend.INVESTIGATE, "too good", "m/1", True, 5.0,
        Override("me", "now", "because"),
    )])
    told.save()
    assert Standing.open(tmp_path) == told
    assert told.attempts[0].loss == 3.0 and told.attempts[0].loss_at(0.2) == 3.5
    assert standing_table(told).row_count == 1
    for text in ("{", "[]", json.dumps({"name": "a", "run_id": "", "attempts": [{"scale": "x"}]})):
        (tmp_path / LADDER_FILE).write_text(text)
        with pytest.raises(UserError, match=r"ladder.json: damaged"):
            Standing.open(tmp_path)


def test_rungs_have_the_steps_that_their_tokens_take_and_the_same_data() -> None:
    ladder = load_ladder("default", {}, [("ladder.tokens_per_parameter", "5")])
    assert [scale.value for scale in ladder.rungs] == ["tiny", "small", "medium", "large"]
    for config in ladder.rungs.values():
        training, model = config.training, config.model
        assert model is not None and training.max_steps is not None
        per_step = training.batch_size * training.gradient_accumulation_steps * 2048
        tokens = training.max_steps * per_step
        assert 0 <= tokens - 5 * model.num_matrix_parameters() < per_step
        assert (training.data.max_seq_length, training.data.num_samples) == (2048, 50_000)
    tiny, large = ladder.rungs[ModelScale.TINY], ladder.rungs[ModelScale.LARGE]
    assert find_differences(tiny, large) == []


@pytest.mark.parametrize(("options", "line"), [
    (["--start", "large", "--end", "tiny"],
     "ladder.start = large: is above ladder.end = tiny; the order is tiny, small"),
    (["--start", "huge"], "ladder.start = huge"),
    (["--scale", "tiny"], "scale = tiny: a ladder has several; give --start and --end"),
    (["--ladder", "none"], "unknown ladder 'none': choose one of default, miniature"),
    (["--ladder.rungs.small.data.max_seq_length", "128"],
     "rung small: training.data.max_seq_length is 128, 2048 at tiny: not comparable"),
    (["--ladder.rungs.small.data.tokenizer", "other.json"],
     "rung small: training.data.tokenizer is other.json, train at tiny: not comparable"),
    (["--ladder.rungs", "{smal: {}}"], "must be a mapping of tiny, small"),
    (["--ladder.settings", "3"], "ladder.settings = 3: must be a mapping of keys"),
    (["--ladder.groups", "{scale: tiny}"], "ladder.groups = {'scale': 'tiny'}: must be"),
    (["--ladder.trend.hold", "3"], "unknown key ladder.trend.hold: did you mean"),
    (["--ladder.trend.hold_above", "0"], "ladder.trend.hold_above = 0.0: must be above 0"),
    (["--ladder.trend.hold_above", "0.5"], "must be at most ladder.trend.stop_above (0.02)"),
    (["--ladder.trend.investigate_below", "0.1"], "investigate_below = 0.1: must be below 0"),
    (["--ladder.trend.on_hold", "wait"], "ladder.trend.on_hold"),
    (["--ladder.tokens_per_parameter", "0"], "tokens_per_parameter = 0.0: must be null, or above"),
    (["--ladder.stress.steps", "-1"], "ladder.stress.steps = -1: must be at least 0"),
    (["--training.horizons", "[0.5, 0.2]"], "training.horizons = [0.5, 0.2]: must be shares"),
    (["--training.horizons", "[0.01]"], "training.horizons = [0.01]: must be shares"),
    (["--training.schedule", "cosine"], "must be empty unless training.schedule is wsd"),
    (["--training.bogus", "1"], "unknown key training.bogus"),
    (["--dry-run", "maybe"], "dry_run = maybe: must be true or false"),
    (["--retry", "maybe"], "retry = maybe: must be true or false"),
    (["--override", " "], "override: give the reason"),
    (["--name", "../x"], "name = ../x: must be one that a folder can have"),
    (["status"], "there is no ladder"),
])
def test_a_ladder_that_cannot_be_is_refused_in_one_line(
    options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options[:1] if options == ["status"] else []
    rest = [] if words else options
    command = ["ladder", *words, *rest, "--checkpoint_dir", str(tmp_path / "checkpoints")]
    assert line in refusal_of(command, tmp_path, capsys)


def test_a_groups_default_is_the_ladders_and_the_command_lines_wins() -> None:
    own = load_ladder("miniature", {}, []).rungs[ModelScale.TINY]
    assert own.training.data.recipe == "library" and not own.gates.full[0].required
    chosen = load_ladder("miniature", {"data": "embedded", "gates": "guide"}, [])
    assert chosen.rungs[ModelScale.TINY].training.data.recipe == "embedded"
    assert chosen.rungs[ModelScale.TINY].gates.full[0].required
    with pytest.raises(ConfigError):
        load_ladder("miniature", {"scale": "tiny"}, [])
