"""From `conf/` and a command line to a checked PipelineConfig, or one line that says why not."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from svend.errors import ConfigError
from svend.pipeline.config import (
    CONF_DIR,
    DataConfig,
    GatesConfig,
    ModelConfig,
    PipelineConfig,
    TrainingConfig,
    merge_trees,
    read_group,
    read_yaml,
)

T = TypeVar("T", PipelineConfig, TrainingConfig)

GROUPS = ("scale", "data", "gates", "profile")


def load_config(
    groups: Mapping[str, str] | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> PipelineConfig:
    """Compose the configuration of a run.

    `groups` chooses members of `conf/scale`, `conf/data`, `conf/gates` and `conf/profile`;
    `overrides` are (dotted key, text) pairs that win over every file, where `data.` is short for
    `training.data.`. Raises ConfigError, in one line, for whatever does not fit.
    """
    tree = read_yaml(CONF_DIR / "config.yaml")
    chosen = tree.pop("groups") | dict(groups or {})
    scale = read_group("scale", chosen["scale"])
    chosen.setdefault("profile", scale["profile"])
    tree = merge_trees(tree, scale)
    for group in ("data", "gates", "profile"):
        tree = merge_trees(tree, read_group(group, chosen[group]))
    for key, text in overrides:
        tree = _set(tree, key, text)
    return build(PipelineConfig, tree, where="configuration").resolve()


def build(schema: type[T], tree: dict[str, Any], *, where: str) -> T:
    """Return `tree` as an instance of `schema`, strictly: no unknown key, no wrong type."""
    _check_keys(schema, tree, where="")
    base = OmegaConf.structured(schema)
    data = base.training.data if schema is PipelineConfig else base.data
    # OmegaConf merges dicts key by key; a mix is stated as a whole.
    data.mix_ratios = {}
    try:
        merged = OmegaConf.merge(base, _names_for_enums(schema, tree))
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, where)) from None
    assert isinstance(built, schema)
    return built


def _set(tree: dict[str, Any], key: str, text: str) -> dict[str, Any]:
    """Return `tree` with the value written in `text` (YAML) at the dotted `key`."""
    path = ("training." if key.startswith("data.") else "") + key
    if not all(path.split(".")):
        raise ConfigError(f"'{key}' is not a key: expected a form such as training.max_steps")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    except YAMLError:
        parsed = text  # not YAML: text, which the schema then accepts or refuses
    branch: dict[str, Any] = {}
    leaf = branch
    *parents, last = path.split(".")
    for parent in parents:
        leaf[parent] = {}
        leaf = leaf[parent]
    leaf[last] = parsed
    return merge_trees(tree, branch)


def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field's type holds, directly, optionally or as a list's item."""
    if dataclasses.is_dataclass(hint):
        return hint if isinstance(hint, type) else None
    for argument in typing.get_args(hint):
        if dataclasses.is_dataclass(argument) and isinstance(argument, type):
            return argument
    return None


def _check_keys(schema: type, tree: Any, *, where: str) -> None:
    """Raise ConfigError for the first key that `schema` does not have, with the nearest one."""
    if isinstance(tree, list):
        for index, item in enumerate(tree):
            _check_keys(schema, item, where=f"{where.rstrip('.')}[{index}].")
        return
    if not isinstance(tree, dict):
        return
    hints = _hints(schema)
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown key {where}{key}: {hint}")
        inner = _dataclass_in(hints[key])
        container = typing.get_origin(hints[key])
        if container is list and not isinstance(value, list):
            raise ConfigError(f"{where}{key} = {value}: must be a list, such as [a, b]")
        if container is dict and not isinstance(value, dict):
            raise ConfigError(f"{where}{key} = {value}: must be a mapping, such as {{a: 1}}")
        if inner is not None:
            if isinstance(value, str | int | float) or (isinstance(value, list) != (container is list)):
                raise ConfigError(f"{where}{key} = {value}: is a section, set one of its keys")
            _check_keys(inner, value, where=f"{where}{key}.")


def _names_for_enums(schema: type, tree: Any) -> Any:
    """Return `tree` with enum values turned into the member names that OmegaConf expects."""
    if isinstance(tree, list):
        return [_names_for_enums(schema, item) for item in tree]
    named = {}
    for key, value in tree.items():
        hint = _hints(schema)[key]
        inner = _dataclass_in(hint)
        if inner is not None and value is not None:
            named[key] = _names_for_enums(inner, value)
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            # YAML reads a bare on or off as a truth value.
            text = {True: "on", False: "off"}.get(value, value) if value in (0, 1) else value
            if text not in [member.value for member in hint]:
                allowed = ", ".join(str(member.value) for member in hint)
                raise ConfigError(f"{_key_of(schema)}{key} = {text}: must be one of {allowed}")
            named[key] = hint(text).name
        else:
            named[key] = value
    return named


def _key_of(schema: type) -> str:
    prefixes = {TrainingConfig: "training.", DataConfig: "training.data.", ModelConfig: "model.",
                GatesConfig: "gates."}
    return prefixes.get(schema, "")


def _explain(error: OmegaConfBaseException, where: str) -> str:
    """One line for what OmegaConf found wrong: the key, the value and the type it must have."""
    return f"{error.full_key or where}: {str(error.msg or error).splitlines()[0]}"
