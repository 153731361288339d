"""To a folder that Hugging Face's `AutoModelForCausalLM` and `AutoTokenizer` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def export_to_huggingface(
    model: ReasoningTransformer, tokenizer_files: Mapping[str, str] | None, folder: Path
) -> None:
    """Write the model as a Llama into a folder, which is made where it is not there.

    tokenizer_files: the content of the tokenizer's files by name, as `DocumentTokenizer.files`
    gives them; its end and padding tokens become the model's. The weights keep their type, and take
    up the multipliers of the parametrisation, which a Llama has not.
    """
    from safetensors.torch import save_file  # not needed by who only trains

    folder.mkdir(parents=True, exist_ok=True)
    files = dict(tokenizer_files or {})
    config = llama_config(model, special_ids(files))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    weights = {
        huggingface_name(name): weight.cpu().contiguous()
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
