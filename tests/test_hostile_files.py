"""Files from strangers are data: here are exploits that work, each refused in one line."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import save_file

from svend.data.documents import Role, conversation
from svend.data.encoding import _leaks
from svend.data.records import LARGEST_ARRAY_BYTES, file_digest, read_chunks
from svend.data.tokenised import TokenisedPart
from svend.data.tokenizer import train_tokenizer
from svend.errors import CheckpointError, ConfigError, DataError
from svend.models.config import BaseShape, TransformerConfig
from svend.models.huggingface import export_to_huggingface
from svend.models.transformer import ReasoningTransformer
from svend.pipeline import groups
from svend.pipeline.checkpoints import METADATA, CheckpointManager
from svend.pipeline.checkpoints.files import copy_checkpoint
from svend.pipeline.checkpoints.metadata import metadata_bytes, read_folder
from svend.pipeline.config import load_config
from svend.pipeline.hyperparameters import read_hyperparameters
from svend.pipeline.moves import Move, MoveKind, Moves, Registration
from svend.pipeline.schema import read_yaml, to_tree, to_yaml
from svend.pipeline.state_files import read_state
from svend.pipeline.version_evaluation import build_version_corpus, load_version
from svend.tracking.registry import open_version, register_checkpoint
from tests.conftest import DEBUG_OVERRIDES
from tests.refusals import refusal_of, tree_of
from tests.registry import model_of, store

STATES = ("model", "optimizer", "scheduler", "extra_state")


class Exploit:
    """What makes a folder as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._marker),)


@pytest.fixture
def marker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that is there only if an exploit ran; none may have by the end of the test."""
    place = tmp_path_factory.mktemp("marker") / "exploited"
    yield place
    assert not place.exists()


def works(exploit: Callable[[], object], marker: Path) -> None:
    """Check that an exploit does run where it is let, and put things back."""
    exploit()
    assert marker.is_dir(), "the exploit is none"
    marker.rmdir()


def pickled(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Exploit(marker), protocol=2))
    works(lambda: pickle.loads(path.read_bytes()), marker)


def pickled_by_a_newer_protocol(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Exploit(marker), protocol=5))
    works(lambda: pickle.loads(path.read_bytes()), marker)


def saved_as_a_zip(path: Path, marker: Path) -> None:
    torch.save({"weight": torch.zeros(2), "more": Exploit(marker)}, path)
    works(lambda: torch.load(path, weights_only=False), marker)


def saved_before_zip(path: Path, marker: Path) -> None:
    torch.save({"more": Exploit(marker)}, path, _use_new_zipfile_serialization=False)
    works(lambda: torch.load(path, weights_only=False), marker)


HOSTILE_STATES = (pickled, pickled_by_a_newer_protocol, saved_as_a_zip, saved_before_zip)


def save_checkpoint(folder: Path) -> Path:
    """Save a small state as a run saves its own; return the checkpoint's folder."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    checkpoint = CheckpointManager(folder).save(model, optimizer, scheduler, step=1)
    return folder / checkpoint


def sign(checkpoint: Path, **changes: Any) -> None:
    """Write the metadata that an attacker would: every hash and size is the files' own."""
    metadata = json.loads((checkpoint / METADATA).read_bytes())
    del metadata["metadata_sha256"]
    for name in metadata["files"]:
        path = checkpoint / name
        metadata["files"][name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    (checkpoint / METADATA).write_bytes(metadata_bytes({**metadata, **changes}))


def load_everything(folder: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    CheckpointManager(folder).load_latest(model, optimizer, scheduler)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("make", HOSTILE_STATES)
def test_a_checkpoint_runs_no_code(
    tmp_path: Path, marker: Path, state: str, make: Callable[[Path, Path], None]
) -> None:
    checkpoint = save_checkpoint(tmp_path)
    make(checkpoint / f"{state}.pt", marker)
    sign(checkpoint)
    before = tree_of(tmp_path)

    with pytest.raises(CheckpointError, match=rf"{state}\.pt: (cannot be loaded|is no archive)"):
        load_everything(tmp_path)

    assert tree_of(tmp_path) == before


def test_what_would_have_run_is_named(tmp_path: Path, marker: Path) -> None:
    saved_as_a_zip(tmp_path / "model.pt", marker)
    with pytest.raises(CheckpointError, match=r"names \w+\.mkdir, which could run code"):
        read_state(tmp_path / "model.pt")


def test_a_torchscript_archive_is_no_state(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is going out of use
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "model.pt"))
        assert torch.jit.load(str(tmp_path / "model.pt"))(torch.zeros(1, 2)).shape == (1, 2)
    with pytest.raises(CheckpointError, match=r"is no archive as torch.save writes it"):
        read_state(tmp_path / "model.pt")


def test_an_archive_that_unpacks_to_much_more_is_not_unpacked(tmp_path: Path) -> None:
    small, bomb = tmp_path / "small.pt", tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(2**22)}, small)
    with zipfile.ZipFile(small) as packed, zipfile.ZipFile(
        bomb, "w", zipfile.ZIP_DEFLATED
    ) as archive:
        for entry in packed.infolist():
            archive.writestr(entry.filename, packed.read(entry))
    assert bomb.stat().st_size * 100 < small.stat().st_size
    with pytest.raises(CheckpointError, match=r"bomb.pt: is no archive as torch.save writes it"):
        read_state(bomb)


