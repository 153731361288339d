"""Benchmarks within a run: what they may not share with training, and how their time is spent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from svend.data.corpus import build_corpus
from svend.data.documents import Role, conversation
from svend.data.tokenizer import train_tokenizer
from svend.errors import ConfigError, DataError
from svend.evaluation.harness import Harness, problems_digest
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.benchmarking import evaluation_sets, problem_digests, read_questions
from svend.pipeline.config import BENCHMARK_NAMES, PipelineConfig, Precision, load_config

QUESTION = (
    "A baker in Turin sells {count} rolls each morning and twice as many cakes each evening; how "
    "many does she sell in a week of seven days?"
)


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _problem(number: int, question: str | None = None) -> dict[str, str]:
    words = " ".join(f"w{number}x{place}" for place in range(14))
    return {"question": question or f"{words}?", "answer": f"{words}\n#### {number}"}


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    """A run on own problems in GSM8K's schema, with a benchmark that shares a text with them."""
    leaked = QUESTION.format(count=40)
    # The numbers and the ends differ: what both hold is a run of words in the middle.
    planted = f"Please say: {QUESTION.format(count=41).removesuffix('seven days?')}six?"
    _write(tmp_path / "train.jsonl",
           [*(_problem(number) for number in range(60)), _problem(90, planted)])
    _write(tmp_path / "gsm8k_test.jsonl",
           [*(_problem(number) for number in range(100, 130)), _problem(91, leaked)])
    return load_config({"data": "gsm8k", "preset": "quick_test"}, [
        ("data.path", str(tmp_path / "train.jsonl")),
        ("data.heldout_path", str(_write(tmp_path / "own.jsonl",
                                         [_problem(n) for n in range(200, 220)]))),
        ("data.cache_dir", str(tmp_path / "cache")),
        ("eval_benchmarks", "[gsm8k_sample]"),
        ("evaluation.paths", f"{{gsm8k: {tmp_path / 'gsm8k_test.jsonl'}}}"),
        ("evaluation.problems", "5"),
    ])


def _leaked(config: PipelineConfig) -> dict[str, int]:
    assert config.model is not None
    corpus = build_corpus(
        config.training.data, config.model.vocab_size, 0, lambda _: None, evaluation_sets(config)
    )
    return {count.source: count.leaked_documents for count in corpus.counts}


def test_a_planted_leak_is_dropped_before_training_and_counted_by_source(
    config: PipelineConfig,
) -> None:
    assert _leaked(config) == {"gsm8k": 1}
    config.eval_benchmarks, config.evaluation.paths = [], {}
    assert _leaked(config) == {"gsm8k": 0}


def test_every_problem_counts_as_a_leak_though_only_some_are_asked(config: PipelineConfig) -> None:
    (question,) = read_questions(config)
    assert len(question.problems) == 5
    (evaluation_set,) = evaluation_sets(config)
    assert len(evaluation_set.documents) == 31


def test_a_benchmark_with_a_path_is_kept_apart_though_it_is_not_asked_for(
    config: PipelineConfig,
) -> None:
    config.eval_benchmarks = []
    assert _leaked(config) == {"gsm8k": 1}


def test_the_number_of_words_in_a_row_can_be_set(config: PipelineConfig) -> None:
    config.training.data.leak_words = 25
    assert _leaked(config) == {"gsm8k": 0}
    config.training.data.leak_words = 0
    assert _leaked(config) == {"gsm8k": 0}


@pytest.mark.parametrize(("line", "named"), [
    ("{", "not JSON"),
    ('{"question": "How many?"}', "answer"),
    ('{"question": "How many?", "answer": ""}', "answer"),
    ('{"question": "", "answer": "#### 1"}', "question"),
])
def test_a_broken_benchmark_file_is_named_with_its_line_before_training(
    config: PipelineConfig, tmp_path: Path, line: str, named: str
) -> None:
    path = tmp_path / "gsm8k_test.jsonl"
    path.write_text(json.dumps(_problem(1)) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as refusal:
        read_questions(config)
    (message,) = str(refusal.value).splitlines()
    assert message.startswith(f"{path}:2: ")
    assert named in message


def test_what_the_time_cut_short_was_not_measured_on_all_problems(config: PipelineConfig) -> None:
    (question,) = read_questions(config)
    said = conversation((Role.USER, "w1x2 w3x4?"), (Role.ASSISTANT, "#### 12"))
    tokenizer = train_tokenizer([said] * 3, 300)
    model = ReasoningTransformer(TransformerConfig(
        name="m", vocab_size=300, hidden_size=32, num_hidden_layers=1,
    )).eval()
    evaluation = replace(config.evaluation, max_new_tokens=4, batch_size=1)
    answers = iter(range(2))
    with Harness(model, tokenizer, evaluation, Precision.FP32) as harness:
        whole = harness.run(question.benchmark, question.problems)
        short = harness.run(question.benchmark, question.problems,
                            lambda: next(answers, None) is None)
    # What a promotion asks for before it uses a measurement again.
    wanted = problem_digests(config)["gsm8k_accuracy"]
    assert whole.problems_sha256 == wanted
    assert short.cut_short
    assert short.problems_sha256 not in (wanted, problems_digest([]))


def test_an_unknown_benchmark_and_a_path_for_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^eval_benchmarks = gms8k: must be one of accuracy"):
        load_config(overrides=[("eval_benchmarks", "[gms8k]")])
    with pytest.raises(ConfigError, match=r"^evaluation\.paths\.gms8k = x: must be for one of"):
        load_config(overrides=[("evaluation.paths", "{gms8k: x}")])


def test_each_name_of_a_benchmark_stands_for_something() -> None:
    from svend.evaluation.benchmarks import ANSWERED, LATENCY, PERPLEXITY

    assert {*ANSWERED, LATENCY, PERPLEXITY} == set(BENCHMARK_NAMES)
