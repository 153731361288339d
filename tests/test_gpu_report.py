"""The GPU report: in miniature each part passes here, and with a fault planted in it does not."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from svend.bench import gpu_report_kernels as kernels
from svend.bench import gpu_report_training as training
from svend.bench.gpu_report import (
    Figure,
    Outcome,
    Part,
    Verdict,
    full_size,
    judge,
    miniature_size,
    run_part,
)
from svend.bench.gpu_report_pages import JSON, MARKDOWN, report_page, write_report
from svend.bench.gpu_report_training import parts_of
from svend.bench.gpu_report_worker import run_parts
from svend.cli import EXIT_USER_ERROR, main
from svend.models import attention
from svend.models.transformer import Block
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.config import ModelScale, get_model_config
from svend.training.state import TrainState
from tests.faulty_parts import check_and_raise, endless_parts, faulty_parts

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
SIZE = replace(miniature_size(), compiles=False, timed_seconds=0.05, length=80, steps=4)
PARTS = {part.name: part for part in parts_of(SIZE)}
Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled takes a minute: here it is left as it is, and fused calls go without."""
    monkeypatch.setattr(Block, "compile", lambda self, dynamic: None)
    monkeypatch.setattr(attention, "_fused_score_gradients", lambda: attention._score_gradients)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_every_part_passes_in_miniature(name: str, uncompiled: None) -> None:
    outcome = run_part(PARTS[name], CPU, SIZE)
    assert (outcome.verdict, outcome.reason) == (Verdict.OK, "")
    assert outcome.figures
    assert outcome.seconds > 0


def overrated_card(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kernels, "nominal_peak", lambda device: 1e15)


