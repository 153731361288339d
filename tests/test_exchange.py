"""To Hugging Face and back: the same logits, the same tokens, and nothing read that is not data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from svend import __version__
from svend.data.documents import Message, Role, conversation, dump_json
from svend.data.tokenizer import DocumentTokenizer, load_tokenizer, train_tokenizer
from svend.errors import CheckpointError, ConfigError, UserError
from svend.evaluation.heldout import measure_heldout_loss
from svend.models.generation import Decoder, PlainTurn, Request
from svend.models.huggingface import export_to_huggingface, import_from_huggingface
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.config import Precision, load_config
from svend.pipeline.exchange import export_version, import_folder
from svend.pipeline.init_from import find_starting_point
from svend.pipeline.runner import ScaleRunner
from svend.pipeline.version_files import WEIGHTS, write_weights
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache
from tests.registry import store

SAID = conversation((Role.USER, "What is 3 * 4? é €"), (Role.ASSISTANT, "The answer is #### 12"))
TOKENIZER = train_tokenizer([SAID] * 3, 400)


def _llama(folder: Path, *, vocab_size: int = 0, tokenizer: DocumentTokenizer = TOKENIZER,
           shard: str | None = None, **changes: Any) -> LlamaForCausalLM:
    """Write a Llama with random weights as transformers does, with a tokenizer beside it."""
    torch.manual_seed(1)
    settings = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
                "max_position_embeddings": 64, "vocab_size": vocab_size or tokenizer.size,
                "initializer_range": 0.3, **changes}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer.save(folder)
    return model


def _logits(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens_BT)
    logits: torch.Tensor = getattr(out, "logits", out)
    return logits


@pytest.mark.parametrize(("shard", "changes"), [
    (None, {}), (None, {"tie_word_embeddings": True}), ("40KB", {}),
    (None, {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default",
                                                          "rope_theta": 5e5}}),
])
def test_an_import_computes_what_the_llama_does(
    tmp_path: Path, shard: str | None, changes: dict[str, Any]
) -> None:
    theirs = _llama(tmp_path, shard=shard, **changes)
    assert (shard is None) == (tmp_path / "model.safetensors").is_file()
    ours = import_from_huggingface(tmp_path, "own", theirs.config.vocab_size).eval()
    tokens_BT = torch.randint(theirs.config.vocab_size, (2, 40),
                              generator=torch.Generator().manual_seed(0))
    difference = (_logits(ours, tokens_BT) - _logits(theirs, tokens_BT)).abs().max()
    assert float(difference) < 1e-4
    longer = import_from_huggingface(tmp_path, "own", theirs.config.vocab_size + 50).eval()
    known_BTV = _logits(longer, tokens_BT)[..., : theirs.config.vocab_size]
    assert float((known_BTV - _logits(theirs, tokens_BT)).abs().max()) < 1e-4
    assert torch.equal(longer.head.weight[-1], longer.head.weight[:-50].mean(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with a registered version of the debug model, trained in this process."""
    folder = tmp_path_factory.mktemp("exchange")
    with store(folder):
        result = ScaleRunner(_config(folder)).run()
        assert result.success, result.reason
        yield folder


def _config(folder: Path, **changes: str) -> Any:
    return load_config({}, list({
        **DEBUG_OVERRIDES, "training.max_steps": "20", "training.save_steps": "20",
        "training.compile": "off",
        "checkpoint_dir": str(folder / "checkpoints"), "data.cache_dir": str(data_cache()),
        **changes,
    }.items()))


