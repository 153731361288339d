"""Packing, the mix, labels, and the order in which a run sees its data."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.data.chat import speaker_marks
from svend.data.corpus import Corpus, build_corpus
from svend.data.documents import Kind
from svend.data.packing import pack_rows
from svend.data.stream import IGNORE_LABEL, BatchStream, PackedSequences
from svend.data.token_array import TokenArray
from svend.errors import DataError
from svend.pipeline.config import DataConfig, Exhausted, LongDocuments, LossOn
from tests.prepared import data_cache

RATIOS = {"reasoning": 0.6, "tool_use": 0.25, "general": 0.15}


def embedded_data(**changes: Any) -> DataConfig:
    settings_: dict[str, Any] = {
        "sources": ["gym_reasoning", "gym_tool_use", "gym_general"], "mix_ratios": RATIOS,
        "num_samples": 400, "max_seq_length": 128, "heldout_fraction": 0.2,
    }
    return DataConfig(**(settings_ | changes))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus(embedded_data(cache_dir=str(data_cache())), 1024, 0, lambda _: None)


def drawn_part(tokens_of_kind: dict[str, int], seed: int = 0) -> TokenArray:
    """Documents of random lengths; each token tells its kind."""
    generator = np.random.default_rng(seed)
    documents, kinds = [], []
    for number, (name, tokens) in enumerate(tokens_of_kind.items()):
        lengths = generator.integers(3, 90, tokens // 46)
        documents += [np.full(length, number, dtype=np.uint16) for length in lengths]
        kinds += [Kind(name)] * len(lengths)
    return TokenArray.of("train", documents, kinds)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=0, max_size=40),
    row_length=st.integers(1, 24),
    gap=st.integers(0, 3),
    split_long=st.booleans(),
)
def test_packing_keeps_every_token_once_in_rows_that_fit(
    lengths: list[int], row_length: int, gap: int, split_long: bool
) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(sizes + gap) - sizes
    rows = pack_rows(starts, sizes, row_length, split_long=split_long)

    for first, last in zip(rows.row_offsets[:-1], rows.row_offsets[1:], strict=True):
        assert last > first
        assert rows.lengths[first:last].sum() <= row_length
    assert rows.row_offsets[-1] == len(rows.starts)

    pieces: dict[int, int] = dict(zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True))
    assert len(pieces) == len(rows.starts)
    expected = {}
    for start, size in zip(starts.tolist(), lengths, strict=True):
        if size > row_length and not split_long:
            continue
        for cut in range(start, start + size, row_length):
            expected[cut] = min(row_length, start + size - cut)
    assert pieces == expected
    assert rows.tokens == sum(expected.values())


def test_padding_is_under_two_percent_at_lengths_like_gsm8ks() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(5.2, 0.4, 7473).astype(np.int64) + 10
    starts = np.cumsum(lengths) - lengths
    rows = pack_rows(starts, lengths, 2048, split_long=True)
    assert 1 - rows.tokens / (len(rows) * 2048) < 0.02


def test_real_lengths_leave_less_than_two_percent_padding(corpus: Corpus) -> None:
    sequences = PackedSequences(corpus.train, embedded_data(max_seq_length=2048), 0)
    batch = sequences.batch(0, len(sequences))
    measured = float((batch.documents_BT < 0).float().mean())
    assert sequences.padding == pytest.approx(measured, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(
    ratios=st.sampled_from([
        RATIOS, {"reasoning": 0.2, "tool_use": 0.2, "general": 0.6},
        {"reasoning": 0.98, "tool_use": 0.01, "general": 0.01},
        {"reasoning": 1 / 3, "tool_use": 1 / 3, "general": 1 / 3},
    ]),
    first=st.integers(0, 30_000),
    exhausted=st.sampled_from(Exhausted),
)
def test_any_thousand_sequences_hold_the_mix_within_a_hundredth(
    ratios: dict[str, float], first: int, exhausted: Exhausted
) -> None:
    part = drawn_part({"reasoning": 30_000, "tool_use": 9_000, "general": 20_000})
    data = embedded_data(mix_ratios=ratios, max_seq_length=96, exhausted=exhausted)
    batch = PackedSequences(part, data, 0).batch(first, 1000)
    tokens = batch.tokens_BT[batch.documents_BT >= 0]
    for number, name in enumerate(RATIOS):
        share = float((tokens == number).float().mean())
        assert share == pytest.approx(ratios[name], abs=0.01)


def test_an_epoch_ends_with_the_scarcest_kind_or_when_all_have_been_seen() -> None:
    part = drawn_part({"reasoning": 60_000, "tool_use": 4_000, "general": 30_000})
    held = {kind.value: int(part.lengths[part.kinds == number].sum())
            for number, kind in enumerate(Kind)}
    lengths = {}
    for exhausted in Exhausted:
        data = embedded_data(max_seq_length=96, exhausted=exhausted)
        sequences = PackedSequences(part, data, 0)
        lengths[exhausted] = len(sequences)
        # By their number: all documents of `drawn_part` are of source 0, so count by kind.
        tokens = sequences.tokens_by_kind(len(sequences))
        epochs = {kind: tokens[kind] / held[kind] for kind in held}
        turned = min(epochs.values()) if exhausted is Exhausted.REPEAT else max(epochs.values())
        assert turned == pytest.approx(1, abs=0.05)
    assert lengths[Exhausted.REPEAT] > 3 * lengths[Exhausted.STOP]


def test_epochs_are_told_by_source(corpus: Corpus) -> None:
    sequences = PackedSequences(corpus.train, embedded_data(), 0)
    assert sequences.epochs_by_source(0) == {0: 0.0, 1: 0.0, 2: 0.0}
    seen = sequences.epochs_by_source(len(sequences))
    assert max(seen.values()) == pytest.approx(1, abs=0.05)
    tokens = sequences.tokens_by_kind(len(sequences))
    for number, count in enumerate(corpus.counts):
        assert seen[number] == pytest.approx(tokens[count.kind] / count.train_tokens, rel=0.02)


def test_a_kind_without_documents_is_refused(corpus: Corpus) -> None:
    part = drawn_part({"reasoning": 500})
    with pytest.raises(DataError, match="'tool_use' in the train part"):
        PackedSequences(part, embedded_data(), 0)


def row_keys(sequences: PackedSequences, first: int, count: int) -> list[bytes]:
    batch = sequences.batch(first, count)
    return [row.numpy().tobytes() for row in batch.tokens_BT]


def test_a_kind_is_gone_through_whole_each_time_in_an_order_of_its_own(corpus: Corpus) -> None:
    data = embedded_data(sources=["gym_reasoning"], mix_ratios={"reasoning": 1.0})
    sequences = PackedSequences(corpus.train, data, 0)
    rows = len(sequences)
    epochs = [row_keys(sequences, epoch * rows, rows) for epoch in range(3)]
    assert len(set(epochs[0])) == rows
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert row_keys(PackedSequences(corpus.train, data, 0), rows, rows) == epochs[1]
    assert row_keys(PackedSequences(corpus.train, data, 1), 0, rows) != epochs[0]


def test_a_batch_holds_whole_documents_and_numbers_them(corpus: Corpus) -> None:
    sequences = PackedSequences(corpus.train, embedded_data(max_seq_length=512), 0)
    end = corpus.tokenizer.control_ids["<|endoftext|>"]
    part = corpus.train
    assert int(part.lengths.max()) <= 512
    train = Counter(
        part.tokens.read(start, length).tobytes()
        for start, length in zip(part.starts, part.lengths, strict=True)
    )
    seen: Counter[bytes] = Counter()
    batch = sequences.batch(0, len(sequences))
    for tokens_T, documents_T in zip(batch.tokens_BT, batch.documents_BT, strict=True):
        numbers = [n for n in documents_T.unique().tolist() if n >= 0]
        assert numbers == list(range(len(numbers)))
        for number in numbers:
            ids = tokens_T[documents_T == number].tolist()
            assert ids[-1] == end and end not in ids[:-1]
            seen[np.array(ids, dtype=np.uint16).tobytes()] += 1
    assert seen <= train


def test_the_label_is_the_next_token_of_the_same_document(corpus: Corpus) -> None:
    batch = PackedSequences(corpus.train, embedded_data(), 0).batch(0, 30)
    rows = zip(batch.tokens_BT, batch.labels_BT, batch.documents_BT, strict=True)
    for tokens_T, labels_T, documents_T in rows:
        for place in range(128):
            same = place < 127 and documents_T[place] == documents_T[place + 1] >= 0
            assert labels_T[place] == (tokens_T[place + 1] if same else IGNORE_LABEL)
    assert batch.predicted_tokens == int((batch.labels_BT != IGNORE_LABEL).sum())


@pytest.mark.parametrize("length", [16, 128, 512])
def test_loss_on_answers_learns_what_the_model_says_and_nothing_else(
    corpus: Corpus, length: int
) -> None:
    """At 16 tokens most documents are cut, and pieces begin in the middle of a message."""
    ids = corpus.tokenizer.control_ids
    speakers = {ids[f"<|{role}|>"]: role in ("assistant", "tool_call")
                for role in ("system", "tools", "user", "assistant", "tool_call", "tool")}
    learnt, every = Counter[int](), Counter[int]()
    for loss_on, counted in ((LossOn.ANSWERS, learnt), (LossOn.ALL, every)):
        data = embedded_data(
            max_seq_length=length, loss_on=loss_on, sources=["gym_tool_use"],
            mix_ratios={"tool_use": 1.0},
        )
        sequences = PackedSequences(corpus.train, data, 0)
        batch = sequences.batch(0, len(sequences))
        counted.update(batch.labels_BT[batch.labels_BT >= 0].tolist())
    expected: Counter[int] = Counter()
    part = corpus.train
    for document in np.flatnonzero(part.kinds == 1):
        tokens = part.tokens.read(part.starts[document], part.lengths[document]).tolist()
        speaking = False
        for place, token in enumerate(tokens):
            speaking = speakers.get(token, speaking)
            if speaking and place % length:  # a piece's first token is predicted by nothing
                expected[token] += 1
    assert learnt == expected
    assert sum(learnt.values()) < 0.6 * sum(every.values())


def test_running_text_is_learnt_whole() -> None:
    part = TokenArray.of(
        "train", [np.array([20, 21, 22, 0], dtype=np.uint16)] * 4, [Kind.GENERAL] * 4
    )
    control = {f"<|{name}|>": i for i, name in enumerate(
        ("endoftext", "end", "system", "tools", "user", "assistant", "tool_call", "tool"))}
    part = replace(part, marks=speaker_marks(control))
    data = embedded_data(
        sources=["text"], mix_ratios={"general": 1.0}, max_seq_length=10, loss_on=LossOn.ANSWERS
    )
    batch = PackedSequences(part, data, 0).batch(0, 1)
    ignored = IGNORE_LABEL
    assert batch.labels_BT[0].tolist() == [21, 22, 0, ignored, 21, 22, 0, ignored, ignored, ignored]


@settings(max_examples=25, deadline=None)
@given(read=st.integers(0, 60), batch_size=st.integers(1, 9))
def test_a_resumed_stream_goes_on_as_the_uninterrupted_one(
    corpus: Corpus, read: int, batch_size: int
) -> None:
    data = embedded_data(max_seq_length=512)
    stream = BatchStream(PackedSequences(corpus.train, data, 0), batch_size)
    for _ in range(read):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = BatchStream(PackedSequences(corpus.train, data, 0), batch_size)
    next(resumed)
    resumed.load_state_dict(state)
    assert resumed.epoch == stream.epoch
    for _ in range(2):
        expected, measured = next(stream), next(resumed)
        assert torch.equal(measured.tokens_BT, expected.tokens_BT)
        assert torch.equal(measured.documents_BT, expected.documents_BT)


@settings(max_examples=30, deadline=None)
@given(
    batch_size=st.integers(1, 5), accumulation=st.integers(1, 4), ranks=st.integers(1, 9),
    later=st.integers(1, 9),
)
def test_the_sequences_of_a_step_are_the_same_on_any_number_of_ranks(
    corpus: Corpus, batch_size: int, accumulation: int, ranks: int, later: int
) -> None:
    sequences = PackedSequences(corpus.train, embedded_data(), 0)
    per_step = batch_size * accumulation

    def streams_of(count: int) -> list[BatchStream]:
        return [BatchStream(sequences, batch_size, accumulation, rank, count)
                for rank in range(count)]

    def step(streams: list[BatchStream]) -> list[bytes]:
        assert len({stream.passes for stream in streams}) == 1
        batches = [next(stream) for stream in streams for _ in range(stream.passes)]
        assert max(len(batch.tokens_BT) for batch in batches) <= batch_size
        rows = [row for batch in batches if batch.predicted_tokens for row in batch.tokens_BT]
        return [row.numpy().tobytes() for row in rows]

    streams = streams_of(ranks)
    for number in range(2):
        assert step(streams) == row_keys(sequences, per_step * number, per_step)
    states = [stream.state_dict() for stream in streams]
    assert all(state == states[0] for state in states)
    resumed = streams_of(later)
    for stream in resumed:
        stream.load_state_dict(states[0])
    assert step(resumed) == row_keys(sequences, 2 * per_step, per_step)


def test_documents_that_all_exceed_the_row_are_refused_where_they_are_dropped(
    corpus: Corpus,
) -> None:
    data = embedded_data(max_seq_length=8, long_documents=LongDocuments.DROP)
    with pytest.raises(DataError, match="max_seq_length"):
        PackedSequences(corpus.train, data, 0)
