"""To and from a folder that Hugging Face's `AutoModelForCausalLM` and `AutoTokenizer` read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svend.errors import CheckpointError, reason_of
from svend.models.config import TransformerConfig
from svend.models.parametrisation import fold_multipliers
from svend.models.transformer import ReasoningTransformer

# Parts of our parameters' names, and what they are called in Hugging Face's Llama. In this order:
# "attention." is in "attention_norm." no more once that has been renamed.
NAMES = {
    "embedding.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    ".attention_norm.": ".input_layernorm.",
    ".feed_forward_norm.": ".post_attention_layernorm.",
    ".attention.": ".self_attn.",
    ".feed_forward.": ".mlp.",
    "final_norm.": "model.norm.",
    "head.": "lm_head.",
}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Of any dimension, so that no product of two overflows.
LARGEST_SIZE = 2**24
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What Mistral's own defaults would set otherwise than Llama's.
MISTRAL_STATES = ("sliding_window", "num_key_value_heads")
# What a Llama may have and ours has not: each must be as it is where it is left out.
REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "rope_scaling": None, "sliding_window": None, "quantization_config": None,
            "partial_rotary_factor": 1.0}


def export_to_huggingface(
    model: ReasoningTransformer, tokenizer_files: Mapping[str, str] | None, folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as a Llama into a folder, which is made where it is not there.

    tokenizer_files: the content of the tokenizer's files by name, as `DocumentTokenizer.files`
    gives them; its end and padding tokens become the model's. The weights take up the multipliers
    of the parametrisation, which a Llama has not, and are then rounded to `dtype`; None keeps
    theirs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(tokenizer_files or {})
    dtype = dtype or model.head.weight.dtype
    config = llama_config(model, special_ids(files)) | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    weights = {
        huggingface_name(name): weight.to("cpu", dtype).contiguous()
        for name, weight in fold_multipliers(model)
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def huggingface_name(name: str) -> str:
    """Return what Hugging Face's Llama calls one of our parameters."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def llama_config(model: ReasoningTransformer, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the content of `config.json`; `ids` as `special_ids` gives them."""
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        # Twice: transformers 5 reads the second, what is older the first.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": str(model.head.weight.dtype).removeprefix("torch."),
        # None rather than left out: Llama's own defaults are other tokens.
        "bos_token_id": None,
        **ids,
    }


def special_ids(tokenizer_files: Mapping[str, str]) -> dict[str, int | None]:
    """Return the ids of the end and padding tokens that a tokenizer's files name, None for none."""
    ids: dict[str, int | None] = {"eos_token_id": None, "pad_token_id": None}
    if "tokenizer.json" in tokenizer_files and "tokenizer_config.json" in tokenizer_files:
        added = json.loads(tokenizer_files["tokenizer.json"])["added_tokens"]
        by_content = {token["content"]: int(token["id"]) for token in added}
        named = json.loads(tokenizer_files["tokenizer_config.json"])
        for kind in ("eos", "pad"):
            ids[f"{kind}_token_id"] = by_content.get(named.get(f"{kind}_token"))
    return ids


def import_from_huggingface(folder: Path, name: str, vocab_size: int) -> ReasoningTransformer:
    """Return the model in a folder of the Llama family, in fp32, as one of ours.

    vocab_size: entries of the embedding, at least the folder's own; those that are added begin as
    the mean of the others, in the head too. A tied head becomes a matrix of its own. Raises
    CheckpointError, in one line, for what is none, or has what ours has not.
    """
    config, tied = read_architecture(folder, name), _is_tied(folder)
    known = config.vocab_size
    if vocab_size < known:
        raise CheckpointError(
            f"{folder}: has {known} entries in its vocabulary, {vocab_size} are wanted"
        )
    config.vocab_size = vocab_size
    stored = StoredTensors(folder)
    if config.num_hidden_layers > len(stored.names):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: num_hidden_layers = {config.num_hidden_layers}: the folder "
            f"has {len(stored.names)} tensors, which are too few"
        )
    with torch.device("meta"):
        model = ReasoningTransformer(config)
    state: dict[str, Tensor] = {}
    for ours, parameter in model.named_parameters():
        theirs = huggingface_name(ours)
        if tied and theirs == "lm_head.weight":
            theirs = huggingface_name("embedding.weight")  # as transformers does
        tensor = stored.read(theirs)
        if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{folder}: {theirs} must hold finite numbers in fp32, bf16, fp16 or fp64; it is "
                f"{str(tensor.dtype).removeprefix('torch.')}, or holds NaN or infinity"
            )
        tensor = tensor.float()
        if ours in ("embedding.weight", "head.weight") and len(tensor) == known < vocab_size:
            mean_1D = tensor.mean(dim=0, keepdim=True)
            tensor = torch.cat((tensor, mean_1D.expand(vocab_size - known, -1)))
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {theirs} is {tuple(tensor.shape)}, by {CONFIG_FILE} it must be "
                f"{tuple(parameter.shape)}"
            )
        state[ours] = tensor.clone() if tied else tensor.contiguous()
    stored.refuse_others({huggingface_name(ours) for ours, _ in model.named_parameters()})
    model.load_state_dict(state, assign=True)
    return model


def read_architecture(folder: Path, name: str) -> TransformerConfig:
    """Return the architecture that a folder describes, as one of ours.

    Raises CheckpointError, in one line, for one of another family, or with what ours has not.
    """
    return _our_config(_read_json(folder / CONFIG_FILE), name, folder / CONFIG_FILE)


def _is_tied(folder: Path) -> bool:
    return bool(_read_json(folder / CONFIG_FILE).get("tie_word_embeddings", False))


