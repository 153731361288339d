"""To and from Hugging Face: a version becomes a folder for transformers, such a folder a start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from svend import __version__
from svend.data.chat import END_OF_MESSAGE, END_OF_TEXT
from svend.data.tokenizer import load_tokenizer
from svend.errors import CheckpointError, ConfigError, reason_of
from svend.models.huggingface import (
    WEIGHTS_FILE,
    export_to_huggingface,
    huggingface_name,
    import_from_huggingface,
    read_architecture,
    special_ids,
)
from svend.models.parametrisation import fold_multipliers
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.config import ModelScale, Parametrisation, get_model_config
from svend.pipeline.loading import CONFIG_FILE
from svend.pipeline.schema import to_tree, to_yaml
from svend.pipeline.version_evaluation import LoadedVersion, load_version
from svend.pipeline.version_files import ANY_SIZE, TOKENIZER, answering_model
from svend.pipeline.whole_files import whole_folder

VOCABULARY_MULTIPLE = 64
# That a model's embedding lacks; more make it another model's tokenizer.
MOST_ADDED_TOKENS = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_version(
    uri: str, folder: Path | None, dtype: str, model_factory: str | None = None
) -> Path:
    """Write a version as a folder that transformers reads; return the folder.

    model_factory: what made its model, where the config names such; it is run.
    It appears whole or not at all, and its weights are read back and compared. Raises UserError,
    in one line, where the folder is there already or the version is not what was registered.
    """
    given = [] if model_factory is None else [("model_factory", model_factory)]
    loaded = load_version(
        uri, [("training.device", "cpu"), ("training.precision", "fp32"), *given]
    )
    version = loaded.version
    place = folder or Path(f"{version.name}-v{version.version}-hf")
    if place.exists():
        raise ConfigError(f"folder {place}: is there already; remove it, or give another")
    model = answering_model(loaded.model, "export")
    ends = [loaded.tokenizer.control_ids[token] for token in (END_OF_MESSAGE, END_OF_TEXT)]
    generation = {**special_ids(loaded.tokenizer.files()), "eos_token_id": ends,
                  "do_sample": False}
    try:
        with whole_folder(place) as writing:
            export_to_huggingface(model, loaded.tokenizer.files(), writing, DTYPES[dtype])
            (writing / "generation_config.json").write_text(
                json.dumps(generation, indent=1) + "\n", encoding="utf-8")
            (writing / "README.md").write_text(_card(loaded), encoding="utf-8")
            written = load_file(writing / WEIGHTS_FILE)
            for name, weight in fold_multipliers(model):
                wanted = weight.to("cpu", DTYPES[dtype])
                if not torch.equal(written[huggingface_name(name)], wanted):
                    raise CheckpointError(
                        f"{writing}: {name} is not what was written; check the disk"
                    )
    except (OSError, SafetensorError) as error:
        raise _not_written("folder", place, error) from None
    return place


def _not_written(name: str, place: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{name} {place.absolute()}: cannot be written ({reason_of(error)}); choose another"
    )


def import_folder(source: Path, name: str, folder: Path | None) -> Path:
    """Make a checkpoint to begin with of a Llama-family folder; return where it is.

    Control tokens that its tokenizer lacks are added. Raises UserError, in one line, for what is
    no such folder, or has what our transformer has not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"name = {name}: must be letters, digits, '.', '_' and '-'")
    if name in {get_model_config(scale).name for scale in ModelScale}:
        raise ConfigError(f"name = {name}: is a scale's, whose registry it would enter")
    place = folder or Path("imported") / name
    if place.exists():
        raise ConfigError(f"into {place}: is there already; remove it, or give another")
    if not (source / TOKENIZER).is_file():
        raise CheckpointError(
            f"{source}: has no {TOKENIZER}; save the tokenizer with transformers' "
            "PreTrainedTokenizerFast.save_pretrained"
        )
    tokenizer = load_tokenizer(str(source / TOKENIZER), ANY_SIZE)
    known = read_architecture(source, name).vocab_size
    if tokenizer.size > known + MOST_ADDED_TOKENS:
        raise CheckpointError(
            f"{source / TOKENIZER}: has token ids up to {tokenizer.size - 1}, and the model "
            f"{known} entries; give the model's own tokenizer"
        )
    entries = known
    if tokenizer.size > known:
        entries = -(-tokenizer.size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    model = import_from_huggingface(source, name, entries)
    described = model.config.to_model_config(get_model_config(ModelScale.TINY))
    told = {"model": to_tree(described),
            "training": {"parametrisation": Parametrisation.STANDARD.value}}
    try:
        with whole_folder(place) as writing:
            CheckpointManager(writing).save(model)
            tokenizer.save(writing)
            (writing / CONFIG_FILE).write_text(to_yaml(told), encoding="utf-8")
    except OSError as error:
        raise _not_written("into", place, error) from None
    return place


def _card(loaded: LoadedVersion) -> str:
    """Return the model card: what made the version, and what it passed."""
    version = loaded.version
    verdicts = "".join(f"- `{name}`: {text}\n" for name, text in sorted(version.tags.items())
                       if name.startswith("gate."))
    facts = {
        "model": f"{version.name}, version {version.version}", "run": version.run_id,
        "checkpoint sha256": loaded.sha256, "stage": version.tags.get("svend.stage"),
        "data fingerprint": version.tags.get("svend.data_fingerprint"),
        "data recipe": loaded.config.training.data.recipe,
    }
    told = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    trained_by = version.tags.get("svend.version", "of a version not on record")
    return (
        f"# {version.name}\n\nTrained by Svend {trained_by}, exported by Svend {__version__}.\n\n"
        f"{told}\n## Gates\n\n"
        f"{verdicts or 'None decided.'}\n## Use\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(\".\")\n"
        "model = AutoModelForCausalLM.from_pretrained(\".\")\n```\n"
    )

