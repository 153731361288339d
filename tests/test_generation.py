"""Decoding with a cache says what the uncached model says, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svend.device import multiplies_in_bf16
from svend.errors import ConfigError, DataError
from svend.models.config import TransformerConfig
from svend.models.generation import Completion, Decoder, PlainTurn, Request, Sampling
from svend.models.kv_cache import BLOCK
from svend.models.quantization import measure_quantization_loss
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


@pytest.mark.parametrize("lanes", [1, 3])
def test_rows_that_cross_blocks_of_the_cache_stay_right(lanes: int) -> None:
    lengths = [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 3]
    prompts = [[(number * 31 + place) % VOCABULARY for place in range(length)]
               for number, length in enumerate(lengths)]
    decoder = make_decoder(lanes=lanes, max_length=3 * BLOCK)
    completions = decode(decoder, [Request(prompt, PlainTurn(6)) for prompt in prompts])
    assert [c.tokens for c in completions] == [uncached(MODEL, p, 6) for p in prompts]


def test_only_inserted_tokens_are_read_anew() -> None:
    inserted = [number % VOCABULARY for number in range(BLOCK + 12)]
    decoder = make_decoder(lanes=1, max_length=3 * BLOCK)
    (completion,) = decode(decoder, [Request([1] * 40, Inserting({2: inserted}, 4))])
    first = uncached(MODEL, [1] * 40, 2)
    rest = uncached(MODEL, [*[1] * 40, *first, *inserted], 2)
    assert completion.tokens == [*first, *inserted, *rest]
    # The prompt, then the inserted ones after the token that they follow.
    assert decoder.prefilled_tokens == 40 + 1 + len(inserted)
    assert decoder.steps == 2


def test_prompts_are_checked_before_anything_runs() -> None:
    decoder = make_decoder()
    asked = [Request([1, 2], PlainTurn(3)), Request([1] * 65, PlainTurn(3))]
    with pytest.raises(DataError, match=r"^request 1: a prompt of 65 tokens leaves no room"):
        decoder.generate(asked)
    assert decoder.prefilled_tokens == 0


def test_what_has_lost_its_cache_does_not_go_on() -> None:
    decoder = make_decoder(lanes=1)
    first = decoder.generate([Request([1], PlainTurn(2)), Request([2], PlainTurn(2))])
    next(first)
    assert len(list(decoder.generate([Request([3], PlainTurn(2))]))) == 1
    with pytest.raises(RuntimeError, match="used for something else"):
        list(first)


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


def test_what_is_drawn_does_not_depend_on_the_other_rows() -> None:
    # Of a real vocabulary, which is where torch sums a single row in another order than several.
    logits_RV = torch.randn(9, 32768, generator=torch.Generator().manual_seed(0)) * 3
    numbers = [uniform(1, row) for row in range(9)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for sampling in (Sampling(1.0), Sampling(0.8, top_k=50), Sampling(1.0, top_p=0.9)):
            alone = [choose_tokens(logits_RV[row : row + 1], sampling, [numbers[row]])[0]
                     for row in range(9)]
            assert alone == choose_tokens(logits_RV, sampling, numbers)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("changes", [
    {}, {"precision": Precision.BF16}, {"int8": True}, {"invariant": True},
])
def test_a_decoder_keeps_the_weights_that_it_was_made_with(changes: dict[str, object]) -> None:
    model = make_model()
    decoder = make_decoder(model, **changes)
    before_TV = decoder.score([1, 2, 3])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2)
    assert torch.equal(decoder.score([1, 2, 3]), before_TV)


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


@pytest.mark.parametrize("vocabulary", [97, 1000, 4096])
@pytest.mark.parametrize("sampling", [
    Sampling(1.0), Sampling(0.5, top_k=30), Sampling(1.5, top_p=0.9), Sampling(1.0, 200, 0.5),
])
def test_a_token_is_drawn_as_from_the_sorted_distribution(
    vocabulary: int, sampling: Sampling
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits_RV = 2 * torch.randn(40, vocabulary, generator=generator)
    uniforms = [uniform(5, row) for row in range(40)]
    drawn = choose_tokens(logits_RV, sampling, uniforms)
    # Each alone gives the same: no row looks at another.
    assert drawn == [
        choose_tokens(logits_RV[row : row + 1], sampling, [uniforms[row]])[0] for row in range(40)
    ]
    for token, number, logits_V in zip(drawn, uniforms, logits_RV.double(), strict=True):
        ordered_V, order_V = (logits_V / sampling.temperature).sort(descending=True)
        if sampling.temperature == 1.0 and sampling.top_k is None:
            order_V = torch.arange(vocabulary)  # without a cut there is nothing to sort
            ordered_V = logits_V
        kept = vocabulary if sampling.top_k is None else min(sampling.top_k, vocabulary)
        mass_V = ordered_V[:kept].softmax(0).cumsum(0)
        nucleus = int((mass_V < sampling.top_p - 1e-12).sum()) + 1
        mass_V = mass_V[:nucleus]
        place = int((mass_V <= number * mass_V[-1]).sum())
        near = order_V[max(0, place - 1) : place + 2].tolist()
        assert token == order_V[place] or (
            # Of rounding, where the number lies on the border of two tokens.
            token in near and (mass_V / mass_V[-1] - number).abs().min() < 1e-6
        )


@pytest.mark.parametrize(("changes", "message"), [
    ({"temperature": -1.0}, "temperature = -1.0: must be 0 or more"),
    ({"top_k": 0}, "top_k = 0: must be at least 1"),
    ({"top_p": 0.0}, "top_p = 0.0: must be above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p = 1.5: must be above 0 and at most 1"),
])
def test_what_is_no_way_of_drawing_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**changes)  # type: ignore[arg-type]


def test_the_loss_by_int8_is_that_of_the_same_text() -> None:
    texts = [[(number * 7 + place * place) % VOCABULARY for place in range(30 + number)]
             for number in range(4)]
    measured = measure_quantization_loss(MODEL, texts, Precision.FP32)
    total = sum(len(text) - 1 for text in texts)
    with torch.no_grad():
        summed = sum(
            float(torch.nn.functional.cross_entropy(
                MODEL(torch.tensor([text]))[0, :-1], torch.tensor(text[1:]), reduction="sum"
            )) for text in texts
        )
    assert measured.tokens == total
    assert measured.loss == pytest.approx(summed / total, rel=1e-4)
    assert measured.difference == pytest.approx(0, abs=4 * measured.standard_error + 0.02)
    assert 0 < measured.standard_error < 0.05
    assert 0.8 < measured.equal_greedy < 1
    assert measure_quantization_loss(MODEL, texts[:1], Precision.FP32).standard_error == torch.inf


def test_int8_is_close_to_what_it_rounds() -> None:
    tokens = list(range(40))
    exact_TV, rounded_TV = (make_decoder(int8=int8).score(tokens) for int8 in (False, True))
    spread = float(exact_TV.std())
    error = float((rounded_TV - exact_TV).std())
    # Weights and inputs are rounded: with random weights, some 8% of the spread.
    assert 0 < error < 0.12 * spread


def test_bf16_rounds_the_weights_and_nothing_else() -> None:
    tokens = list(range(40))
    model = make_model()
    decoder = make_decoder(model, precision=Precision.BF16)
    exact_TV, rounded_TV = make_decoder(model).score(tokens), decoder.score(tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.bfloat16())
        expected_TV = model(torch.tensor([tokens]))[0]
    assert float((rounded_TV - exact_TV).std() / exact_TV.std()) > 1e-4
    if not multiplies_in_bf16():  # else the inputs of products are rounded too
        torch.testing.assert_close(rounded_TV, expected_TV, rtol=1e-4, atol=1e-4)


def test_requests_may_come_while_others_are_answered_each_with_its_own_sampling() -> None:
    hot = Sampling(temperature=1.0)
    requests = [Request([1, 2, 3], PlainTurn(8)), Request([4, 5], PlainTurn(3), 7, hot),
                Request([6], PlainTurn(5), 9, hot), Request([7, 8], PlainTurn(4))]
    alone = [next(make_decoder(lanes=1, invariant=True).generate([r])).tokens for r in (
        replace(request, turn=PlainTurn(n)) for request, n in zip(requests, (8, 3, 5, 4),
                                                                  strict=True))]
    waiting = [requests[0], None, None, requests[1], requests[2], None, None, None, None, None,
               None, requests[3], None]
    completions = list(make_decoder(lanes=2, invariant=True).generate(iter(waiting)))
    by_place = {completion.index: completion.tokens for completion in completions}
    assert [by_place[place] for place in (0, 3, 4, 11)] == alone
