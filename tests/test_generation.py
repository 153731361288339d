"""Decoding with a cache says what the uncached model says, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svend.errors import DataError
from svend.models.config import TransformerConfig
from svend.models.generation import Completion, Decoder, PlainTurn, Request, Sampling
from svend.models.sampling import choose_tokens, uniform
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import Precision

VOCABULARY = 97
SHAPES = [  # heads, key/value heads, head size
    (4, 1, 16), (4, 2, 32), (2, 2, 64), (3, 3, 8), (12, 3, 8),
]


def make_model(shape: tuple[int, int, int] = SHAPES[0], context: int = 256) -> ReasoningTransformer:
    heads, kv_heads, size = shape
    torch.manual_seed(0)
    model = ReasoningTransformer(TransformerConfig(
        name="m", hidden_size=heads * size, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=VOCABULARY, max_position_embeddings=context,
        initializer_range=0.2,  # so that the likeliest tokens vary, and lie apart
    ))
    return model.eval()


MODEL = make_model()


def make_decoder(model: ReasoningTransformer = MODEL, **changes: object) -> Decoder:
    settings = {"lanes": 4, "max_length": 64, "precision": Precision.FP32, **changes}
    return Decoder(model, **settings)  # type: ignore[arg-type]


def decode(decoder: Decoder, requests: Sequence[Request]) -> list[Completion]:
    completions = sorted(decoder.generate(requests), key=lambda completion: completion.index)
    assert [c.index for c in completions] == list(range(len(requests)))
    return completions


def uncached(model: ReasoningTransformer, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt):]


class Inserting:
    """Puts tokens after some of those that are sampled."""

    def __init__(self, after: dict[int, list[int]], count: int) -> None:
        self._after, self._left, self._taken = after, count, 0

    def take(self, token: int) -> Sequence[int] | None:
        self._taken += 1
        if self._taken >= self._left:
            return None
        return self._after.get(self._taken, ())


PROMPTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.integers(1, 12)), min_size=1, max_size=9),
       st.integers(1, 5), st.sampled_from(SHAPES), st.booleans())
def test_greedy_tokens_are_those_of_the_uncached_model(
    asked: list[tuple[list[int], int]], lanes: int, shape: tuple[int, int, int], invariant: bool
) -> None:
    model = make_model(shape)
    decoder = make_decoder(model, lanes=lanes, invariant=invariant)
    completions = decode(decoder, [Request(p, PlainTurn(count)) for p, count in asked])
    assert [c.tokens for c in completions] == [uncached(model, p, n) for p, n in asked]
    assert all(completion.complete for completion in completions)


@settings(max_examples=10, deadline=None)
@given(PROMPTS, st.dictionaries(st.integers(1, 6), st.lists(st.integers(0, 96), max_size=90),
                                max_size=3), st.integers(1, 3))
def test_inserted_tokens_are_read_as_if_they_had_been_in_the_prompt(
    prompt: list[int], after: dict[int, list[int]], lanes: int
) -> None:
    decoder = make_decoder(lanes=lanes, max_length=320)
    others = [Request([5, 6], PlainTurn(20)), Request([7], PlainTurn(3))]
    (completion, *_) = decode(decoder, [Request(prompt, Inserting(after, 8)), *others])
    expected: list[int] = []
    for number in range(1, 9):
        expected += uncached(MODEL, [*prompt, *expected], 1)
        if number < 8:
            expected += after.get(number, [])
    assert completion.tokens == expected


def test_the_logits_of_a_text_are_those_of_the_uncached_model() -> None:
    tokens = list(range(50))
    with torch.no_grad():
        expected_TV = MODEL(torch.tensor([tokens]))[0]
    torch.testing.assert_close(make_decoder().score(tokens), expected_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=20, top_p=0.95)])
def test_a_row_is_the_same_to_the_bit_whatever_the_number_of_lanes(
    precision: Precision, sampling: Sampling
) -> None:
    # Of TINY's width, where products of another number of rows do round differently.
    torch.manual_seed(1)
    model = ReasoningTransformer(TransformerConfig(
        name="wide", hidden_size=512, num_hidden_layers=2, vocab_size=1024,
        max_position_embeddings=256,
    )).eval()
    requests = [
        ([number + 1] * (1 + number * 5 % 17), 3 + number * 7 % 11) for number in range(12)
    ]
    decoded = []
    for lanes in (1, 2, 5, 8, 32, 33):
        decoder = make_decoder(
            model, lanes=lanes, precision=precision, sampling=sampling, invariant=True
        )
        seen: list[Tensor] = []
        choose = decoder._choose

        def remember(logits_NV: Tensor, rows: list, seen: list = seen, choose=choose) -> list[int]:
            seen += [(row.index, len(row.tokens), logits_V.clone())
                     for row, logits_V in zip(rows, logits_NV, strict=True)]
            return choose(logits_NV, rows)

        decoder._choose = remember  # type: ignore[method-assign]
        completions = decode(decoder, [
            Request(prompt, PlainTurn(count), seed) for seed, (prompt, count) in enumerate(requests)
        ])
        logits = {(index, place): logits_V for index, place, logits_V in seen}
        decoded.append(([c.tokens for c in completions], logits))
    for tokens, logits in decoded[1:]:
        assert tokens == decoded[0][0]
        assert logits.keys() == decoded[0][1].keys()
        assert all(torch.equal(logits[key], decoded[0][1][key]) for key in logits)


def test_finished_rows_make_room_for_waiting_ones_at_once() -> None:
    counts = [2, 40, 2, 2, 2, 2, 40, 2]
    decoder = make_decoder(lanes=2)
    order = [c.index for c in decoder.generate(Request([1], PlainTurn(n)) for n in counts)]
    # Reading a prompt gives the first token. One lane is busy with 1 while the other takes the
    # short ones and then 6.
    assert order == [0, 2, 3, 4, 5, 1, 7, 6]
    assert decoder.steps == 5 * 1 + 39
    alone = make_decoder(lanes=1)
    assert len(list(alone.generate(Request([1], PlainTurn(n)) for n in counts))) == 8
    assert alone.steps == sum(counts) - len(counts)


def test_requests_are_taken_only_when_there_is_a_lane_for_them() -> None:
    taken: list[int] = []

    def requests() -> object:
        for number in range(6):
            taken.append(number)
            yield Request([number], PlainTurn(4))

    completions = make_decoder(lanes=2).generate(requests())  # type: ignore[arg-type]
    assert taken == []
    next(completions)
    assert taken == [0, 1]
    assert len(list(completions)) == 5


def test_a_row_that_fills_its_lane_ends_as_incomplete() -> None:
    decoder = make_decoder(max_length=10, lanes=1)
    long, short, inserting = decode(decoder, [
        Request([1, 2, 3], PlainTurn(99)), Request([1, 2, 3], PlainTurn(8)),
        Request([1], Inserting({2: [4] * 9}, 99)),
    ])
    assert not long.complete
    # Seven fit behind the prompt, and the last of them gives one more.
    assert long.tokens == uncached(MODEL, [1, 2, 3], 8)
    assert short.complete
    assert not inserting.complete


@pytest.mark.parametrize("prompt", [[], [1] * 64, [1] * 100])
def test_a_prompt_that_leaves_no_room_is_refused_in_one_line(prompt: list[int]) -> None:
    with pytest.raises(DataError, match=r"^request 0: .*prompt") as refusal:
        list(make_decoder().generate([Request(prompt, PlainTurn(1))]))
    assert len(str(refusal.value).splitlines()) == 1


def test_nothing_is_asked_nothing_is_said() -> None:
    assert list(make_decoder().generate([])) == []


@pytest.mark.parametrize(("stops", "expected"), [
    ({"stop_ids": [7]}, [5, 6, 7]),
    ({"stop_sequences": [[6, 7], [9]]}, [5, 6, 7]),
    ({"stop_sequences": [[7, 7]]}, [5, 6, 7, 8]),
    ({}, [5, 6, 7, 8]),
])
def test_a_plain_turn_ends_at_its_stops(stops: dict[str, list], expected: list[int]) -> None:
    turn, taken = PlainTurn(4, **stops), []
    for token in (5, 6, 7, 8):
        taken.append(token)
        if turn.take(token) is None:
            break
    assert taken == expected


def test_drawing_follows_the_distribution() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    draws = 20_000
    for sampling in (Sampling(1.0), Sampling(0.7, top_k=3), Sampling(1.3, top_p=0.8),
                     Sampling(1.0, top_k=4, top_p=0.7)):
        expected_V = (logits_V / sampling.temperature).softmax(0)
        if sampling.top_k is not None:
            expected_V[sampling.top_k:] = 0
        expected_V /= expected_V.sum()
        kept = int((expected_V.cumsum(0) - expected_V < sampling.top_p).sum())
        expected_V[kept:] = 0
        expected_V /= expected_V.sum()
        chosen = choose_tokens(
            logits_V.expand(draws, -1), sampling, [uniform(3, n) for n in range(draws)]
        )
        shares_V = torch.bincount(torch.tensor(chosen), minlength=5) / draws
        assert torch.all(shares_V[expected_V == 0] == 0)
        assert float((shares_V - expected_V).abs().max()) < 0.02


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.floats(0, 1, exclude_max=True))
def test_a_token_of_no_probability_is_never_drawn(seed: int, number: float) -> None:
    logits_NV = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed % 2**31))
    likeliest = logits_NV[0].topk(2).indices.tolist()
    for drawn in (number, 0.0, 1 - 2**-60):
        assert choose_tokens(logits_NV, Sampling(1.0, top_k=2), [drawn])[0] in likeliest
        assert choose_tokens(logits_NV, Sampling(1.0, top_p=1e-9), [drawn]) == likeliest[:1]


def test_int8_is_close_to_what_it_rounds() -> None:
    tokens = list(range(40))
    exact_TV, rounded_TV = (make_decoder(int8=int8).score(tokens) for int8 in (False, True))
    spread = float(exact_TV.std())
    error = float((rounded_TV - exact_TV).std())
    # Weights and inputs are rounded: with random weights, some 8% of the spread.
    assert 0 < error < 0.12 * spread


def test_bf16_is_as_close_as_its_rounding() -> None:
    tokens = list(range(40))
    exact_TV = make_decoder().score(tokens)
    rounded_TV = make_decoder(precision=Precision.BF16).score(tokens)
    error = float((rounded_TV - exact_TV).std() / exact_TV.std())
    assert 1e-4 < error < 0.03
