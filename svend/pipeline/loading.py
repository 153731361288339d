"""From `conf/` and a command line to a checked PipelineConfig, or one line that says why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svend.errors import ConfigError
from svend.pipeline.groups import CONF_DIR, GROUPS, read_group
from svend.pipeline.options.data import DataConfig
from svend.pipeline.options.pipeline import PipelineConfig
from svend.pipeline.schema import build, merge_trees, parse_value, read_yaml, to_tree

# Where things lie, how much is kept and what is looked at: a resumed run, or a sweep's worker, may
# differ in these.
MAY_CHANGE = {
    "checkpoint_dir", "checkpoint_cache_dir", "grace_seconds", "tracking_wait_seconds",
    "health.every_steps", "health.max_attention_logit", "health.min_relative_update",
    "health.min_branch_share", "health.max_spikes", "health.action", "health.patience",
    "training.data.cache_dir", "training.data.path",
    "training.data.heldout_path", "training.logging_steps", "training.on_full_disk",
    "training.micro_batch", "training.parallel", "training.profile",
    "training.save_total_limit", "training.shard_processes", "rank_timeout_seconds",
}
# The name under which a run, a version or an import keeps its resolved config.
CONFIG_FILE = "config.yaml"
# What names a Python file or module that is imported.
OWN_SOURCES, MODEL_FACTORY = "training.data.own_sources", "model_factory"
NAMES_CODE = (OWN_SOURCES, MODEL_FACTORY)


def load_config(
    groups: Mapping[str, str] | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> PipelineConfig:
    """Compose the configuration of a run.

    `groups` chooses members of `conf/scale`, `conf/data`, `conf/gates` and `conf/preset`;
    `overrides` are (dotted key, text) pairs that win over every file, where `data.` is short for
    `training.data.`. Raises ConfigError, in one line, for whatever does not fit.
    """
    tree = read_yaml(CONF_DIR / "config.yaml")
    unknown = set(groups or {}) - set(GROUPS)
    if unknown:
        raise ConfigError(f"unknown group {min(unknown)}: known: {', '.join(GROUPS)}")
    chosen = tree.pop("groups") | dict(groups or {})
    scale = read_group("scale", chosen["scale"])
    chosen.setdefault("preset", scale["preset"])
    tree = merge_trees(tree, scale)
    for group in ("data", "gates", "preset"):
        tree = merge_trees(tree, read_group(group, chosen[group]))
    for key, text in overrides:
        tree = _set(tree, key, text)
    config = build(PipelineConfig, tree)
    scale_name = config.training.model_scale.value
    if scale_name != chosen["scale"]:
        raise ConfigError(
            f"training.model_scale = {scale_name}: the scale is {chosen['scale']}; "
            f"choose it with scale={scale_name}, which sets the model too"
        )
    _name_by_sources(config.training.data, chosen["data"])
    return config.resolve()


def load_saved_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> PipelineConfig:
    """Return the resolved config that a run saved, with (dotted key, text) pairs on top."""
    tree = read_yaml(path)
    for key, text in overrides:
        tree = _set(tree, key, text)
    return build(PipelineConfig, tree).resolve()


def full_key(key: str) -> str:
    """Return a dotted key as it is in the configuration: `data.` is short for `training.data.`."""
    return f"training.{key}" if key.startswith("data.") else key


def names_code(key: str, among: Sequence[str] = NAMES_CODE) -> bool:
    """Whether a dotted key holds functions to import: what a stranger's file must not set."""
    key = full_key(key)
    return any(key == own or key.startswith(f"{own}.") or own.startswith(f"{key}.")
               for own in among)


def split_overrides(
    overrides: Sequence[tuple[str, str]], prefix: str
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return those whose keys begin with the prefix, without it, and the others by full keys."""
    own = [(key.removeprefix(prefix), text) for key, text in overrides if key.startswith(prefix)]
    return own, [(full_key(key), text) for key, text in overrides if not key.startswith(prefix)]


def value_at(config: PipelineConfig, key: str) -> Any:
    """Return the value at a dotted key, enums by their value."""
    node: Any = to_tree(config)
    for part in full_key(key).split("."):
        node = node[part]
    return node


def _name_by_sources(data: DataConfig, recipe: str) -> None:
    """Take a recipe's name and purpose off sources that are not the recipe's."""
    named = read_group("data", recipe)["training"]["data"]
    if data.sources != named["sources"] and data.recipe == named["recipe"]:
        data.recipe, data.purpose = "custom", "own sources"


def _set(tree: dict[str, Any], key: str, text: str) -> dict[str, Any]:
    """Return `tree` with the value written in `text` (YAML) at the dotted `key`."""
    parts = full_key(key).split(".")
    if not all(parts):
        raise ConfigError(f"'{key}' is not a key: expected a form such as training.max_steps")
    root = dict(tree)
    section = root
    for part in parts[:-1]:
        below = section.get(part)
        section[part] = dict(below) if isinstance(below, dict) else {}
        section = section[part]
    section[parts[-1]] = parse_value(text)
    return root
