"""`svend bench generate` times what it says it times."""

from __future__ import annotations

from pathlib import Path

import torch

from svend.bench.generate import (
    OURS,
    OURS_INT8,
    compare,
    comparison_table,
    describe_quantization,
    make_workloads,
    plot_comparisons,
)
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer


def _model() -> ReasoningTransformer:
    torch.manual_seed(0)
    return ReasoningTransformer(TransformerConfig(
        name="m", hidden_size=64, num_hidden_layers=1, vocab_size=100,
        max_position_embeddings=512,
    )).eval()


def test_workloads_are_one_prompt_eight_and_ragged_ones_over_32_lanes() -> None:
    one, eight, ragged = make_workloads(100, 40)
    assert [len(w.prompts) for w in (one, eight, ragged)] == [1, 8, 40]
    assert [w.lanes for w in (one, eight, ragged)] == [1, 8, 32]
    assert len({len(prompt) for prompt in ragged.prompts}) > 10
    assert min(ragged.answer_tokens) < max(ragged.answer_tokens) / 4
    assert ragged.useful_tokens == sum(ragged.answer_tokens)


def test_contestants_are_timed_in_every_round_and_int8_where_it_is_meant_for(
    tmp_path: Path,
) -> None:
    one, eight, _ = make_workloads(100, 4)
    single, batch = compare(_model(), [one, eight], ["hf fp32"], 2, lambda _: None)
    assert [t.contestant for t in single.timings] == [OURS, OURS_INT8, "hf fp32"]
    assert [t.contestant for t in batch.timings] == [OURS, "hf fp32"]
    for timing in (*single.timings, *batch.timings):
        assert len(timing.tokens_per_second) == 2
        assert timing.median > 0
    assert single.ratio(single.timings[0], single.timings[0]) == 1
    assert comparison_table(single).row_count == 3
    plot_comparisons([single, batch], tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in (OURS, OURS_INT8, "hf fp32", "batch 8"))


def test_the_loss_of_accuracy_is_measured_on_texts_and_said_to_be_missing_without() -> None:
    model = _model()
    assert "not measured" in describe_quantization(model, [])
    said = describe_quantization(model, [list(range(2, 60)), list(range(30, 99))])
    assert said.startswith("int8: held-out loss ")
    assert "of 125 places" in said