class StoredTensors:
    """The safetensors of a folder, one file or several with an index, read one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        if (folder / INDEX_FILE).is_file():
            placed = _read_json(folder / INDEX_FILE).get("weight_map")
            if not isinstance(placed, dict):
                raise CheckpointError(f"{folder / INDEX_FILE}: has no weight_map")
            for tensor, file in placed.items():
                # A name like ../../x would be read from outside of the folder.
                if (not isinstance(file, str) or Path(file).name != file or file in ("", "..")
                        or "\0" in file):
                    raise CheckpointError(
                        f"{folder / INDEX_FILE}: '{file}' is no name of a file in the folder"
                    )
                self._files[tensor] = folder / file
        elif (folder / WEIGHTS_FILE).is_file():
            self._files = dict.fromkeys(self._names_in(folder / WEIGHTS_FILE),
                                        folder / WEIGHTS_FILE)
        else:
            pickled = min(folder.glob("*.bin"), default=None)
            raise CheckpointError(
                f"{folder}: has no {WEIGHTS_FILE}" + (
                    "" if pickled is None else f"; {pickled.name} is a pickle, which could run "
                    "code and is not read: save the model with safe_serialization=True"
                )
            )

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """Return a tensor. Raises CheckpointError if there is none of that name."""
        path = self._files.get(name)
        if path is None:
            raise CheckpointError(f"{self._folder}: has no tensor {name}")
        tensor: Tensor = self._open(path, lambda file: file.get_tensor(name))
        return tensor

    def refuse_others(self, known: set[str]) -> None:
        """Raise CheckpointError if there are tensors that the model has no place for."""
        others = sorted(name for name in self.names - known if "rotary_emb" not in name)
        if others:
            raise CheckpointError(
                f"{self._folder}: has the tensor {others[0]}, which a Llama has not"
                + (f", and {len(others) - 1} more" if len(others) > 1 else "")
            )

    def _names_in(self, path: Path) -> list[str]:
        names: list[str] = self._open(path, lambda file: list(file.keys()))
        return names

    def _open(self, path: Path, look: Callable[[Any], Any]) -> Any:
        try:
            with safe_open(path, framework="pt") as file:
                return look(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({reason_of(error)})") from None


def _our_config(told: Mapping[str, Any], name: str, path: Path) -> TransformerConfig:
    """Return the architecture that a `config.json` of the Llama family describes."""
    kind = told.get("model_type")
    if kind not in ("llama", "mistral"):
        raise CheckpointError(f"{path}: model_type {kind} is not of the Llama family that is read "
                              "(llama, or mistral without a sliding window)")
    for key, wanted in REQUIRED.items():
        if told.get(key, wanted) != wanted:
            raise CheckpointError(f"{path}: {key} = {told[key]}, must be {wanted} or left out")
    unsaid = [key for key in MISTRAL_STATES if kind == "mistral" and key not in told]
    if unsaid:
        raise CheckpointError(f"{path}: {unsaid[0]} is not stated, and Mistral's own default is "
                              "not Llama's; state it")
    rotary = told.get("rope_parameters") or {}
    if not isinstance(rotary, dict):
        raise CheckpointError(f"{path}: rope_parameters is no object")
    for key, wanted in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
        if rotary.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{path}: rope_parameters.{key} = {rotary[key]}, must be {wanted}"
            )
    both = {"rope_theta"} <= told.keys() & rotary.keys()
    if both and rotary["rope_theta"] != told["rope_theta"]:
        raise CheckpointError(f"{path}: rope_theta is {told['rope_theta']}, and "
                              f"{rotary['rope_theta']} in rope_parameters")
    try:
        hidden, heads = int(told["hidden_size"]), int(told["num_attention_heads"])
        config = TransformerConfig(
            name=name,
            hidden_size=hidden,
            num_hidden_layers=int(told["num_hidden_layers"]),
            num_attention_heads=max(1, heads),
            num_key_value_heads=int(told.get("num_key_value_heads") or max(1, heads)),
            intermediate_size=int(told["intermediate_size"]),
            vocab_size=int(told["vocab_size"]),
            max_position_embeddings=int(told.get("max_position_embeddings", 2048)),
            rope_theta=float(rotary.get("rope_theta", told.get("rope_theta", 10000.0))),
            rms_norm_eps=float(told.get("rms_norm_eps", 1e-6)),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error.args[0]}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_sizes(config, path)
    if heads < 1:
        raise CheckpointError(f"{path}: a size is below 1: num_attention_heads")
    head_size = told.get("head_dim") or hidden // heads
    if hidden % heads or head_size != hidden // heads:
        raise CheckpointError(f"{path}: head_dim = {head_size}, must be hidden_size / "
                              f"num_attention_heads, {hidden} / {heads}")
    return config


def _check_sizes(config: TransformerConfig, path: Path) -> None:
    """Raise CheckpointError for numbers that no model of this world has."""
    sizes = (config.hidden_size, config.heads, config.kv_heads, config.ffn_size,
             config.num_hidden_layers, config.vocab_size, config.max_position_embeddings)
    if not (min(sizes) >= 1 and max(sizes) <= LARGEST_SIZE):
        raise CheckpointError(f"{path}: a size is below 1 or above {LARGEST_SIZE}")
    for key, number in (("rope_theta", config.rope_theta), ("rms_norm_eps", config.rms_norm_eps)):
        if not (number > 0 and math.isfinite(number)):
            raise CheckpointError(f"{path}: {key} = {number}: must be above 0")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise CheckpointError(f"{path}: is no file")
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a folder that transformers reads") from (
            None
        )
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)})") from None
    if not isinstance(told, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return told