def slow_clock(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(training, "measure_matmul_peak", lambda precision, device: 1.0)


def attention_across_documents(patch: pytest.MonkeyPatch) -> None:
    own = kernels.lay_out_documents
    patch.setattr(kernels, "lay_out_documents", lambda tokens, documents: own(tokens[:, 0, :, 0],
                                                                              None))


def attention_without_its_kernel(patch: pytest.MonkeyPatch) -> None:
    documents_BT = kernels.several_documents(SIZE.batch_size, SIZE.length)
    patch.setattr(kernels, "attend", lambda q, k, v, *rest: kernels.masked_attention(
        q, k, v, documents_BT))


def gradient_of_keys_off(patch: pytest.MonkeyPatch) -> None:
    own = kernels.attend

    def attend(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return own(q, 1.1 * k - 0.1 * k.detach(), v, *rest)

    patch.setattr(kernels, "attend", attend)


def miscompiled(patch: pytest.MonkeyPatch) -> None:
    def compile_(block: nn.Module, dynamic: bool) -> None:
        own = block.forward
        block.forward = lambda *inputs: 1.05 * own(*inputs)  # type: ignore[method-assign]

    patch.setattr(Block, "compile", compile_)


def loss_of_half_the_tokens(patch: pytest.MonkeyPatch) -> None:
    own = kernels.summed_linear_cross_entropy
    patch.setattr(kernels, "summed_linear_cross_entropy",
                  lambda x, w, labels, fused: own(x, w, labels, fused) / 2)


def float8_of_other_weights(patch: pytest.MonkeyPatch) -> None:
    def compute(block: nn.Module, emulated: bool) -> None:
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(1.3)

    patch.setattr(kernels, "compute_in_float8", compute)


def other_weights_on_the_device(patch: pytest.MonkeyPatch) -> None:
    own, calls = training._small_state, iter(range(9))

    def state(*arguments: Any) -> TrainState:
        made = own(*arguments)
        if next(calls) > 0:
            with torch.no_grad():
                next(made.model.parameters()).mul_(1.1)
        return made

    patch.setattr(training, "_small_state", state)


def random_state_forgotten(patch: pytest.MonkeyPatch) -> None:
    own = TrainState.load_extra_state

    def load(state: TrainState, extra: dict[str, Any]) -> None:
        own(state, {**extra, "rng_cpu": torch.get_rng_state()})

    patch.setattr(TrainState, "load_extra_state", load)


def optimizer_forgotten(patch: pytest.MonkeyPatch) -> None:
    own = CheckpointManager.load_latest
    patch.setattr(CheckpointManager, "load_latest",
                  lambda self, model, optimizer, *rest: own(self, model, None, *rest))


def moments_in_fp32(patch: pytest.MonkeyPatch) -> None:
    own = training.build_state
    patch.setattr(training, "build_state", lambda model, stream, settings, *rest: own(
        model, stream, replace(settings, moment_precision=training.MomentPrecision.FP32), *rest))


def plan_of_half(patch: pytest.MonkeyPatch) -> None:
    own = training.predict_memory_on

    def predict(*arguments: Any) -> Any:
        plan = own(*arguments)
        return replace(plan, activations=plan.activations // 20, optimizer=0, logits=0)

    patch.setattr(training, "predict_memory_on", predict)


@pytest.mark.parametrize(("name", "plant", "reason"), [
    ("device", overrated_card, "measured over nominal"),
    ("attention", attention_across_documents, "output, fp32: error"),
    ("attention", attention_without_its_kernel, "kinds of kernels at work"),
    ("attention", gradient_of_keys_off, "key's gradient, bf16: error"),
    ("compile", miscompiled, "output: error"),
    ("loss kernel", loss_of_half_the_tokens, "loss, not compiled: error"),
    ("loss parity with the CPU", other_weights_on_the_device, "largest deviation, fp32"),
    ("save and resume", random_state_forgotten, "resumed: largest deviation"),
    ("save and resume", optimizer_forgotten, "tensors that came back"),
    pytest.param("low-memory optimizers", moments_in_fp32, "bytes of its moments",
                 marks=pytest.mark.slow),
    ("float8", float8_of_other_weights, "output: error"),
    ("scale miniature", plan_of_half, "measured over planned"),
    ("scale miniature", slow_clock, "MFU, of the measured peak"),
])
def test_a_planted_fault_makes_its_part_not_pass(
    name: str, plant: Plant, reason: str, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    outcome = run_part(PARTS[name], CPU, SIZE)
    assert outcome.verdict in (Verdict.OFF, Verdict.FAILED)
    assert any(part in outcome.reason for part in reason.split("|")), outcome.reason
    assert "\n" not in outcome.reason


def test_a_scale_that_does_not_fit_by_the_plan_is_not_run() -> None:
    flagship = get_model_config(ModelScale.FLAGSHIP)
    _, settings = SIZE.scales["miniature"]
    size = replace(SIZE, scales={"flagship": (flagship, settings)})
    part = next(part for part in parts_of(size) if part.name == "scale flagship")
    outcome = run_part(part, CPU, size)
    assert outcome.verdict is Verdict.NOT_RUN
    assert "by the plan it needs" in outcome.reason


def test_a_gpu_is_asked_for_every_scale_as_a_run_of_it_is_configured() -> None:
    size = full_size()
    names = [part.name for part in parts_of(size)]
    assert len(set(names)) == len(names)
    for scale in ModelScale:
        assert f"scale {scale.value}" in names
        model, settings = size.scales[scale.value]
        assert model == get_model_config(scale)
        assert settings.data.max_seq_length == model.max_position_embeddings
    assert size.memory_tolerance == 0.1


finite = st.floats(-1e9, 1e9)
bounds = st.none() | finite


@given(values=st.lists(st.tuples(st.floats(), bounds, bounds), max_size=5))
def test_a_verdict_is_ok_exactly_where_every_figure_is_within_its_bounds(
    values: list[tuple[float, float | None, float | None]],
) -> None:
    figures = [Figure(str(i), v, "", least, most) for i, (v, least, most) in enumerate(values)]
    within = all(
        math.isfinite(v) and v >= (-math.inf if least is None else least)
        and v <= (math.inf if most is None else most) for v, least, most in values
    )
    verdict, reason = judge(figures)
    assert verdict is (Verdict.OK if within else Verdict.OFF)
    assert bool(reason) is not within


def test_a_part_that_raises_fails_in_one_line_and_keeps_its_figures() -> None:
    outcome = run_part(Part("raises", check_and_raise, 0), CPU, SIZE)
    assert outcome.verdict is Verdict.FAILED
    assert outcome.reason == "RuntimeError: CUDA error: an illegal access"
    assert [figure.value for figure in outcome.figures] == [2.0]


@pytest.mark.slow
def test_a_part_that_dies_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    begun: list[str] = []
    outcomes = {outcome.part: outcome for outcome in run_parts(
        faulty_parts, rehearsal=True, seconds=600.0, begin=begun.append
    )}
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == {
        "dies": Verdict.FAILED, "says": Verdict.OK, "has nothing": Verdict.NOT_RUN,
        "too long": Verdict.NOT_RUN,
    }
    assert outcomes["dies"].reason == "its process died (signal 9)"
    assert [figure.value for figure in outcomes["dies"].figures] == [3.0]
    assert outcomes["has nothing"].reason == "has no float8"
    assert "were left of 600; raise --minutes" in outcomes["too long"].reason
    assert "too long" not in begun
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_never_ends_is_ended_when_the_time_is_over() -> None:
    started = time.monotonic()
    never, after = run_parts(endless_parts, rehearsal=True, seconds=3.0)
    assert time.monotonic() - started < 30
    assert never.verdict is Verdict.FAILED
    assert "when the report's time was over" in never.reason
    assert after.verdict is Verdict.NOT_RUN


def outcomes_of_all_kinds() -> list[Outcome]:
    return [
        Outcome("device", Verdict.OK, "", 1.0, [Figure("device", "a | b")]),
        Outcome("scale tiny", Verdict.OFF, "measured over planned: 2, not at most 1.1", 2.0, [
            Figure("tokens per second", 1234.0),
            Figure("measured over planned", 2.0, "", 0.9, 1.1),
        ]),
        Outcome("float8", Verdict.NOT_RUN, "needs an H100", 0.0, []),
    ]


def test_the_report_has_every_part_figure_and_bound_and_leaves_nothing_else(
    tmp_path: Path,
) -> None:
    outcomes = outcomes_of_all_kinds()
    page = write_report(tmp_path, outcomes, {"begun": "today"}, rehearsal=False)
    write_report(tmp_path, outcomes, {"begun": "today"}, rehearsal=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [JSON, MARKDOWN]
    assert (tmp_path / MARKDOWN).read_text() == page
    assert page.startswith("# GPU report\n")
    assert "1 ok, 1 off, 1 not run." in page
    assert "| measured over planned | 2 **off** | at least 0.9, at most 1.1 |" in page
    assert "| tiny |  |  | 2 | 1,234 |  |  |" in page
    assert "a \\| b" in page
    tree = json.loads((tmp_path / JSON).read_text())
    assert [part["verdict"] for part in tree["parts"]] == ["ok", "off", "not run"]
    assert [figure["holds"] for figure in tree["parts"][1]["figures"]] == [True, False]


def test_a_rehearsal_says_in_its_title_that_it_is_one() -> None:
    page = report_page(outcomes_of_all_kinds(), {}, rehearsal=True)
    assert page.startswith("# Rehearsal of the GPU report, on a CPU\n")
    assert "Nothing here was run on a GPU" in page


@pytest.mark.parametrize(("arguments", "message"), [
    (["bench"], "bench: name a kind, or give --gpu-report"),
    (["bench", "--minutes", "3", "faults"], "--minutes before a kind is for --gpu-report"),
    (["bench", "--gpu-report", "faults"], "not both: leave out faults"),
    (["bench", "--gpu-report", "--minutes", "0"], "minutes = 0: must be a number above 0"),
    (["bench", "--gpu-report", "--minutes", "nan"], "minutes = nan: must be a number above 0"),
    (["bench", "--gpu-report", "--steps=3"], "bench takes no option --steps"),
    (["bench", "--gpu-report", "--rehearse", "--out", "/dev/null/x"], "out = /dev/null/x: cannot"),
])
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_without_cuda_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("svend.cuda.is_available", lambda: False)
    assert main(["bench", "--gpu-report", "--out", str(tmp_path / "out")]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "torch finds no CUDA device" in error and "--rehearse" in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_rehearsal_passes_and_leaves_its_report_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "svend", "bench", "--gpu-report", "--rehearse", "--minutes", "15"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "gpu-report" / MARKDOWN).read_text()
    assert page in done.stdout
    tree = json.loads((tmp_path / "gpu-report" / JSON).read_text())
    assert [part["part"] for part in tree["parts"]] == [p.name for p in parts_of(miniature_size())]
    assert {part["verdict"] for part in tree["parts"]} == {"ok"}
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-report"]
