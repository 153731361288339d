"""The benchmark command: what it times is real, and what it is asked wrongly it says."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from svend.bench import scaling
from svend.bench.data import CONTESTANTS as CONTESTANTS_OF_DATA
from svend.bench.data import measure_tokenising
from svend.bench.report import comparison_table, plot_comparisons
from svend.bench.spec import Spec
from svend.bench.train import Comparison, Timing, _check_parameters, compare
from svend.bench.worker import CONTESTANTS
from svend.errors import UserError
from svend.pipeline.config import ModelConfig, ModelScale, get_model_config
from tests.refusals import refusal_of

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = Spec(
    hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=96, vocab_size=320,
    batch_size=2, length=32, device="cpu",
)


def model_of(spec: Spec) -> ModelConfig:
    base = get_model_config(ModelScale.TINY)
    return ModelConfig(**{
        **vars(base), "name": "smallest", "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads, "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
    })


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(
        "smallest", model_of(SMALLEST), SMALLEST, ["svend-eager", "hf-stock"], sys.executable,
        rounds=2, steps=2, report=lambda _: None,
    )


@pytest.mark.slow
def test_each_contestant_is_timed_in_every_round_on_a_model_of_the_same_size(
    comparison: Comparison,
) -> None:
    ours, theirs = comparison.timings
    assert [ours.contestant, theirs.contestant] == ["svend-eager", "hf-stock"]
    assert ours.parameters == theirs.parameters == model_of(SMALLEST).num_parameters()
    for timing in comparison.timings:
        assert len(timing.tokens_per_second) == 2
        assert 0 < timing.median < 1e7
        assert 0.05 < timing.peak_memory_gb < 20
        assert timing.warm_first_step_seconds > 0.1
        assert timing.cold_first_step_seconds > 0.1
        assert 0 < timing.peak_fraction < 1
    assert ours.ratio_to_ours == 1.0
    pairs = zip(ours.tokens_per_second, theirs.tokens_per_second, strict=True)
    assert theirs.ratio_to_ours == pytest.approx(sum(a / b for a, b in pairs) / 2)


@pytest.mark.slow
def test_the_table_and_the_plot_show_every_contestant(
    comparison: Comparison, tmp_path: Path
) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(comparison))
    text = console.export_text()
    for timing in comparison.timings:
        assert timing.contestant in text
        assert f"{timing.median:,.0f}" in text
    plot_comparisons([comparison], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_other_sizes_are_not_compared() -> None:
    with pytest.raises(UserError, match="differ in size"):
        _check_parameters([Timing("a", 1, 0.0, 0.0), Timing("b", 2, 0.0, 0.0)])


@pytest.mark.slow
def test_a_contestant_that_ends_is_named_with_its_last_words() -> None:
    impossible = Spec(**{**vars(SMALLEST), "heads": 3})
    with pytest.raises(UserError, match=r"bench: hf-stock ended: .+; leave it out with --peers"):
        compare("smallest", model_of(SMALLEST), impossible, ["hf-stock"], sys.executable, 1, 1,
                lambda _: None)


@pytest.mark.parametrize(("options", "message"), [
    (["--peers", "vllm"], "bench: unknown peer 'vllm'; known: svend-eager"),
    (["--scales", "huge"], "bench: unknown scale 'huge'; known: tiny"),
    (["--shapes", "8by512"], "bench: --shapes 8by512: must be such as 8x512"),
    (["--shapes", "0x512"], "bench: --shapes 0x512: must be such as 8x512"),
    (["--rounds", "0"], "--rounds must be at least 1"),
    (["--peers", "litgpt"], "bench: litgpt is not installed; see svend bench train --help"),
])
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refusal_of(["bench", "train", *options], tmp_path, capsys)


@pytest.mark.slow
def test_the_command_writes_every_figure_as_json(tmp_path: Path) -> None:
    gsm8k = ROOT.parent / "shared" / "data" / "gsm8k"
    if not gsm8k.is_dir():
        pytest.skip("no GSM8K here")
    done = subprocess.run(
        [sys.executable, "-m", "svend", "bench", "train", "--shapes", "1x256", "--peers",
         "hf-stock", "--rounds", "1", "--steps", "1", "--documents", str(gsm8k / "train.jsonl"),
         "--json", str(tmp_path / "figures.json")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )
    assert "hf-stock" in done.stdout
    (figures,) = json.loads((tmp_path / "figures.json").read_text())
    assert figures["shape"] == "documents, 1x256"
    assert [t["contestant"] for t in figures["timings"]] == ["svend", "hf-stock"]
    assert all(t["median_tokens_per_second"] > 0 for t in figures["timings"])


@pytest.mark.slow
def test_scaling_varies_one_size_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scaling, "BATCHES", (1, 2))
    monkeypatch.setattr(scaling, "LENGTHS", (64, 256))
    monkeypatch.setattr(scaling, "LAYERS", (1, 3))
    points = scaling.measure_scaling(model_of(SMALLEST), compiled=False, report=lambda _: None)
    assert [(p.varied, p.value, p.tokens) for p in points] == [
        ("batch", 1, 512), ("batch", 2, 1024), ("length", 64, 4096), ("length", 256, 4096),
        ("layers", 1, 4096), ("layers", 3, 4096),
    ]
    by_layers = points[4:]
    assert by_layers[1].seconds > by_layers[0].seconds
    assert by_layers[1].flops_per_token > by_layers[0].flops_per_token
    scaling.plot_scaling(points, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(scaling.to_json(points))) == 6


@pytest.mark.slow
def test_tokenising_is_timed_on_the_same_tokens() -> None:
    size, turns = measure_tokenising(1, 1, 1, list(CONTESTANTS_OF_DATA), lambda _: None)
    assert size >= 1_000_000
    ours, theirs = turns
    assert [turn.contestant for turn in turns] == ["svend", "datasets"]
    assert ours.tokens == pytest.approx(theirs.tokens, rel=0.1)  # theirs by a sample
    assert all(turn.seconds > 0 and turn.peak_memory_gb > 0.05 for turn in turns)


def test_every_contestant_exists() -> None:
    import importlib

    for place in CONTESTANTS.values():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))
