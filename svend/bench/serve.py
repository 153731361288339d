"""The server with many clients at once: what each waited for, and whether anything was dropped.

The clients are threads of a process of their own: they take no time from the server's interpreter,
only from the machine.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch
import uvicorn
from rich.table import Table
from tokenizers import Tokenizer

from svend.data.documents import Role, conversation
from svend.data.tokenizer import DocumentTokenizer, train_tokenizer
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import ModelScale, Precision, get_model_config
from svend.pipeline.version_evaluation import load_version
from svend.pipeline.version_files import answering_model
from svend.serving.app import make_app
from svend.serving.engine import Engine
from svend.serving.openai_chat import Limits

TOKEN = "bench"
QUESTION = "A shop sells {n} pens at {m} each. How much do they cost together?"


@dataclass(frozen=True)
class Answered:
    """One request: seconds to its first text and to its end, and how it ended."""

    first_seconds: float
    seconds: float
    tokens: int
    status: str


@dataclass(frozen=True)
class Served:
    """What a server is to answer with."""

    name: str
    model: ReasoningTransformer
    tokenizer: DocumentTokenizer
    precision: Precision


def load_served(model_uri: str | None, scale: ModelScale) -> Served:
    """Return a version, or a scale's model with random weights and a small tokenizer."""
    if model_uri is not None:
        loaded = load_version(model_uri)
        return Served(
            model_uri, answering_model(loaded.model, "bench serve"), loaded.tokenizer,
            loaded.config.training.precision,
        )
    torch.manual_seed(0)
    config = TransformerConfig.from_model_config(get_model_config(scale))
    return Served(f"{config.name}, random weights", ReasoningTransformer(config).eval(),
                  _tokenizer_of(config.vocab_size), Precision.FP32)


def _tokenizer_of(vocab_size: int) -> DocumentTokenizer:
    """Return a tokenizer of so many entries, each of which has a text."""
    said = conversation((Role.USER, QUESTION), (Role.ASSISTANT, "#### 12"))
    small = train_tokenizer([said] * 3, 512)
    whole = Tokenizer.from_str(small.to_json())
    whole.add_tokens([f" w{number}" for number in range(small.size, vocab_size)])
    return DocumentTokenizer(whole, origin="made for the benchmark")


def drive(
    served: Served, *, clients: int, requests: int, max_tokens: int, lanes: int
) -> tuple[list[Answered], float]:
    """Have clients ask at once, each so many times; return each answer, and the seconds for all."""
    with (
        Engine(served.model, served.tokenizer, served.precision, lanes=lanes,
               max_waiting=clients) as engine,
        _listening(engine) as address,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as askers,
    ):
        return askers.submit(_ask_all, address, clients, requests, max_tokens).result()


def result_table(
    served: Served, answers: Sequence[Answered], seconds: float, *, clients: int, lanes: int
) -> Table:
    """Return what the clients waited for, as a table."""
    well = [answer for answer in answers if answer.status == "200"]
    table = Table(show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(justify="right", overflow="fold")
    table.add_row("model", f"{served.name}, {served.precision.value}")
    table.add_row("clients, lanes", f"{clients}, {lanes}")
    table.add_row("requests", f"{len(answers):,}")
    table.add_row("dropped or refused", f"{len(answers) - len(well):,}")
    for name, values in (("first text", [a.first_seconds for a in well]),
                         ("whole answer", [a.seconds for a in well])):
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=100, method="inclusive")
            table.add_row(f"{name}, p50", f"{cuts[49]:.2f} s")
            table.add_row(f"{name}, p99", f"{cuts[98]:.2f} s")
    tokens = sum(answer.tokens for answer in well)
    table.add_row("tokens", f"{tokens:,}")
    table.add_row("tokens a second", f"{tokens / seconds:,.0f}")
    return table


@contextmanager
def _listening(engine: Engine) -> Iterator[str]:
    app = make_app(engine, "bench", limits=Limits(timeout_seconds=3600.0), token=TOKEN, tools=False)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        server.should_exit = True
        thread.join()


def _ask_all(
    address: str, clients: int, requests: int, max_tokens: int
) -> tuple[list[Answered], float]:
    barrier = threading.Barrier(clients)

    def ask(number: int) -> list[Answered]:
        answers = []
        with httpx.Client(timeout=None, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            barrier.wait()
            for turn in range(requests):
                question = QUESTION.format(n=number, m=turn)
                body = {"messages": [{"role": "user", "content": question}],
                        "max_tokens": max_tokens, "stream": True,
                        "stream_options": {"include_usage": True}}
                answers.append(ask_once(client, address, body))
        return answers

    started_seconds = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for of_client in pool.map(ask, range(clients)) for answer in of_client]
    return answers, time.monotonic() - started_seconds


def ask_once(client: httpx.Client, address: str, body: dict[str, Any]) -> Answered:
    """Ask for a streamed answer; one that does not come has the fault's name as its status."""
    started_seconds = time.monotonic()
    first_seconds, tokens, status = math.nan, 0, "cut off"
    try:
        with client.stream("POST", address, json=body) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    status = str(response.status_code)
                elif line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                    if math.isnan(first_seconds) and any(
                        choice["delta"].get("content") for choice in chunk.get("choices", [])
                    ):
                        first_seconds = time.monotonic() - started_seconds
            if response.status_code != 200:
                status = str(response.status_code)
    except httpx.HTTPError as error:
        status = type(error).__name__
    seconds = time.monotonic() - started_seconds
    if math.isnan(first_seconds):
        first_seconds = seconds  # an answer of no text has its first where it ends
    return Answered(first_seconds, seconds, tokens, status)
