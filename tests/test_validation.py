"""Gates decide what the guide says, on what was measured, and say why."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svend.errors import ConfigError
from svend.evaluation.measurement import proportion
from svend.models.shards import count_nonfinite
from svend.pipeline.config import GatesConfig, load_config
from svend.pipeline.validation import (
    Decision,
    Evidence,
    GateLevel,
    GateResult,
    Measurement,
    PipelineValidator,
    ValidationGate,
    ValidationResult,
)

GUIDE = {
    GateLevel.QUICK: [
        ("loss_reasonable", "loss", "<", 100.0),
        ("no_nan", "nonfinite_parameters", "==", 0.0),
    ],
    GateLevel.STANDARD: [
        ("loss_decreasing", "loss", "<", 10.0),
        ("gradient_norm", "gradient_norm", "<", 100.0),
        ("perplexity", "perplexity", "<", 1000.0),
    ],
    GateLevel.FULL: [
        ("min_accuracy", "accuracy", ">", 0.10),
        ("tool_accuracy", "tool_accuracy", ">", 0.30),
    ],
    GateLevel.PRODUCTION: [
        ("gsm8k_accuracy", "gsm8k_accuracy", ">", 0.50),
        ("tool_accuracy", "tool_accuracy", ">", 0.85),
        ("safety_accuracy", "safety_accuracy", ">", 0.95),
        ("latency_p99", "latency_p99", "<", 5.0),
    ],
}
LEVELS = st.sampled_from(GateLevel)
FINITE = st.floats(-1e6, 1e6)


def _thresholds(validator: PipelineValidator, level: GateLevel) -> dict[str, float]:
    return {r.gate.name: r.gate.threshold for r in validator.decide(level, {}).gates}


def _gate(threshold: float = 0.5, comparison: str = ">=", required: bool = True) -> ValidationGate:
    return ValidationGate(name="chemistry", metric_name="chemistry_accuracy",
                          threshold=threshold, comparison=comparison, required=required)


def _good(level: GateLevel) -> dict[str, Measurement]:
    step = {"<": -0.01, ">": 0.01, "==": 0.0}
    return {metric: Measurement(threshold + step[sign]) for _, metric, sign, threshold
            in GUIDE[level]}


@pytest.mark.parametrize("level", GateLevel)
def test_the_built_in_gates_are_those_of_the_guide(level: GateLevel) -> None:
    gates = [result.gate for result in PipelineValidator().decide(level, {}).gates]
    assert [(g.name, g.metric_name, g.comparison, g.threshold) for g in gates] == GUIDE[level]
    assert all(gate.required for gate in gates)


@pytest.mark.parametrize(("comparison", "below", "at", "above"), [
    ("<", True, False, False),
    ("<=", True, True, False),
    (">", False, False, True),
    (">=", False, True, True),
    ("==", False, True, False),
])
@settings(max_examples=30, deadline=None)
@given(threshold=FINITE, distance=st.floats(1e-3, 1e6))
def test_each_comparison_decides_below_at_and_above_its_threshold(
    comparison: str, below: bool, at: bool, above: bool, threshold: float, distance: float
) -> None:
    gate = _gate(threshold, comparison)
    values = {threshold - distance: below, threshold: at, threshold + distance: above,
              math.nextafter(threshold, -math.inf): below,
              math.nextafter(threshold, math.inf): above}
    assert {v: GateResult(gate, Measurement(v)).passed for v in values} == values


@settings(max_examples=30, deadline=None)
@given(FINITE | st.sampled_from([math.inf, -math.inf]),
       st.sampled_from(["<", "<=", ">", ">=", "=="]))
def test_nan_never_passes(threshold: float, comparison: str) -> None:
    result = GateResult(_gate(threshold, comparison), Measurement(math.nan))
    assert not result.passed
    assert "nan" in result.failure


@pytest.mark.parametrize("comparison", ["!=", "=", "=>", "", "less"])
def test_an_unknown_comparison_is_refused(comparison: str) -> None:
    with pytest.raises(ConfigError, match=r"^gate 'chemistry': comparison '.*' is not one of"):
        _gate(comparison=comparison)


@settings(max_examples=40, deadline=None)
@given(LEVELS, st.data())
def test_each_gate_that_fails_is_named_and_no_other(level: GateLevel, data: st.DataObject) -> None:
    measurements, expected = _good(level), []
    for name, metric, sign, threshold in GUIDE[level]:
        fate = data.draw(st.sampled_from(["good", "bad", "nan", "unmeasured"]))
        if fate == "unmeasured":
            del measurements[metric]
            expected.append(f"{name}: {metric} was not measured")
        elif fate in {"bad", "nan"}:
            value = math.nan if fate == "nan" else threshold + {"<": 1, ">": -1, "==": 1}[sign]
            measurements[metric] = Measurement(value)
            expected.append(f"{name}: {value:.4g}, must be {metric} {sign} {threshold:g}")
    verdict = PipelineValidator().decide(level, measurements)
    assert verdict.failures == expected
    assert verdict.passed == (not expected)
    assert verdict.warnings == []


@pytest.mark.parametrize("measurements", [{}, {"chemistry_accuracy": Measurement(0.1)}])
def test_an_advisory_gate_that_fails_only_warns(measurements: dict[str, Measurement]) -> None:
    validator = PipelineValidator(custom_gates=[_gate(required=False)])
    verdict = validator.decide(GateLevel.FULL, _good(GateLevel.FULL) | measurements)
    assert verdict.passed
    assert verdict.failures == []
    (warning,) = verdict.warnings
    assert warning.startswith("chemistry: ")
    assert ("was not measured" in warning) == (not measurements)


@pytest.mark.parametrize(("value", "passed"), [(0.5, True), (0.49, False)])
def test_custom_gates_join_full_and_no_other_level(value: float, passed: bool) -> None:
    validator = PipelineValidator(custom_gates=[_gate()])
    measurements = _good(GateLevel.FULL) | {"chemistry_accuracy": Measurement(value)}
    assert validator.decide(GateLevel.FULL, measurements).passed is passed
    for level in GateLevel:
        names = _thresholds(validator, level)
        assert ("chemistry" in names) == (level is GateLevel.FULL)


@pytest.mark.parametrize(("name", "changed"), [
    ("loss_reasonable", {(GateLevel.QUICK, "loss_reasonable")}),
    ("no_nan", {(GateLevel.QUICK, "no_nan")}),
    ("loss_decreasing", {(GateLevel.STANDARD, "loss_decreasing")}),
    ("max_loss", {(GateLevel.STANDARD, "loss_decreasing")}),
    ("max_gradient_norm", {(GateLevel.STANDARD, "gradient_norm")}),
    ("max_perplexity", {(GateLevel.STANDARD, "perplexity")}),
    ("min_accuracy", {(GateLevel.FULL, "min_accuracy")}),
    ("tool_accuracy", {(GateLevel.FULL, "tool_accuracy")}),
    ("min_tool_accuracy", {(GateLevel.FULL, "tool_accuracy")}),
])
@settings(max_examples=5, deadline=None)
@given(threshold=FINITE)
def test_a_threshold_replaces_the_one_it_names_and_never_one_of_production(
    name: str, changed: set[tuple[GateLevel, str]], threshold: float
) -> None:
    validator = PipelineValidator(thresholds={name: threshold})
    for level in GateLevel:
        expected = {gate: threshold if (level, gate) in changed else default
                    for gate, _, _, default in GUIDE[level]}
        assert _thresholds(validator, level) == expected


def test_a_threshold_also_replaces_that_of_a_custom_gate() -> None:
    validator = PipelineValidator(custom_gates=[_gate()], thresholds={"chemistry": 0.9})
    assert _thresholds(validator, GateLevel.FULL)["chemistry"] == 0.9


def test_thresholds_of_one_validator_do_not_reach_another() -> None:
    gates = GatesConfig()
    PipelineValidator(gates=gates, thresholds={"min_accuracy": 0.9}, custom_gates=[_gate()])
    fresh = _thresholds(PipelineValidator(gates=gates), GateLevel.FULL)
    assert fresh == {"min_accuracy": 0.10, "tool_accuracy": 0.30}


@pytest.mark.parametrize("name", [
    "acuracy", "accuracy", "max_accuracy", "min_loss", "gsm8k_accuracy", "min_safety_accuracy",
    "latency_p99", "max_latency_p99", "",
])
def test_a_threshold_that_names_no_gate_below_production_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        PipelineValidator(thresholds={name: 0.5})
    message = str(refusal.value)
    assert message.startswith(f"training.validation_gates.{name}: no such gate")
    assert "min_accuracy" in message
    assert len(message.splitlines()) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 14), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_planted_nonfinite_weight_fails_quick(position: int, planted: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, bias=False))
    weights = [(p, i) for p in model.parameters() for i in range(p.numel())]
    parameter, index = weights[position]
    validator = PipelineValidator()
    assert validator.validate_quick(model, loss=1.0, step=1).passed
    with torch.no_grad():
        parameter.view(-1)[index] = planted
    verdict = validator.validate_quick(model, loss=1.0, step=1)
    assert verdict.failures == ["no_nan: 1, must be nonfinite_parameters == 0"]
    assert count_nonfinite(model) == 1


@pytest.mark.parametrize(("loss", "passed"), [
    (0.5, True), (99.99, True), (100.0, False), (math.inf, False), (math.nan, False),
])
def test_quick_judges_the_loss(loss: float, passed: bool) -> None:
    verdict = PipelineValidator().validate_quick(nn.Linear(2, 2), loss=loss, step=7)
    assert verdict.passed is passed
    assert verdict.level is GateLevel.QUICK
    assert verdict.evidence == Evidence(step=7)


def test_rows_carry_the_bounds_that_decide() -> None:
    gates = GatesConfig(confidence=0.95)
    measured = proportion(60, 200)
    (row, _) = PipelineValidator(gates=gates).decide(
        GateLevel.FULL, {"accuracy": measured, "tool_accuracy": measured}
    ).rows()
    assert (row["low_bound"], row["high_bound"]) == measured.interval_at(0.9)
    assert (row["low_95"], row["high_95"]) == measured.interval


def test_rows_carry_the_measurement_the_gate_and_the_evidence() -> None:
    validator = PipelineValidator(custom_gates=[_gate(required=False)])
    evidence = Evidence(step=80, checkpoint_sha256="c0ffee", data_fingerprint="da7a", run_id="r1")
    measurements = {"accuracy": Measurement(0.25, (0.2, 0.3), 400),
                    "tool_accuracy": Measurement(0.1, data_fingerprint="07her", run_id="r0")}
    rows = validator.decide(GateLevel.FULL, measurements, evidence).rows()
    shared = {"level": "full", "step": 80, "checkpoint_sha256": "c0ffee",
              "data_fingerprint": "da7a", "run_id": "r1", "low_bound": None, "high_bound": None}
    assert rows == [
        {**shared, "gate": "min_accuracy", "metric": "accuracy", "value": 0.25, "low_95": 0.2,
         "high_95": 0.3, "sample_size": 400, "comparison": ">", "threshold": 0.10,
         "required": True, "passed": True, "decision": "pass", "confidence": None},
        {**shared, "gate": "tool_accuracy", "metric": "tool_accuracy", "value": 0.1,
         "low_95": None, "high_95": None, "sample_size": None, "comparison": ">",
         "threshold": 0.30, "required": True, "passed": False, "decision": "fail",
         "confidence": None, "data_fingerprint": "07her", "run_id": "r0"},
        {**shared, "gate": "chemistry", "metric": "chemistry_accuracy", "value": None,
         "low_95": None, "high_95": None, "sample_size": None, "comparison": ">=",
         "threshold": 0.5, "required": False, "passed": False, "decision": "fail",
         "confidence": None},
    ]


def test_summary_says_what_was_measured_and_what_was_asked() -> None:
    validator = PipelineValidator(custom_gates=[_gate(required=False)])
    measurements = {"accuracy": Measurement(0.25, (0.2, 0.3), 400)}
    verdict = validator.decide(GateLevel.FULL, measurements, Evidence(step=80))
    assert verdict.summary() == (
        "FULL gate at step 80: FAIL\n"
        "  pass  min_accuracy: 0.25 [0.2, 0.3] (accuracy > 0.1)\n"
        "  FAIL  tool_accuracy: not measured (tool_accuracy > 0.3)\n"
        "  warn  chemistry: not measured (chemistry_accuracy >= 0.5)"
    )


def test_summary_of_a_level_that_passes() -> None:
    result = ValidationResult(GateLevel.FULL, [GateResult(_gate(), Measurement(0.5))])
    assert result.summary() == (
        "FULL gate: PASS\n  pass  chemistry: 0.5 (chemistry_accuracy >= 0.5)"
    )


def test_the_history_holds_every_verdict_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    validator = PipelineValidator()
    verdicts = [validator.decide(level, _good(level), Evidence(step=i))
                for i, level in enumerate(GateLevel)]
    assert validator.history == verdicts
    validator.print_summary()
    assert capsys.readouterr().out == "".join(v.summary() + "\n" for v in verdicts)


ACCURACY_GATE = ValidationGate(
    name="min_accuracy", metric_name="accuracy", threshold=0.6, comparison=">="
)


@pytest.mark.parametrize(("right", "n", "by_value", "by_confidence"), [
    (36, 50, Decision.PASS, Decision.PASS),
    (35, 50, Decision.PASS, Decision.UNDECIDED),
    (30, 50, Decision.PASS, Decision.UNDECIDED),
    (29, 50, Decision.FAIL, Decision.UNDECIDED),
    (23, 50, Decision.FAIL, Decision.FAIL),
    (821, 1319, Decision.PASS, Decision.PASS),
    (820, 1319, Decision.PASS, Decision.UNDECIDED),
])
def test_with_confidence_a_gate_is_decided_only_by_a_whole_interval(
    right: int, n: int, by_value: Decision, by_confidence: Decision
) -> None:
    measured = proportion(right, n)
    assert GateResult(ACCURACY_GATE, measured).decision is by_value
    assert GateResult(ACCURACY_GATE, measured, 0.95).decision is by_confidence


@settings(max_examples=100, deadline=None)
@given(st.integers(5, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
       st.sampled_from(["<", ">", "<=", ">="]), st.floats(0.05, 0.95), st.floats(0.6, 0.99))
def test_a_decision_with_confidence_is_one_that_the_value_alone_gives_too(
    counts: tuple[int, int], comparison: str, threshold: float, confidence: float
) -> None:
    gate, measured = _gate(threshold, comparison), proportion(*counts)
    with_confidence = GateResult(gate, measured, confidence).decision
    assert with_confidence in (GateResult(gate, measured).decision, Decision.UNDECIDED)


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_so_many_more_samples_decide_an_undecided_gate_if_the_share_stays(
    counts: tuple[int, int]
) -> None:
    measured = proportion(*counts)
    result = GateResult(ACCURACY_GATE, measured, 0.95)
    if result.decision is not Decision.UNDECIDED or abs(measured.value - 0.6) < 1e-3:
        return

    def is_decided(samples: int) -> bool:
        low, high = measured.interval_at(0.9, samples / counts[1])
        return (low >= 0.6) == (high >= 0.6)

    assert result.samples_needed is not None
    needed = counts[1] + result.samples_needed
    assert is_decided(needed)
    assert not is_decided(needed - 1 - needed // 1000)


def test_no_number_of_samples_decides_a_value_that_is_the_threshold() -> None:
    assert GateResult(ACCURACY_GATE, proportion(30, 50), 0.95).samples_needed is None


def test_an_undecided_gate_does_not_pass_and_says_how_many_samples_it_takes() -> None:
    validator = PipelineValidator(gates=GatesConfig(confidence=0.95))
    verdict = validator.decide(GateLevel.FULL, {
        "accuracy": proportion(12, 100), "tool_accuracy": proportion(80, 100),
    })
    assert not verdict.passed
    (failure,) = verdict.failures
    assert failure.startswith("min_accuracy: undecided at 0.12 [")
    assert "must be accuracy > 0.1 with confidence 0.95: needs about" in failure
    assert [row["decision"] for row in verdict.rows()] == ["undecided", "pass"]
    assert "undecided  min_accuracy" in verdict.summary()


def test_a_value_that_is_no_sample_decides_by_itself_with_confidence_too() -> None:
    validator = PipelineValidator(gates=GatesConfig(confidence=0.95))
    verdict = validator.decide(GateLevel.QUICK, {
        "loss": Measurement(2.0), "nonfinite_parameters": Measurement(0.0),
    })
    assert verdict.passed


@pytest.mark.parametrize("confidence", [0.5, 1.0, 0.0, 95])
def test_a_confidence_that_no_interval_has_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match=r"^gates\.confidence = "):
        load_config(overrides=[("gates.confidence", str(confidence))])
