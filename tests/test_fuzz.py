"""What is read from outside is what it should be, or an error of ours: never another exception."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svend.data.encoding import documents_in
from svend.data.records import SUFFIXES, read_chunks
from svend.data.sources import SOURCES, RecordSource
from svend.errors import CheckpointError, ConfigError, DataError
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.config import GatesConfig, ModelConfig, PipelineConfig, TrainingConfig
from svend.pipeline.groups import CONF_DIR
from svend.pipeline.loading import load_config, load_saved_config
from svend.pipeline.schema import build, flatten, parse_value, read_yaml, to_tree, to_yaml

few = settings(max_examples=40, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
fewer = settings(few, max_examples=12)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["${x}", "???", "1e999", "on", "~", "\0", "2001-13-45", "!!set {a}", "\ud800"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=6) | st.integers() | st.none(), inner, max_size=3
    ),
    max_leaves=8,
)
KEYS = sorted(flatten(to_tree(load_config({}))))


@st.composite
def mutations_of(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file with bits flipped, bytes put in, or a part cut out."""
    mutated = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(mutated) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "end", "insert"]))
        if kind == "flip" and mutated:
            mutated[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del mutated[at : at + draw(st.integers(1, 64))]
        elif kind == "end":
            del mutated[at:]
        else:
            mutated[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(mutated)


# The configuration.


@few
@given(
    schema=st.sampled_from([TrainingConfig, ModelConfig, GatesConfig]), data=st.data()
)
def test_any_tree_is_a_configuration_or_an_error(schema: type[Any], data: st.DataObject) -> None:
    known = sorted(schema.__dataclass_fields__)
    tree = data.draw(st.dictionaries(st.sampled_from(known) | st.text(max_size=5), TREES,
                                     max_size=3))
    try:
        assert isinstance(build(schema, tree), schema)
    except ConfigError as error:
        assert str(error)


@settings(few, max_examples=20)
@given(key=st.sampled_from(KEYS) | st.text(max_size=12),
       text=st.text(max_size=12) | TREES.map(repr) | TREES.map(str))
def test_any_override_is_taken_or_refused(key: str, text: str) -> None:
    try:
        assert isinstance(load_config({}, [(key, text)]), PipelineConfig)
    except ConfigError as error:
        assert str(error)


@few
@given(text=st.text(max_size=40) | st.text("[]{}:,&*!?|>-#'\"%@` \n\ta1.", max_size=40))
def test_any_text_is_a_value(text: str) -> None:
    parse_value(text)


@few
@given(content=st.binary(max_size=60) | mutations_of((CONF_DIR / "gates/guide.yaml").read_bytes()))
def test_any_file_is_yaml_or_an_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        try:
            assert isinstance(read_yaml(path), dict)
        except ConfigError as error:
            assert "config.yaml: " in str(error)


@settings(few, max_examples=15)
@given(content=mutations_of(to_yaml(load_config({})).encode()))
def test_a_damaged_saved_config_is_refused_or_whole(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        try:
            assert isinstance(load_saved_config(path), PipelineConfig)
        except ConfigError as error:
            assert str(error)


# Data.

LINES = b"".join(
    json.dumps({"question": f"What is {n} + 1?", "answer": f"{n + 1}", "text": "t",
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                "tools": "[]", "answers": "[]", "query": "q", "system": "s"}).encode() + b"\n"
    for n in range(6)
)


def parquet_bytes() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"question": ["a", "b"], "answer": ["c", "d"], "n": [1, 2]}), stream)
    return stream.getvalue()


VALID = {
    ".jsonl": LINES, ".json": b"[" + LINES.strip().replace(b"\n", b",") + b"]",
    ".jsonl.gz": gzip.compress(LINES), ".json.gz": gzip.compress(LINES),
    ".parquet": parquet_bytes(), ".csv": b"question,answer\na,b\n\"c\",d\n",
    ".txt": b"one\ntwo\n\nthree\n",
}
SCHEMAS = [source.to_document for source in SOURCES.values() if isinstance(source, RecordSource)]


def read_all(content: bytes, suffix: str, schema: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            for chunk in read_chunks(path):
                dropped: list[str] = []
                for document in documents_in(chunk, "fuzzed", schema, dropped):
                    assert document.messages
                assert all("rows" in place for place in dropped)
        except DataError as error:
            assert "rows" in str(error)


@settings(few, max_examples=100)
@given(data=st.data(), suffix=st.sampled_from(SUFFIXES), schema=st.sampled_from(SCHEMAS))
def test_any_file_is_records_or_an_error(data: st.DataObject, suffix: str, schema: str) -> None:
    read_all(data.draw(st.binary(max_size=80) | mutations_of(VALID[suffix])), suffix, schema)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["from", "value", "role", "content", "tool_calls", "function", "name",
                         "arguments", "human", "gpt"]), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["question", "answer", "problem", "generated_solution", "expected_answer", "conversations",
          "query", "tools", "answers", "system", "messages", "prompt", "completion", "text"]


@settings(few, max_examples=100)
@given(record=st.dictionaries(st.sampled_from(FIELDS), JSON | JSON.map(json.dumps), max_size=5),
       schema=st.sampled_from([*SCHEMAS, "svend.data.schemas:chat_document"]))
def test_any_record_is_a_document_or_is_named(record: dict[str, Any], schema: str) -> None:
    read_all(json.dumps(record).encode(), ".jsonl", schema)


# Checkpoints.


def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    manager = CheckpointManager(folder)
    for step in (1, 2):
        model, optimizer, scheduler = parts()
        manager.save(model, optimizer, scheduler, step=step, metrics={"loss": 1.0},
                     extra_state={"step": step})
    return folder


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "scheduler.pt", "extra_state.pt",
                                  "metadata.json"])
@fewer
@given(data=st.data())
def test_a_damaged_checkpoint_is_passed_over(saved: Path, name: str, data: st.DataObject) -> None:
    content = (saved / "step_00000002" / name).read_bytes()
    mutated = data.draw(mutations_of(content))
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which say what was passed over
        folder = Path(shutil.copytree(saved, Path(place) / "run"))
        (folder / "step_00000002" / name).write_bytes(mutated)
        step, _, extra = CheckpointManager(folder).load_latest(*parts())
        # Metadata may have been written otherwise and still say the same.
        same = mutated == content or name == "metadata.json"
        assert step == extra["step"]
        assert step == 1 or same
        shutil.rmtree(folder / "step_00000001")
        if step == 1:
            with pytest.raises(CheckpointError):
                CheckpointManager(folder).load_latest(*parts())


@settings(few, max_examples=40)
@given(data=st.data(), name=st.sampled_from(["model", "optimizer", "scheduler", "extra_state"]))
def test_a_damaged_state_of_the_right_hash_is_loaded_or_refused(
    saved: Path, name: str, data: st.DataObject
) -> None:
    from svend.pipeline.state_files import read_state

    mutated = data.draw(mutations_of((saved / "step_00000002" / f"{name}.pt").read_bytes()))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"{name}.pt"
        path.write_bytes(mutated)
        try:
            read_state(path)
        except CheckpointError as error:
            assert f"{name}.pt: " in str(error)
