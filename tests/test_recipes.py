"""`svend bench recipes`: what it finds in given losses, what it measures, and that it goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svend.bench import recipes
from svend.bench.recipes import (
    BASELINE,
    Result,
    Setting,
    differences,
    known_results,
    noise,
    plot_recipes,
    recipe_table,
)
from svend.bench.recipes_command import NAMES
from svend.bench.results import write_results
from svend.cli import main
from svend.data.corpus import build_corpus
from svend.errors import UserError
from svend.pipeline.config import ModelConfig, ModelScale, get_model_config

SETTING = Setting("tiny", 512, 8, 32768, 100, 4, 128, 1e-3, "f1ngerprint")


def result(recipe: str, seed: int, loss: float | None) -> Result:
    return Result(recipe, seed, loss, 4.0, 4.0, 8.0, 1.0)


RESULTS = [
    result(BASELINE, 0, 3.0), result(BASELINE, 1, 3.1),
    result("bf16-bf16", 0, 3.02), result("bf16-bf16", 1, 3.08),
    result("bf16-int4", 0, 3.3), result("bf16-int4", 1, None),
]


def small_model() -> ModelConfig:
    return replace(
        get_model_config(ModelScale.TINY), name="small", hidden_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=128, vocab_size=512,
    )


def test_the_recipes_are_all_precisions_of_weights_and_moments() -> None:
    assert len(NAMES) == 8
    assert set(recipes.RECIPES) == set(NAMES)
    assert NAMES[0] == BASELINE


def test_a_recipe_is_held_against_fp32_at_the_same_seed() -> None:
    apart = differences(RESULTS)
    assert apart[BASELINE] == [0.0, 0.0]
    assert apart["bf16-bf16"] == pytest.approx([0.02, -0.02])
    assert apart["bf16-int4"] == [pytest.approx(0.3), math.inf]


def test_noise_is_how_far_seeds_of_fp32_are_apart() -> None:
    assert noise(RESULTS) == pytest.approx(0.1)
    three = [*RESULTS, result(BASELINE, 2, 3.4)]
    assert noise(three) == pytest.approx((0.1 + 0.3 + 0.4) / 3)
    assert noise(RESULTS[:1]) is None


def test_the_table_and_the_picture_show_every_recipe(tmp_path: Path) -> None:
    table = recipe_table(SETTING, RESULTS)
    assert list(table.columns[0].cells) == [BASELINE, "bf16-bf16", "bf16-int4"]
    assert list(table.columns[4].cells) == ["16.00"] * 3
    assert list(table.columns[6].cells) == [
        "", "+0.0000 (-0.0200 to +0.0200)", "+inf (+0.3000 to +inf)",
    ]
    assert "differ by 0.1000" in str(table.title)
    plot_recipes(RESULTS, tmp_path / "recipes.png")
    assert (tmp_path / "recipes.png").stat().st_size > 5000


def test_results_come_back_from_their_file_and_no_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "recipes.json"
    assert known_results(file, SETTING) == {}
    write_results(file, SETTING, RESULTS)
    assert list(known_results(file, SETTING).values()) == RESULTS
    with pytest.raises(UserError, match="steps = 100, now 7"):
        known_results(file, replace(SETTING, steps=7))
    file.write_text(json.dumps({"runs": []}))
    with pytest.raises(UserError, match="not results of bench recipes"):
        known_results(file, SETTING)


def test_recipes_are_trained_and_what_is_known_is_not_trained_again(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    lines = [{"text": f"{a} and {b} make {a + b}. " * 6} for a in range(20) for b in range(20)]
    text.write_text("\n".join(json.dumps(line) for line in lines))
    model, said = small_model(), []
    data = recipes.data_config(text, 32, str(tmp_path / "cache"))
    corpus = build_corpus(data, model.vocab_size, 0, lambda _: None)
    setting = replace(SETTING, steps=8, batch_size=2, length=32, data=corpus.fingerprint)

    def experiment() -> list[Result]:
        return recipes.run_experiment(
            setting, model, data, corpus, [BASELINE, "bf16-bf16", "bf16-fp32"], 1,
            tmp_path / "recipes.json", said.append, compiled=False,
        )

    found = {one.recipe: one for one in experiment()}
    assert len(said) == 3
    # Vectors, in fp32, are few.
    sizes = {name: (r.weight_bytes, r.gradient_bytes, r.moment_bytes) for name, r in found.items()}
    assert sizes[BASELINE] == pytest.approx((4, 4, 8), rel=0.01)
    assert sizes["bf16-bf16"] == pytest.approx((2, 2, 4), rel=0.01)
    assert sizes["bf16-fp32"] == pytest.approx((2, 2, 8), rel=0.01)
    losses = {name: one.loss for name, one in found.items()}
    assert losses[BASELINE] < math.log(model.vocab_size)
    assert losses["bf16-bf16"] == pytest.approx(losses[BASELINE], abs=0.05)
    assert losses["bf16-bf16"] != losses[BASELINE]
    before = torch.get_rng_state()
    assert {one.recipe: one for one in experiment()} == found
    assert len(said) == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--recipes", "bf16-int3"], "--recipes bf16-int3: known: fp32-fp32"),
    (["--scale", "huge"], "--scale huge: known: tiny"),
    (["--seeds", "0"], "--seeds must be at least 1"),
    (["--length", "4"], "--length must be at least 8"),
    (["--learning-rate", "0"], "--learning-rate must be above 0"),
])
def test_what_cannot_be_measured_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "recipes", *arguments]) != 0
    assert message in capsys.readouterr().err
