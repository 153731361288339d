"""How long a complete answer takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from svend.errors import DataError
from svend.evaluation.measurement import Measurement, quantile
from svend.models.generation import Decoder, PlainTurn, Request
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import EvaluationConfig, Precision

METRIC = "latency_p99"


def measure_latency(
    model: ReasoningTransformer,
    evaluation: EvaluationConfig,
    precision: Precision,
    is_time_up: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Measurement]:
    """Return the seconds from a request to its complete answer: 99th percentile and median.

    Every answer has `latency_new_tokens` tokens after a prompt of `latency_prompt_tokens` random
    ones, `latency_batch` at a time that begin together. The first batch, which fills caches, does
    not count. progress: is called with how many answers are there, and how many there are to be.
    Nothing is returned where the time is up before any answer. Raises DataError if the model's
    context is too short.
    """
    prompt_tokens, new_tokens = evaluation.latency_prompt_tokens, evaluation.latency_new_tokens
    context = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > context:
        raise DataError(
            f"evaluation.latency_new_tokens = {new_tokens}: with a prompt of {prompt_tokens} it is "
            f"more than the model's context, {context}; lower it or latency_prompt_tokens"
        )
    decoder = Decoder(
        model, lanes=evaluation.latency_batch, max_length=prompt_tokens + new_tokens,
        precision=precision, int8=evaluation.int8,
    )
    rng = np.random.default_rng(evaluation.seed)
    seconds: list[float] = []
    batches = -(-evaluation.latency_answers // evaluation.latency_batch)
    for number in range(batches + 1):
        prompts = rng.integers(
            0, model.config.vocab_size, (evaluation.latency_batch, prompt_tokens)
        ).tolist()
        started_seconds = time.perf_counter()
        answers = decoder.generate(Request(prompt, PlainTurn(new_tokens)) for prompt in prompts)
        of_batch = [time.perf_counter() - started_seconds for _ in answers]
        if number > 0:
            seconds += of_batch
            progress(len(seconds), batches * evaluation.latency_batch)
        if is_time_up():
            break
    if not seconds:
        return {}
    return {METRIC: quantile(seconds, 0.99), "latency_p50": quantile(seconds, 0.5)}