def test_an_exported_version_speaks_in_transformers_as_it_does_here(
    trained: Path, tmp_path: Path
) -> None:
    folder = export_version("models:/svend-debug@standard", tmp_path / "out", "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = find_starting_point("models:/svend-debug@standard")
    ours = _ours(loaded.weights)
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is 3 * 4? é"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                        return_dict=False)
    own = load_tokenizer(str(loaded.tokenizer), 2**32)
    assert ids == own.encode_prompt([Message(Role.SYSTEM, "Be brief."),
                                     Message(Role.USER, "What is 3 * 4? é")])
    tokens_BT = torch.tensor([ids])
    assert float((_logits(ours, tokens_BT) - _logits(theirs, tokens_BT)).abs().max()) < 1e-4
    said = theirs.generate(tokens_BT, max_new_tokens=16, do_sample=False, eos_token_id=None,
                           attention_mask=torch.ones_like(tokens_BT))[0, len(ids):].tolist()
    decoder = Decoder(ours, lanes=1, max_length=128, precision=Precision.FP32)
    (completion,) = decoder.generate([Request(ids, PlainTurn(16))])
    assert completion.tokens == said
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "gate.standard.perplexity" in card
    assert f"Trained by Svend {__version__}, exported by Svend {__version__}." in card
    with pytest.raises(ConfigError, match="is there already"):
        export_version("models:/svend-debug@standard", folder, "fp32")
    assert trained.is_dir()


def _ours(weights: Path) -> ReasoningTransformer:
    from svend.models.config import TransformerConfig

    config = load_config({}, list(DEBUG_OVERRIDES.items()))
    assert config.model is not None
    model = ReasoningTransformer(TransformerConfig.from_model_config(config.model))
    model.load_state_dict(load_file(weights))
    return model.eval()


def test_the_template_writes_tools_and_calls_as_we_do(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tools = [{"name": "calculate", "description": "Adds.", "parameters": {"type": "object"}}]
    call = {"name": "calculate", "arguments": {"expression": "3 * 4"}}
    ids = theirs.apply_chat_template(
        [{"role": "user", "content": "What is 3 * 4?"},
         {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
         {"role": "tool", "content": "12"}],
        tools=tools, add_generation_prompt=True, return_dict=False,
    )
    assert ids == TOKENIZER.encode_prompt([
        Message(Role.TOOLS, dump_json(tools)), Message(Role.USER, "What is 3 * 4?"),
        Message(Role.TOOL_CALL, dump_json(call)), Message(Role.TOOL, "12"),
    ])


def test_what_was_exported_comes_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = import_from_huggingface_of(tmp_path / "a")
    export_to_huggingface(model, TOKENIZER.files(), tmp_path / "b")
    again = import_from_huggingface(tmp_path / "b", "own", model.config.vocab_size)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(),
                                       strict=True):
        assert torch.equal(one, other), name
    assert again.config == model.config


def import_from_huggingface_of(folder: Path) -> ReasoningTransformer:
    """Return the import of a random Llama."""
    return import_from_huggingface(folder, "own", _llama(folder).config.vocab_size)


def test_an_import_is_a_checkpoint_that_trains_on(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "llama"
    plain = train_tokenizer([SAID] * 3, 300)
    theirs = _llama(source, tokenizer=plain, vocab_size=plain.size + 3, max_position_embeddings=256)
    place = import_folder(source, "own-llama", tmp_path / "own-llama")
    (checkpoint,) = CheckpointManager(place).list_checkpoints()
    assert checkpoint.step == 0
    start = find_starting_point(str(place))
    settings = dict(start.settings(str(trained / "cache")))
    overrides = {**DEBUG_OVERRIDES, "training.compile": "off",
                 "training.max_steps": "8", "training.save_steps": "8",
                 "training.precision": "fp32", "training.learning_rate": "1e-3",
                 "strict_validation": "false",
                 "checkpoint_dir": str(tmp_path / "checkpoints"),
                 "data.cache_dir": str(data_cache())}
    config = load_config({}, list({**overrides, **settings}.items()))
    result = ScaleRunner(config).run()
    assert result.success, result.reason
    client = mlflow.MlflowClient()
    run = client.get_run(str(result.run_id))
    assert run.data.tags["svend.init_sha256"] == checkpoint.weights_sha256
    history = client.get_metric_history(str(result.run_id), "eval/heldout_loss")
    # The first loss is that of the very weights, and it falls.
    assert history[0].step == 0
    assert history[-1].value < history[0].value
    assert _heldout_loss(config, import_from_huggingface(
        source, "own", theirs.config.vocab_size)) == pytest.approx(history[0].value, rel=1e-4)


def _heldout_loss(config: Any, model: ReasoningTransformer) -> float:
    from svend.data.corpus import build_corpus
    from svend.data.stream import PackedSequences

    training = config.training
    corpus = build_corpus(training.data, config.model.vocab_size, training.seed, lambda _: None)
    sequences = PackedSequences(corpus.heldout, training.data, training.seed)
    return measure_heldout_loss(
        model, sequences.first(training.heldout_sequences), Precision.FP32, torch.device("cpu")
    ).loss


@pytest.mark.slow
def test_a_version_may_be_trained_on(trained: Path) -> None:
    start = find_starting_point("models:/svend-debug@standard")
    config = _config(trained, **dict(start.settings(str(trained / "cache"))))
    result = ScaleRunner(config).run()
    assert result.success, result.reason
    run = mlflow.MlflowClient().get_run(str(result.run_id))
    assert run.data.tags["svend.init_from"] == "models:/svend-debug/1"


@pytest.mark.slow
def test_weights_of_another_shape_or_meaning_are_refused(trained: Path) -> None:
    wide = _config(trained, **{"model.hidden_size": "128",
                               "init_from": "models:/svend-debug@standard"})
    result = ScaleRunner(wide).run()
    assert not result.success
    assert "was made with model.hidden_size = 64, now it is 128" in str(result.reason)
    other = _config(trained, **{"training.parametrisation": "completep",
                                "init_from": "models:/svend-debug@standard"})
    assert "the weights mean something else then" in str(ScaleRunner(other).run().reason)
    start = find_starting_point("models:/svend-debug@standard")
    same = dict(start.settings(str(trained / "cache")))
    turned = _config(trained, **{**same, "model.rope_theta": "5000.0"})
    assert "was made with model.rope_theta" in str(ScaleRunner(turned).run().reason)
    spoken = _config(trained, **{**same, "training.data.tokenizer": "train",
                                 "data.num_samples": "150"})
    assert "training.data.tokenizer is another" in str(ScaleRunner(spoken).run().reason)
    with pytest.raises(UserError, match="has no checkpoint"):
        find_starting_point(str(trained / "nowhere"))


def _change(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        told = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({k: v for k, v in told.items() if v != "gone"}),
                        encoding="utf-8")

    return spoil


def _climb_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))


def _poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("spoil", "named"), [
    (_change(model_type="qwen2"), "model_type qwen2 is not of the Llama family"),
    (_change(attention_bias=True), "attention_bias = True, must be False"),
    (_change(hidden_act="gelu"), "hidden_act = gelu, must be silu"),
    (_change(rope_parameters={"rope_type": "yarn"}), "rope_type = yarn, must be default"),
    (_change(rope_parameters=[1]), "rope_parameters is no object"),
    (_change(rope_parameters={"rope_theta": 7.0}, rope_theta=8.0), "and 7.0 in rope_parameters"),
    (_change(model_type="mistral"), "sliding_window is not stated"),
    (_change(num_attention_heads=0), "a size is below 1"),
    (_change(head_dim=32), "head_dim = 32, must be hidden_size / num_attention_heads"),
    (_change(hidden_size="gone"), "has no hidden_size"),
    (_change(intermediate_size=96), "by config.json it must be"),
    (_change(num_hidden_layers=1), "which a Llama has not"),
    (_change(num_hidden_layers=3), "has no tensor model.layers.2"),
    (_climb_out, "'../outside.safetensors' is no name of a file in the folder"),
    (_pickle, "pytorch_model.bin is a pickle, which could run code and is not read"),
    (_truncate, "cannot be read"), (_poison, "must hold finite numbers"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot be read"),
])
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    _llama(tmp_path / "llama")
    spoil(tmp_path / "llama")
    with pytest.raises(CheckpointError) as raised:
        import_folder(tmp_path / "llama", "own", tmp_path / "own")
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "own").exists()


def test_a_scales_name_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a scale's"):
        import_folder(tmp_path, "svend-tiny-50m", None)


def test_tied_and_turned_weights_become_safetensors_that_others_may_read(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    state = {"a": shared, "b": shared.T, "c": shared[1]}
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "model.pt").chmod(0o644)
    write_weights(tmp_path / "model.pt", tmp_path / WEIGHTS)
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o644
    written = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    torch.save({"a": shared, "n": 3}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="n is no tensor"):
        write_weights(tmp_path / "model.pt", tmp_path / WEIGHTS)
