"""Bad input of every kind: each row is a command that ends in one line and changes nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.refusals import refusal_of, tree_of
from tests.registry import make_version, store


@dataclass(frozen=True)
class Row:
    """A command, what its one line must say, and the files that it finds in {here}."""

    command: str
    says: str
    files: dict[str, bytes] = field(default_factory=dict)


# Configurations.

VALUES = [
    # A key that is none.
    ("training.learning_rat 1", "did you mean training.learning_rate?"),
    ("learning_rate 1", "unknown key learning_rate"),
    ("training.data.sorces [gsm8k]", "did you mean training.data.sources?"),
    ("training..max_steps 1", "'training..max_steps' is not a key"),
    (".max_steps 1", "'.max_steps' is not a key"),
    ("training. 1", "'training.' is not a key"),
    ("groups.scale small", "unknown key groups"),
    ("evaluation.paths.0.x y", "evaluation.paths"),
    ("model.layers 3", "unknown key model.layers"),
    ("carry.learning_rate 1", "unknown key carry.learning_rate"),
    ("gates.quick.x 1", "gates.quick"),
    # A value of the wrong type.
    ("training.max_steps many", "training.max_steps"),
    ("training.max_steps 1.5", "training.max_steps"),
    ("training.max_steps true", "training.max_steps"),
    ("training.max_steps [1]", "training.max_steps = [1]: must be a single value"),
    ("training.max_steps '{a: 1}'", "training.max_steps"),
    ("training.max_steps 2001-01-01", "training.max_steps"),
    ("training.max_steps 2001-13-45", "training.max_steps"),
    ("training.max_steps '!!set {a}'", "training.max_steps"),
    ("training.max_steps '!!binary YQ=='", "training.max_steps"),
    ("training.learning_rate fast", "training.learning_rate"),
    ("training.learning_rate '${oc.env:HOME}'", "training.learning_rate"),
    ("training.experiment_name '${x'", "training.experiment_name"),
    ("training.experiment_name '???'", "training.experiment_name"),
    ("training.use_wandb perhaps", "training.use_wandb"),
    ("training 3", "training = 3: is a section"),
    ("training.data [a]", "training.data = ['a']: is a section"),
    ("eval_benchmarks accuracy", "eval_benchmarks"),
    ("eval_benchmarks '[[accuracy]]'", "eval_benchmarks"),
    ("evaluation.paths gsm8k", "evaluation.paths"),
    ("training.data.own_sources '[a]'", "own_sources[0]"),
    ("training.data.own_sources '[{nam: a}]'", "did you mean training.data.own_sources[0].name?"),
    ("training.data.mix_ratios 0.5", "mix_ratios"),
    ("gates.full '[3]'", "gates.full[0]"),
    # A value that is not allowed.
    ("training.max_steps 0", "training.max_steps"),
    ("training.max_steps -1", "training.max_steps"),
    ("training.learning_rate 0", "training.learning_rate"),
    ("training.learning_rate nan", "training.learning_rate"),
    ("training.learning_rate .nan", "training.learning_rate"),
    ("training.learning_rate .inf", "training.learning_rate"),
    ("training.learning_rate 1e999", "training.learning_rate"),
    ("training.batch_size 0", "training.batch_size"),
    ("training.optimizer sgd", "training.optimizer = sgd: must be one of adamw, muon"),
    ("training.schedule 3", "training.schedule = 3: must be one of"),
    ("training.precision null", "training.precision"),
    ("training.compile maybe", "training.compile = maybe: must be one of"),
    ("training.warmup_ratio 2", "training.warmup_ratio"),
    ("training.warmup_ratio .nan", "training.warmup_ratio"),
    ("training.adam_beta1 1", "training.adam_beta1"),
    ("training.adam_epsilon 0", "training.adam_epsilon"),
    ("training.max_grad_norm -1", "training.max_grad_norm"),
    ("training.weight_decay -0.1", "training.weight_decay"),
    ("training.weight_decay .nan", "training.weight_decay"),
    ("training.save_steps 0", "training.save_steps"),
    ("training.seed -1", "training.seed"),
    ("training.seed 99999999999999999999999", "training.seed"),
    ("training.model_scale small", "training.model_scale = small: the scale is tiny"),
    ("training.data.heldout_fraction 1.5", "heldout_fraction"),
    ("training.data.max_seq_length 0", "max_seq_length"),
    ("training.data.max_seq_length 1000000", "max_seq_length"),
    ("training.data.mix_ratios '{reasoning: -1}'", "mix_ratios"),
    ("training.data.mix_ratios '{reasoning: .nan}'", "mix_ratios"),
    ("training.data.sources '[]'", "sources"),
    ("training.data.processes 0", "processes"),
    ("training.data.num_samples 0", "num_samples"),
    ("training.data.leak_words -1", "leak_words"),
    ("model.hidden_size 0", "model.hidden_size"),
    ("model.hidden_size 100", "model.hidden_size"),
    ("model.num_attention_heads 7", "num_attention_heads"),
    ("model.num_key_value_heads 5", "num_key_value_heads"),
    ("model.vocab_size -5", "model.vocab_size"),
    ("model.num_hidden_layers 0", "model.num_hidden_layers"),
    ("model.name ''", "model.name"),
    ("model.name a/b", "model.name"),
    ("eval_benchmarks '[chess]'", "chess"),
    ("evaluation.temperature -1", "evaluation.temperature"),
    ("evaluation.top_p 0", "evaluation.top_p"),
    ("evaluation.problems 0", "evaluation.problems"),
    ("evaluation.budget_seconds 0", "evaluation.budget_seconds"),
    ("gates.confidence 1", "gates.confidence"),
]
CONFIGURATIONS = [Row(f"plan --{setting}", says) for setting, says in VALUES] + [
    Row(f"{command} --training.optimizer sgd", "training.optimizer = sgd")
    for command in ("train", "validate", "sweep", "train --resume")
] + [
    Row("validate --training.validation_gates '{nosuch: 1}'", "nosuch"),
]

# Command lines.

COMMAND_LINES = [
    Row("", "the following arguments are required: COMMAND"),
    Row("predict", "the following arguments are required: TABLE.csv"),
    Row("Train", "invalid choice: 'Train'"),
    Row("--scale tiny", "argument COMMAND: invalid choice: 'tiny'"),
    Row("train tiny", "'tiny' is not an option"),
    Row("train -x", "'-x' is not an option"),
    Row("train --", "no value"),
    Row("train --training.max_steps", "--training.max_steps has no value"),
    Row("train --training.max_steps=", "--training.max_steps has no value"),
    Row("train --training.max_steps --training.seed 1", "--training.max_steps has no value"),
    Row("train --=3", "ambiguous option: --=3"),
    Row("train --scale", "expected one argument"),
    Row("train --scale huge", "unknown scale 'huge': choose one of tiny, small"),
    Row("train --data ../../etc/passwd", "unknown data '../../etc/passwd'"),
    Row("train --gates nowhere", "unknown gates 'nowhere'"),
    Row("train --preset nowhere", "unknown preset 'nowhere'"),
    Row("train --resume maybe", "resume = maybe: must be true, false or force"),
    Row("train --profile maybe", "training.profile"),
    Row("train '--training.max_steps 3'", "--training.max_steps 3"),
    Row("train --training.experiment_name ''", "has no value"),
    Row("plan --resume", "--resume has no value"),
    Row("scales --all", "scales takes no option --all"),
    Row("scales tiny", "scales takes no option tiny"),
    Row("bench", "bench: name a kind, or give --gpu-report"),
    Row("bench fly", "invalid choice: 'fly'"),
    Row("bench train --steps many", "--steps"),
    Row("evaluate", "the following arguments are required: --model"),
    Row("evaluate --model", "expected one argument"),
    Row("evaluate --model svend", "model svend: is no version of the registry"),
    Row("evaluate --model models:/svend", "is no version of the registry"),
    Row("evaluate --model models:/a/b/c", "is no version of the registry"),
    Row("evaluate --model models:/svend-bad/latest", "is no version of the registry"),
    Row("evaluate --model models:/nowhere/1", "model models:/nowhere/1"),
    Row("evaluate --model models:/svend-bad/99999999999999999999", "models:/svend-bad/9999"),
    Row("evaluate --model models:/svend-bad@nowhere", "models:/svend-bad@nowhere"),
    Row("evaluate --model \"models:/a'b/1\"", "models:/a'b/1"),
    Row("evaluate --model models:/svend-bad/1 --benchmarks chess", "chess"),
    Row("evaluate --model models:/svend-bad/1 --benchmarks '['", "["),
    Row("evaluate --model models:/svend-bad/1 --evaluation.problem 1", "evaluation.problem"),
    Row("promote", "the following arguments are required: --model"),
    Row("promote --model svend-bad --to gold", "to = gold: must be one of quick"),
    Row("promote --model svend-bad --version x --to quick", "version = x: must be a number"),
    Row("promote --model svend-bad --version 9 --to quick", "svend-bad version 9"),
    Row("promote --model nowhere --to quick", "model nowhere"),
    Row("promote --model svend-bad --rollback full --to full", "rollback: takes a level"),
    Row("promote --model svend-bad --override why", "override: needs to"),
    Row("promote --model svend-bad --gates nowhere", "unknown gates 'nowhere'"),
    Row("promote --model svend-bad --to quick --gates.quick 3", "gates.quick"),
    Row("history", "the following arguments are required: NAME"),
    Row("history nowhere", "model nowhere"),
    Row("history \"a'; drop table\"", "a'; drop table"),
    Row("history svend-bad --all", "history takes no option --all"),
    Row("audit --model nowhere", "nowhere"),
    Row("audit --gates nowhere", "unknown gates 'nowhere'"),
    Row("lineage models:/nowhere@full", "models:/nowhere@full"),
    Row("lineage svend-bad", "is no version of the registry"),
    Row("export", "the following arguments are required: URI"),
    Row("export models:/nowhere/1", "models:/nowhere/1"),
    Row("export models:/svend-bad/1 --to onnx", "invalid choice: 'onnx'"),
    Row("export models:/svend-bad/1 --dtype fp8", "invalid choice: 'fp8'"),
    Row("export models:/svend-bad/1", "model.safetensors: cannot be read"),
    Row("serve", "the following arguments are required: URI"),
    Row("serve models:/nowhere/1 --port 18764", "models:/nowhere/1"),
    Row("serve models:/svend-bad/1 --port 18764", "model.safetensors: cannot be read"),
    Row("serve models:/svend-bad/1 --port x", "argument --port: invalid int value: 'x'"),
    Row("serve models:/svend-bad/1 --port 0", "port = 0: must be 1 to 65535"),
    Row("serve models:/svend-bad/1 --lanes 0", "lanes = 0: must be 1 or more"),
    Row("serve models:/svend-bad/1 --timeout-seconds nan", "timeout-seconds = nan"),
    Row("serve models:/svend-bad/1 --host 0.0.0.0", "is not this machine alone"),
    Row("serve models:/svend-bad/1 --host no.such.host.invalid", "no.such.host.invalid"),
    Row("serve models:/svend-bad/1 --tools maybe", "invalid choice: 'maybe'"),
    Row("sweep --sweep nowhere", "unknown sweep 'nowhere'"),
    Row("sweep --search '['", "search = [: must be a mapping"),
    Row("sweep --search '{training.learning_rate: 3}'", "sweep.space.training.learning_rate"),
    Row("sweep --search '{training.learning_rate: {low: 1, high: x}}'", "high = x"),
    Row("sweep --search '{training.learning_rate: {low: 2, high: 1}}'", "is empty"),
    Row("sweep --search '{training.nosuch: [1, 2]}'", "training.nosuch"),
    Row("sweep --search '{1: [1, 2]}'", "1"),
    Row("sweep --search '{training.learning_rate: {low: .nan, high: 1}}'", "must be a number"),
    Row("sweep --trials 0", "sweep.trials"),
    Row("sweep --trials many", "sweep.trials"),
    Row("sweep --workers -1", "sweep.workers"),
    Row("sweep --dry-run maybe", "dry_run = maybe"),
    Row("sweep --sweep.nosuch 1", "sweep.nosuch"),
    Row("sweep --storage ftp://x", "ftp://x"),
    Row("import {here}", "the following arguments are required: --name"),
    Row("import {here}/nowhere --name x", "has no tokenizer.json"),
    Row("import {here} --name ../x", "name = ../x: must be letters"),
    Row("import {here} --name svend-tiny-50m", "is a scale's"),
]

# Files that are read before a run: a sweep's result, a start, a tokenizer.

HPARAMS = {
    "a list": (b"- 1\n", "expected keys and values, found list"),
    "a number": (b"3", "h.yaml: "),
    "empty": (b"", "h.yaml: "),
    "not YAML": (b"a: [1", "h.yaml: "),
    "a tab": (b"a:\n\t- b", "h.yaml: "),
    "a NUL": (b"a: \0", "h.yaml: "),
    "UTF-16": ("a: 1".encode("utf-16"), "h.yaml: "),
    "Latin-1": ("a: \xe9".encode("latin-1"), "h.yaml: "),
    "nested too deep": (b"[" * 5000, "h.yaml: while increasing flow level"),
    "an alias of itself": (b"a: &a [*a]", "h.yaml: has an alias"),
    "a key twice": (b"a: 1\na: 2", "h.yaml: "),
    "a list for a key": (b"? [a]\n: 1", "h.yaml: "),
    "null for a key": (b"null: 1", "h.yaml: "),
    "an unknown key": (b"values: {}\nnosuch: 1", "unknown key h.yaml: nosuch"),
    "no values": (b"study: s", "h.yaml: "),
    "two documents": (b"a: 1\n---\nb: 2", "h.yaml: "),
    "a key with an escape sequence": (b'"\\e[31mred\\n": 1', "unknown key"),
    "interpolation": (b"values: {training.seed: '${oc.env:HOME}'}", "values.training.seed"),
}
FILES = [
    *(Row("plan --hparams {here}/h.yaml", says, {"h.yaml": content})
      for content, says in HPARAMS.values()),
    Row("plan --hparams {here}/nowhere.yaml", "nowhere.yaml: no such file"),
    Row("plan --hparams {here}/folder.yaml", "folder.yaml", {"folder.yaml/x": b""}),
    Row("plan --hparams runs:/nowhere/hparams.yaml", "runs:/nowhere/hparams.yaml"),
    Row("plan --hparams \"it's\"", "no sweep of that name"),
    Row("train --init_from {here}/nowhere", "has no checkpoint"),
    Row("train --init_from {here}/file", "has no checkpoint", {"file": b"x"}),
    Row("train --init_from models:/nowhere/1", "models:/nowhere/1"),
    Row("train --init_from models:/svend-bad/1", "model.safetensors: cannot be read"),
    Row("train --resume", "nothing to resume"),
    Row("train --resume", "run.json: damaged", {"checkpoints/svend/run.json": b"{"}),
    Row("train --resume", "run.json: damaged", {"checkpoints/svend/run.json": b"\xff"}),
    Row("train --resume", "run.json: damaged", {"checkpoints/svend/run.json": b"[1]"}),
    Row("train --resume", "run.json: damaged", {"checkpoints/svend/run.json": b"{}"}),
    Row("train --resume", "run.json: damaged", {"checkpoints/svend/run.json": b"[" * 9999}),
]

# Checkpoints, as a start: step_00000001/metadata.json.

CHECKPOINTS = {
    "empty": b"", "not JSON": b"{", "a list": b"[]", "null": b"null", "NaN": b"NaN",
    "no hash": b'{"step": 1}', "binary": b"\x80\x02\x00", "nested too deep": b"[" * 99999,
    "a wrong hash": b'{"step": 1, "metadata_sha256": "0"}',
    "a huge number": b'{"step": ' + b"1" * 9999 + b"}",
}
STARTS = [
    *(Row("train --init_from {here}/start", "step_00000001: not a checkpoint",
          {"start/step_00000001/metadata.json": content}) for content in CHECKPOINTS.values()),
    Row("train --init_from {here}/start", "not a checkpoint",
        {"start/step_00000001/model.pt": b"x"}),
    Row("train --init_from {here}/start", "not a checkpoint",
        {"start/step_00000001/metadata.json/x": b""}),
    Row("train --init_from {here}/start", "not a checkpoint", {"start/step_00000001": b"x"}),
]

# Data.


def parquet_of(**columns: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


GOOD = b'{"question": "What is 1 + 1?", "answer": "It is 2.\\n#### 2"}\n'
WHOLE = parquet_of(question=["What is 1 + 1?"] * 9, answer=["2\n#### 2"] * 9)
LINES = {
    "no JSON": (b"question: what", "x.jsonl:2: not JSON"),
    "cut off": (GOOD[:20], "x.jsonl:2: not JSON"),
    "a list": (b"[1, 2]", "x.jsonl:2: expected a JSON object, found list"),
    "a number": (b"3", "x.jsonl:2: expected a JSON object, found int"),
    "null": (b"null", "x.jsonl:2: expected a JSON object, found NoneType"),
    "text": (b'"question"', "x.jsonl:2: expected a JSON object, found str"),
    "another schema": (b'{"prompt": "a"}', "x.jsonl:2: no key 'question'"),
    "no answer": (b'{"question": "a"}', "x.jsonl:2: no key 'answer' for source 'gsm8k'"),
    "a number for text": (b'{"question": 1, "answer": "2"}', "x.jsonl:2: user is int, not text"),
    "null for text": (b'{"question": "1", "answer": null}', "x.jsonl:2: "),
    "an empty answer": (b'{"question": "1", "answer": " "}', "x.jsonl:2: the assistant is empty"),
    "Latin-1": (b'{"question": "\xe9", "answer": "2"}', "x.jsonl:2: not UTF-8 at byte 14"),
    "UTF-16": ('{"question": "1", "answer": "2"}'.encode("utf-16-le"), "x.jsonl:2: "),
    "half a pair": (b'{"question": "\\ud800", "answer": "2"}', "x.jsonl:2: user is not Unicode"),
    "nested too deep": (b"[" * 99999, "x.jsonl:2: not JSON"),
    "objects too deep": (b'{"a":' * 99999, "x.jsonl:2: not JSON"),
    "a huge number": (b'{"question": ' + b"1" * 9999 + b"}", "x.jsonl:2: not JSON"),
    "binary": (bytes(range(11, 256)), "x.jsonl:2: "),
    "a byte-order mark": (b"\xef\xbb\xbf" + b"[1]", "x.jsonl:2: "),
    "a key with line breaks": (b'{"a\\nb\\u001b[31m": 1}', "x.jsonl:2: no key 'question'"),
    "a line of ten megabytes": (b'{"question": "' + b"a" * 10**7, "x.jsonl:2: not JSON"),
}
PLAN = ("plan --training.max_steps null --eval_benchmarks [] --data.processes 1 "
        "--data.cache_dir {cache} --data gsm8k ")
DATA = [
    *(Row(PLAN + "--data.path {here}/x.jsonl", says, {"x.jsonl": GOOD + line + b"\n" + GOOD})
      for line, says in LINES.values()),
    *(Row(PLAN + f"--data.path {{here}}/{name}", says, {name: content}) for name, content, says in (
        ("x.jsonl", b"", "empty"),
        ("x.jsonl", b"\n\n \n", "empty"),
        ("x.jsonl", b"[1]", "expected a list of JSON objects"),
        ("x.jsonl", b"[{", "x.jsonl: not JSON"),
        ("x.jsonl", b"[]", "empty"),
        ("x.jsonl", b"[" * 99999, "x.jsonl: not JSON (nested too deep)"),
        ("x.jsonl", b"[\xff]", "x.jsonl: not JSON"),
        ("x.json", b"{", "x.json:1: not JSON"),
        ("x.jsonl.gz", GOOD, "x.jsonl.gz: truncated or damaged gzip"),
        ("x.jsonl.gz", gzip.compress(GOOD * 999)[:-9], "x.jsonl.gz: truncated or damaged gzip"),
        ("x.jsonl.gz", b"", "empty"),
        ("x.jsonl.gz", gzip.compress(b"{"), "x.jsonl.gz:1: not JSON"),
        ("x.parquet", b"", "x.parquet: cannot be read"),
        ("x.parquet", GOOD, "x.parquet: cannot be read"),
        ("x.parquet", WHOLE[:-30], "x.parquet: cannot be read"),
        ("x.parquet", WHOLE[:60] + WHOLE[-200:], "x.parquet: cannot be read"),
        ("x.parquet", parquet_of(prompt=["a"]), "x.parquet: row 1: no key"),
        ("x.parquet", parquet_of(question=[1], answer=[2]), "x.parquet: row 1: user is int"),
        ("x.parquet", parquet_of(question=[None], answer=["a"]), "x.parquet: row 1: "),
        ("x.parquet", parquet_of(question=[b"\xff"], answer=[b"\xff"]), "row 1: user is bytes"),
        ("x.parquet", parquet_of(question=pa.array([""])[:0], answer=pa.array([""])[:0]), "empty"),
        ("x.csv", b"", "empty"),
        ("x.csv", b"question,answer\n", "empty"),
        ("x.csv", b"question,answer\na\n", "x.csv:2: 1 cells, and the header names 2"),
        ("x.csv", b"question,answer\na,b,c\n", "x.csv:2: 3 cells"),
        ("x.csv", b'question,answer\n"a,b\n', "x.csv:2: cannot be read"),
        ("x.csv", b"question,answer\n\xff,b\n", "x.csv: not UTF-8"),
        ("x.csv", b"question,answer\na\0,b\n", "x.csv"),
        ("x.csv", b"a,b\n1,2\n", "x.csv:2: no key 'question'"),
        ("x.txt", b"\xff\xfe", "x.txt:1: not UTF-8"),
        ("x.txt", b"a text without a question", "no key 'question'"),
        ("x.pkl", b"\x80\x02", "unknown kind of file"),
        ("x", b"", "unknown kind of file"),
        ("x.jsonl/y", b"", "x.jsonl/y: unknown kind of file"),
    )),
    *(Row(PLAN + f"--training.data.{setting}", says) for setting, says in (
        ("mix_ratios '{poetry: 1}'", "mix_ratios.poetry: unknown kind"),
        ("sources '[nowhere]'", "unknown source 'nowhere'"),
        ("sources '[gym:nowhere]'", "nowhere"),
        ("sources '[gsm8k, gsm8k]'", "sources"),
    )),
    Row(PLAN + "--data.path {here}/x.jsonl --data.tokenizer nowhere.json",
        "nowhere.json: no such file", {"x.jsonl": GOOD}),
    Row(PLAN + "--data.path {here}", "no file for source 'gsm8k'"),
    Row(PLAN + "--data.path {here}", "no file for source 'gsm8k'", {"other.jsonl": GOOD}),
    Row(PLAN + "--data.path {here}", "no file for source 'gsm8k'", {"train.jsonl/x": b""}),
    Row(PLAN + "--data.path {here}/nowhere", "nowhere: no such file or folder"),
    Row(PLAN + "--data.path {here}", "train-00000-of-00001.jsonl: cannot be read",
        {"train-00000-of-00001.jsonl/x": b""}),
    Row(PLAN + f"--data.path {'a' * 5000}", "File name too long"),
    Row(PLAN + "--data.path \"{here}/a\\0b\"", "no such file"),
    Row(PLAN + "--data.path {here}/x.jsonl --data.heldout_path {here}/nowhere.jsonl",
        "nowhere.jsonl: no such file", {"x.jsonl": GOOD}),
    Row(PLAN + "--data.path {here}/x.jsonl", "too few", {"x.jsonl": GOOD}),
    Row(PLAN + "--data.path {here}/x.jsonl --data.evaluation_sets '[{here}/nowhere]'",
        "nowhere: no such file", {"x.jsonl": GOOD}),
    Row(PLAN + "--data.path {here}/x.jsonl --data.evaluation_sets '[{here}/e.jsonl]'",
        "e.jsonl:1: not JSON", {"x.jsonl": GOOD, "e.jsonl": b"{"}),
    *(Row(PLAN + "--data.path {here}/x.jsonl --data.tokenizer {here}/t.json",
          "t.json: cannot be loaded", {"x.jsonl": GOOD, "t.json": content})
      for content in (b"", b"{}", b"null", b"\xff", b'{"model": {"type": "BPE"}}')),
    Row(PLAN + "--data.path {here}/x.jsonl --data.tokenizer {here}", "cannot be loaded",
        {"x.jsonl": GOOD}),
    Row(PLAN + "--data.path {here}/x.jsonl --data.cache_dir {here}/x.jsonl", "x.jsonl",
        {"x.jsonl": GOOD}),
]

# A folder of the Llama family.

TOKENIZER = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
}).encode()
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99,
         "num_hidden_layers": 2, "intermediate_size": 128}
IMPORTS = [
    Row("import {here}/hf --name x", says,
        {"hf/tokenizer.json": TOKENIZER, "hf/config.json": content})
    for content, says in (
        (b"", "config.json: cannot be read"), (b"[]", "config.json: is no JSON object"),
        (b"\xff", "config.json: cannot be read"), (b"[" * 99999, "config.json: cannot be read"),
        *((json.dumps({**LLAMA, **changes}).encode(), says) for changes, says in (
            ({"model_type": "gpt2"}, "model_type gpt2 is not of the Llama family"),
            ({"model_type": ["llama"]}, "model_type"),
            ({"hidden_size": None}, "config.json: "), ({"hidden_size": "wide"}, "config.json: "),
            ({"hidden_size": 65}, "head_dim"), ({"num_attention_heads": 0}, "config.json"),
            ({"vocab_size": -1}, "a size is below 1"), ({"rope_parameters": 3}, "rope_parameters"),
            ({"rope_theta": "x"}, "config.json: "), ({"attention_bias": True}, "attention_bias"),
            ({"rope_theta": float("nan")}, "rope_theta"), ({"rms_norm_eps": -1}, "rms_norm_eps"),
            ({}, "has no model.safetensors"),
        )),
    )
] + [
    Row("import {here}/hf --name x", "config.json: no such file",
        {"hf/tokenizer.json": TOKENIZER}),
    Row("import {here}/hf --name x", "tokenizer.json: cannot be loaded",
        {"hf/tokenizer.json": b"{", "hf/config.json": b"{}"}),
    *(Row("import {here}/hf --name x", says, {
        "hf/tokenizer.json": TOKENIZER, "hf/config.json": json.dumps(LLAMA).encode(),
        "hf/model.safetensors": content,
    }) for content, says in (
        (b"", "model.safetensors: cannot be read"), (b"\0" * 8, "model.safetensors"),
        (b"\2\0\0\0\0\0\0\0{}", "tensors, which are too few"),
        (b"\4\0\0\0\0\0\0\0null", "model.safetensors: cannot be read"),
    )),
]

ROWS = [*COMMAND_LINES, *IMPORTS, *CONFIGURATIONS, *FILES, *STARTS, *DATA]
AT_ONCE = len(COMMAND_LINES) + len(IMPORTS)
# Composing a configuration takes a fifth of a second: of the rows that do, one in six runs always;
# of the others every second.
MARKED = [
    pytest.param(row, id=f"{index}: {row.command[:60]}",
                 marks=() if index % (2 if index < AT_ONCE else 6) == 0 else pytest.mark.slow)
    for index, row in enumerate(ROWS)
]


@pytest.fixture(scope="module", autouse=True)
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with a version whose weights are none, and whose files are all as registered."""
    folder = tmp_path_factory.mktemp("registry")
    with store(folder):
        make_version(folder, 1, model="svend-bad", more={"tokenizer.json": "{}"})
        yield folder