@pytest.mark.parametrize("name", ["../../stolen", "/etc/passwd", "..", "a/b", "a\0b", ""])
def test_metadata_names_no_file_outside_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    inside, target = tmp_path / "inside", tmp_path / "copies" / "deep"
    target.mkdir(parents=True)
    checkpoint = save_checkpoint(inside)
    [own] = read_folder(inside)[0]
    sign(checkpoint, files={**own.files, name: {"sha256": "0" * 64, "bytes": 1}})
    before = tree_of(tmp_path)

    found, [complaint] = read_folder(inside)

    assert not found
    assert "is no name of a checkpoint's file" in complaint
    with pytest.raises(CheckpointError, match=r"no intact checkpoint"), pytest.warns(
        UserWarning, match=r"no name of a checkpoint's file"
    ):
        load_everything(inside)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("changes", [
    {"sequence": "1"}, {"step": None}, {"step": -1}, {"step": True}, {"epoch": 1.5},
    {"metrics": []}, {"metrics": {"loss": "low"}}, {"created": 0}, {"files": []},
    {"files": {"extra_state.pt": {}}}, {"files": {"extra_state.pt": {"sha256": 1, "bytes": 1}}},
    {"path": "/tmp"}, {"checkpoint_id": ["step_00000001"]},
])
def test_metadata_with_a_valid_hash_and_wrong_types_is_passed_over(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    checkpoint = save_checkpoint(tmp_path)
    sign(checkpoint, **changes)
    found, [complaint] = read_folder(tmp_path)
    assert not found
    assert "not a checkpoint (metadata.json: " in complaint


def test_a_link_in_a_checkpoint_is_not_copied_unless_it_has_the_hash(tmp_path: Path) -> None:
    secret, inside, copies = tmp_path / "secret", tmp_path / "inside", tmp_path / "copies"
    copies.mkdir()
    checkpoint = save_checkpoint(inside)
    [own] = read_folder(inside)[0]
    secret.write_bytes(b"s" * (checkpoint / "model.pt").stat().st_size)
    (checkpoint / "model.pt").unlink()
    (checkpoint / "model.pt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"damaged"):
        copy_checkpoint(own, copies)
    assert not list(copies.iterdir())


# A start from elsewhere: `--init_from`, `svend import`.


def debug_model() -> ReasoningTransformer:
    config = load_config({}, list(DEBUG_OVERRIDES.items()))
    assert config.model is not None
    return ReasoningTransformer(
        TransformerConfig.from_model_config(config.model, BaseShape.of(config.training))
    )


def tokenizer_json(text: str = "one two three") -> Any:
    return train_tokenizer([conversation((Role.USER, text), (Role.ASSISTANT, "four"))] * 3, 300)


@pytest.fixture(scope="module")
def made_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    CheckpointManager(folder).save(debug_model())
    tokenizer_json().save(folder)
    config = load_config({}, list(DEBUG_OVERRIDES.items()))
    told = {"model": to_tree(config.model), "training": {"parametrisation": "standard"}}
    (folder / "config.yaml").write_text(to_yaml(told), encoding="utf-8")
    return folder


@pytest.fixture
def start(made_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made_start, tmp_path / "start"))


@pytest.mark.parametrize("make", HOSTILE_STATES)
def test_no_run_begins_with_weights_that_run_code(
    start: Path, tmp_path: Path, marker: Path, make: Callable[[Path, Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(start / "step_00000000" / "model.pt", marker)
    sign(start / "step_00000000")
    line = refusal_of(["train", "--init_from", str(start)], tmp_path, capsys)
    assert "step_00000000/model.pt: " in line


def test_no_run_begins_with_a_config_of_objects(
    start: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (start / "config.yaml").write_text(yaml_exploit(marker), encoding="utf-8")
    line = refusal_of(["train", "--init_from", str(start)], tmp_path, capsys)
    assert "config.yaml: could not determine a constructor for the tag" in line


@pytest.fixture(scope="module")
def made_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    export_to_huggingface(debug_model(), tokenizer_json().files(), folder)
    return folder


@pytest.fixture
def llama(made_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made_llama, tmp_path / "llama"))


def import_refused(llama: Path, capsys: pytest.CaptureFixture[str]) -> str:
    return refusal_of(["import", str(llama), "--name", "stranger"], llama.parent, capsys)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_not_imported(
    llama: Path, marker: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama / "model.safetensors").unlink()
    pickled(llama / name, marker)
    line = import_refused(llama, capsys)
    assert "is a pickle" in line if name.endswith("bin") else "model.safetensors: cannot be" in line


@pytest.mark.parametrize("file", ["../../stolen.safetensors", "/etc/passwd", "..", "a\0b", 3])
def test_an_index_names_no_file_outside_of_its_folder(
    llama: Path, file: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": file}}), encoding="utf-8"
    )
    assert "is no name of a file in the folder" in import_refused(llama, capsys)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10])
def test_a_header_of_overflowing_length_is_refused(
    llama: Path, length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(length.to_bytes(8, "little") + weights.read_bytes()[8:])
    assert "model.safetensors: cannot be read" in import_refused(llama, capsys)


@pytest.mark.parametrize("offsets", [[0, 2**63], [-1, 4], [8, 4]])
def test_a_header_whose_tensors_lie_outside_of_the_file_is_refused(
    llama: Path, offsets: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    header = json.dumps(
        {"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": offsets}}
    ).encode()
    (llama / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors: cannot be read" in import_refused(llama, capsys)


@pytest.mark.parametrize(("key", "value"), [
    ("num_hidden_layers", 10**9), ("hidden_size", 2**40), ("vocab_size", 2**62),
    ("max_position_embeddings", 10**12), ("intermediate_size", -1),
    ("hidden_size", float("inf")), ("rope_theta", "x"), ("num_attention_heads", []),
])
def test_sizes_that_fill_the_memory_are_refused(
    llama: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    (llama / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    assert "config.json: " in import_refused(llama, capsys)


def test_token_ids_far_beyond_the_vocabulary_are_refused(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads((llama / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(told["model"]["vocab"], key=told["model"]["vocab"].__getitem__)
    told["model"]["vocab"][last] = 2**31
    (llama / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    assert "tokenizer.json: has token ids up to" in import_refused(llama, capsys)


def test_a_pipe_is_not_waited_for(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (llama / "config.json").unlink()
    os.mkfifo(llama / "config.json")
    assert "config.json: is no file" in import_refused(llama, capsys)


# YAML.


def yaml_exploit(marker: Path) -> str:
    """Return YAML that makes a folder where it is read with its object tags."""
    text = f"model: !!python/object/apply:os.mkdir ['{marker}']\n"
    works(lambda: yaml.unsafe_load(text), marker)
    return text


@pytest.mark.parametrize("tag", [
    "!!python/object/apply:os.mkdir ['{marker}']",
    "!!python/object/new:os.mkdir ['{marker}']",
])
def test_a_config_makes_no_objects(tmp_path: Path, marker: Path, tag: str) -> None:
    text = "model: " + tag.format(marker=marker)
    works(lambda: yaml.unsafe_load(text), marker)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"could not determine a constructor for the tag"):
        read_yaml(tmp_path / "config.yaml")


def test_values_on_the_command_line_make_no_objects(
    tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = yaml_exploit(marker).partition(" ")[2].strip()
    line = refusal_of(["plan", "--training.max_steps", value], tmp_path, capsys)
    assert "training.max_steps" in line


def test_a_recipe_makes_no_objects(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    conf = Path(shutil.copytree(groups.CONF_DIR, tmp_path / "conf"))
    monkeypatch.setattr(groups, "CONF_DIR", conf)
    (conf / "data" / "stranger.yaml").write_text(yaml_exploit(marker), encoding="utf-8")
    line = refusal_of(["plan", "--data", "stranger"], tmp_path, capsys)
    assert "stranger.yaml: could not determine a constructor" in line


def test_a_sweeps_result_makes_no_objects(
    tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "hparams.yaml"
    found.write_text(yaml_exploit(marker), encoding="utf-8")
    line = refusal_of(["plan", "--hparams", str(found)], tmp_path, capsys)
    assert "hparams.yaml: could not determine a constructor" in line


def own_code(folder: Path, marker: Path) -> dict[str, str]:
    """Return a source whose schema makes a folder when it is imported."""
    code = folder / "schema.py"
    code.write_text(f"import os\nos.mkdir({str(marker)!r})\n", encoding="utf-8")
    return {"name": "own", "kind": "general", "to_document": f"{code}:document",
            "path": str(folder / "rows.jsonl")}


@pytest.mark.parametrize("key", ["training.data.own_sources", "data.own_sources"])
def test_a_sweeps_result_names_no_code(tmp_path: Path, marker: Path, key: str) -> None:
    source = own_code(tmp_path, marker)
    at = {"optimizer": "adamw", "parametrisation": "standard", "base_width": 64, "base_depth": 2,
          "base_head_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "tokens_per_step": 1,
          "tokens": 1}
    told = {"values": {key: json.dumps([source])}, "found_at": at, "promotable": True,
            "study": "s", "sweep_run_id": "r", "git_commit": "c", "recipe": "embedded",
            "data_fingerprint": "d"}
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"values.{key}: names code to run"):
        read_hyperparameters(tmp_path / "hparams.yaml")


def test_aliases_of_aliases_are_not_unfolded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bomb.yaml: has an alias"):
        read_yaml(tmp_path / "bomb.yaml")


# Caches and data.


def write_part(folder: Path, **arrays: Any) -> Path:
    """Write a tokenised part, as `tokenise` does, with arrays in place of its own."""
    folder.mkdir()
    np.arange(6, dtype=np.uint16).tofile(folder / "00000.tokens")
    own = {"lengths": np.array([2, 4], np.uint32), "text_bytes": np.array([2, 4], np.uint32)}
    np.savez(folder / "00000.npz", **{**own, **arrays})
    (folder / "part.json").write_text(json.dumps({
        "documents": 2, "tokens": 6, "sha256": "0" * 64, "dtype": "uint16", "dropped_rows": 0,
        "named_rows": [], "identity": {},
    }), encoding="utf-8")
    return folder


def test_a_cache_of_objects_is_not_unpickled(tmp_path: Path, marker: Path) -> None:
    objects = np.array([Exploit(marker), 1], dtype=object)
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    works(lambda: np.load(tmp_path / "objects.npy", allow_pickle=True), marker)
    part = write_part(tmp_path / "part", text_bytes=objects)
    with pytest.raises(DataError, match=r"00000.npz: Object arrays cannot be loaded"):
        TokenisedPart(part).text_bytes  # noqa: B018
    with pytest.raises(DataError, match=r"00000.npz: Object arrays cannot be loaded"):
        TokenisedPart(write_part(tmp_path / "other", lengths=objects))
    with pytest.raises(DataError, match=r"objects.npy: damaged"):
        _leaks(str(tmp_path / "objects.npy"))


def test_hashes_of_evaluation_sets_that_vanish_are_not_taken_for_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.npy: damaged \(No such file or directory\)"):
        _leaks(str(tmp_path / "gone.npy"))


def test_a_pickle_in_place_of_an_index_is_not_unpickled(tmp_path: Path, marker: Path) -> None:
    part = write_part(tmp_path / "part")
    pickled(part / "00000.npz", marker)
    with pytest.raises(DataError, match=r"00000.npz: "):
        TokenisedPart(part)


@pytest.mark.parametrize("changes", [{"dtype": "O"}, {"dtype": "object"}, {"dtype": "float64"},
                                     {"sha256": None}, {"documents_": 1}])
def test_shards_are_mapped_as_token_ids_only(tmp_path: Path, changes: dict[str, Any]) -> None:
    part = write_part(tmp_path / "part")
    assert len(TokenisedPart(part).lengths) == 2
    told = json.loads((part / "part.json").read_text(encoding="utf-8"))
    (part / "part.json").write_text(json.dumps({**told, **changes}), encoding="utf-8")
    with pytest.raises(DataError, match=r"damaged"):
        TokenisedPart(part)


def test_an_index_that_says_more_than_its_shards_hold_is_refused(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part", lengths=np.array([2, 2**31], np.uint32))
    with pytest.raises(DataError, match=r"not as long as the index says"):
        TokenisedPart(part)


@pytest.mark.parametrize("first", [b'{"text": "', b""])
def test_a_compressed_line_without_end_is_not_unpacked_whole(
    tmp_path: Path, first: bytes
) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as stream:
        stream.write(first)
        for _ in range(70):
            stream.write(b" " * 2**20)
    assert bomb.stat().st_size < 2**20
    with pytest.raises(DataError, match=r"bomb.jsonl.gz:1: a line of more than 64 MiB"):
        list(read_chunks(bomb))


def test_a_compressed_array_is_not_unpacked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LARGEST_ARRAY_BYTES == 2**30
    monkeypatch.setattr("svend.data.records.LARGEST_ARRAY_BYTES", 2**20)
    bomb = tmp_path / "bomb.json.gz"
    with gzip.open(bomb, "wb") as stream:
        stream.write(b"[" + b" " * 2**22 + b"]")
    with pytest.raises(DataError, match=r"a JSON array of more than 1 MiB"):
        list(read_chunks(bomb))


# The registry.


@pytest.fixture(scope="module", autouse=True)
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("registry")
    with store(folder):
        MlflowClient().search_experiments()  # makes the store
        yield folder


def register(folder: Path, model: str, changes: dict[str, bytes] | None = None) -> Path:
    """Register a debug model whose files, changes included, are all on record; return their folder.

    What an attacker does who has a registry of their own.
    """
    source = folder / model
    source.mkdir()
    config = load_config({}, list(DEBUG_OVERRIDES.items()))
    (source / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    save_file(debug_model().state_dict(), source / "model.safetensors")
    tokenizer_json().save(source)
    for name, content in (changes or {}).items():
        (source / name).write_bytes(content)
    client = MlflowClient()
    experiment = mlflow.set_experiment("strangers").experiment_id
    run_id = client.create_run(experiment).info.run_id
    moves = Moves.open(model, "made by a test")
    sha256 = file_digest(source / "model.safetensors")
    registered = register_checkpoint(
        model, sorted(source.iterdir()), run_id, 7, {}, {"svend.checkpoint_sha256": sha256}, "made",
    )
    moves.add(Move(
        kind=MoveKind.REGISTERED, version=registered.version, run_id=run_id,
        registration=Registration(checkpoint_sha256=sha256, data_fingerprint="d" * 64,
                                  tokenizer_sha256="e" * 64, step=7, files=registered.files),
    ))
    shutil.rmtree(source)
    return open_version(f"models:/{model}/1").folder


def commands_on(model: str) -> dict[str, list[str]]:
    return {
        "evaluate": ["evaluate", "--model", f"models:/{model}/1"],
        "promote": ["promote", "--model", model, "--version", "1", "--to", "quick"],
        "serve": ["serve", f"models:/{model}/1", "--port", "18763"],
        "export": ["export", f"models:/{model}/1"],
        "train": ["train", "--init_from", f"models:/{model}/1"],
    }


def replace_file(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def version_folder(registry: Path) -> Path:
    return register(registry, "svend-honest")


@pytest.fixture
def honest(version_folder: Path) -> Iterator[Path]:
    """The files of a version of svend-honest, for one test alone."""
    kept = {path.name: path.read_bytes() for path in version_folder.iterdir()}
    yield version_folder
    for path in version_folder.iterdir():
        path.unlink()
    for name, content in kept.items():
        (version_folder / name).write_bytes(content)


@pytest.mark.parametrize(("command", "name"), [
    ("evaluate", "model.safetensors"), ("evaluate", "MLmodel"), ("promote", "model.safetensors"),
    ("serve", "tokenizer.json"), ("serve", "MLmodel"), ("export", "config.yaml"),
    ("train", "model.safetensors"), ("train", "config.yaml"),
])
def test_a_version_whose_file_was_replaced_is_not_opened(
    registry: Path, honest: Path, marker: Path, command: str, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (honest / name).unlink()  # and not written over: the store may have links
    pickled(honest / name, marker)
    line = refusal_of(commands_on("svend-honest")[command], registry, capsys)
    assert f"{name} has the hash" in line


def test_what_was_laid_beside_a_versions_files_is_never_read(honest: Path, marker: Path) -> None:
    for name in ("model.pt", "python_model.pkl", "pytorch_model.bin", "model.pkl"):
        pickled(honest / name, marker)
    (honest / "sitecustomize.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    assert load_version("models:/svend-honest/1").sha256


def test_a_link_out_of_a_versions_folder_is_not_followed_to_other_content(
    registry: Path, honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (honest / "tokenizer.json").unlink()
    (honest / "tokenizer.json").symlink_to(tmp_path / "secret")
    line = refusal_of(commands_on("svend-honest")["export"], registry, capsys)
    assert "tokenizer.json has the hash" in line


def test_a_registered_pickle_is_no_version(
    registry: Path, marker: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_of(request)
    hostile = pickle.dumps(Exploit(marker))
    register(registry, model, {"model.safetensors": hostile, "python_model.pkl": hostile})
    for command, arguments in commands_on(model).items():
        if command != "promote":  # which finds no measurement, and measures nothing here
            line = refusal_of(arguments, registry, capsys)
            assert "model.safetensors: cannot be read" in line, command


def test_a_registered_config_makes_no_objects(
    registry: Path, marker: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_of(request)
    register(registry, model, {"config.yaml": yaml_exploit(marker).encode()})
    for command, arguments in commands_on(model).items():
        line = refusal_of(arguments, registry, capsys)
        assert "config.yaml: could not determine a constructor" in line, command


def test_a_factory_that_a_registered_config_names_is_run_only_where_it_is_given_by_hand(
    registry: Path, tmp_path: Path, marker: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_of(request)
    code = own_code(tmp_path, marker)["to_document"]
    config = load_config({}, [*DEBUG_OVERRIDES.items(), ("model_factory", code)])
    register(registry, model, {"config.yaml": to_yaml(config).encode()})
    commands = commands_on(model)
    del commands["train"], commands["promote"]  # takes the weights alone; begins a run of its own
    # Leave to read data by one's own code is none to make a model by it.
    commands["of other code"] = [*commands["evaluate"], "--data.own_sources", "[]"]
    for command, arguments in commands.items():
        line = refusal_of(arguments, registry, capsys)
        assert "is not run unasked; if you trust it, give --model_factory" in line, command
    assert not marker.exists()
    with pytest.raises(ConfigError, match=r"cannot be loaded"):  # has no such function: it was run
        load_version(f"models:/{model}/1", [("model_factory", code)])
    marker.rmdir()


def test_code_that_a_registered_config_names_is_run_only_where_it_is_given_by_hand(
    registry: Path, tmp_path: Path, marker: Path, request: pytest.FixtureRequest,
) -> None:
    model = model_of(request)
    source = own_code(tmp_path, marker)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    given = [("data.sources", "[own]"), ("data.own_sources", json.dumps([source])),
             ("data.mix_ratios", "{general: 1.0}"),
             ("data.cache_dir", str(tmp_path / "cache"))]
    config = load_config({}, [*DEBUG_OVERRIDES.items(), *given])
    register(registry, model, {"config.yaml": to_yaml(config).encode()})
    loaded = load_version(f"models:/{model}/1")
    with pytest.raises(ConfigError, match=r"schema.py:document .* is not run unasked"):
        build_version_corpus(loaded, print)
    assert not marker.exists()
    with pytest.raises(ConfigError, match=r"cannot be loaded"):  # has no such function: it was run
        build_version_corpus(load_version(f"models:/{model}/1", given), print)
    marker.rmdir()