def test_there_are_at_least_a_hundred() -> None:
    assert len({(row.command, *row.files.values()) for row in ROWS}) >= 100


@pytest.mark.parametrize("row", MARKED)
def test_bad_input_ends_in_one_line(
    row: Row, registry: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    for name, content in row.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    # What has been tokenised by then may be kept: a cache is no file of the user's.
    cache = str(tmp_path_factory.mktemp("cache"))
    words = [word.replace("{here}", str(tmp_path)).replace("{cache}", cache)
             for word in shlex.split(row.command)]
    before = tree_of(registry)

    line = refusal_of(words, tmp_path, capsys)

    assert row.says in line
    assert tree_of(registry) == before


@pytest.mark.slow
@pytest.mark.parametrize("row", [
    Row("train --training.optimizer sgd", "training.optimizer = sgd"),
    Row("train --init_from {here}/start", "step_00000001: not a checkpoint",
        {"start/step_00000001/metadata.json": b"{"}),
    Row(PLAN + "--data.path {here}/x.jsonl", "x.jsonl:1: not JSON", {"x.jsonl": b"{"}),
], ids=lambda row: row.command[:30])
def test_a_real_process_ends_in_one_line_too(row: Row, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name, content in row.files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    words = [word.replace("{here}", str(here)).replace("{cache}", str(tmp_path / "cache"))
             for word in shlex.split(row.command)]
    before = tree_of(here)
    ended = subprocess.run(
        [sys.executable, "-m", "svend", *words], cwd=here, text=True, capture_output=True,
        check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT),
             "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"},
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert row.says in line
    assert tree_of(here) == before
