"""Between YAML and dataclasses: strictly typed, and one line for whatever does not fit."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import functools
import io
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError
from yaml.events import AliasEvent
from yaml.loader import SafeLoader

from svend.errors import ConfigError, one_line

T = TypeVar("T")
# What a text may be to PyYAML and OmegaConf that is no plain value: a date, a set, a deep nest.
NOT_PLAIN = (YAMLError, OmegaConfBaseException, ValueError, OverflowError, RecursionError)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file of plain values; object tags and aliases are refused."""
    try:
        tree = copy.deepcopy(_parse_file(path.read_text(encoding="utf-8")))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deep") from None
    except (*NOT_PLAIN, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ConfigError(f"{path}: {reason or one_line(error)[:300]}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def parse_value(text: str) -> Any:
    """Return what a value on the command line means as YAML, else the text itself."""
    try:
        return copy.deepcopy(_parse_dotted(text))
    except NOT_PLAIN:
        return text  # the schema then accepts or refuses it


# A sweep's trials and a ladder's rungs read the same few files and values, each several times.
@functools.lru_cache(maxsize=64)
def _parse_file(text: str) -> Any:
    # Aliases of aliases, nested, would fill the memory from a few lines.
    if "*" in text and any(isinstance(e, AliasEvent) for e in yaml.parse(text, SafeLoader)):
        raise ConfigError("has an alias (*name); write the value out")
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


@functools.lru_cache(maxsize=1024)
def _parse_dotted(text: str) -> Any:
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(parsed, dict)
    return parsed["value"]


def merge_trees(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top, key by key; lists are replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge_trees(below, value)
        else:
            merged[key] = value
    return merged


def set_at(tree: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return `tree` with the value at the path, in place of all that is there."""
    first, *rest = path
    below = tree.get(first)
    inner = set_at(below if isinstance(below, dict) else {}, rest, value) if rest else value
    return {**tree, first: inner}


def build(schema: type[T], tree: dict[str, Any], *, prefix: str = "") -> T:
    """Return `tree` as an instance of the dataclass `schema`: no unknown key, no wrong type.

    A mapping in `tree` replaces the schema's default as a whole. `prefix` is how messages name
    the place of the schema in the configuration, such as `training.`.
    """
    _check_keys(schema, tree, where=prefix)
    base = _defaults(schema)
    _clear_mappings(schema, tree, base)
    named = _named_enums(schema, tree, prefix)
    try:
        # unsafe: it may change `base`, which is ours, where merge would copy it once more.
        built = OmegaConf.to_object(OmegaConf.unsafe_merge(base, named))
    except OmegaConfBaseException as error:
        _try_items(schema, tree, prefix)
        message = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{prefix}{error.full_key or ''}: {message}") from None
    assert isinstance(built, schema)
    return built


def to_tree(config: Any) -> Any:
    """Return a configuration as plain dicts, lists and scalars, enums by their value."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_tree(value) for key, value in config.items()}
    if isinstance(config, list):
        return [to_tree(value) for value in config]
    return config.value if isinstance(config, enum.Enum) else config


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config tree by dotted keys; the items of a list of sections by their names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        named = isinstance(value, list) and value and all(
            isinstance(item, dict) and isinstance(item.get("name"), str) for item in value
        )
        section = {item["name"]: item for item in value} if named else value
        if isinstance(section, dict) and section:
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(section).items()}
        else:
            flat[key] = value
    return flat


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML that `build` turns back into the same values.

    Raises ConfigError for a text that means something to OmegaConf.
    """
    for name, value in flatten(to_tree(config)).items():
        _refuse_omegaconf_syntax(value, name)
    return OmegaConf.to_yaml(OmegaConf.create(to_tree(config)))


# What is found out once about a schema: it takes most of the time that a config takes.
@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


@functools.cache
def _structured(schema: type) -> DictConfig:
    structured: DictConfig = OmegaConf.structured(schema)
    return structured


def _defaults(schema: type) -> DictConfig:
    """What the schema is before anything is set, to be changed by whoever asks."""
    return copy.deepcopy(_structured(schema))


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field's type holds, directly, optionally or as a list's item."""
    if dataclasses.is_dataclass(hint):
        return hint if isinstance(hint, type) else None
    for argument in typing.get_args(hint):
        if dataclasses.is_dataclass(argument) and isinstance(argument, type):
            return argument
    return None


def _check_keys(schema: type, tree: dict[str, Any], *, where: str) -> None:
    """Raise ConfigError for the first key or value whose place or kind is not `schema`'s."""
    hints = _hints(schema)
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown key {where}{key}: {hint}")
        _check_kind(hints[key], value, f"{where}{key}")


def _check_kind(hint: Any, value: Any, name: str) -> None:
    """Raise ConfigError unless `value` is the scalar, list, mapping or section that it must be."""
    inner, container = _dataclass_in(hint), typing.get_origin(hint)
    if container is list:
        _check_list(inner, value, name)
    elif container is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} = {value}: must be a mapping, such as {{a: 1}}")
        for key, item in value.items():
            _check_kind(None, item, f"{name}.{key}")
    elif inner is not None:
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name} = {value}: is a section, set one of its keys")
        _check_keys(inner, value or {}, where=f"{name}.")
    elif isinstance(value, dict | list):
        raise ConfigError(f"{name} = {value}: must be a single value")
    else:
        _refuse_omegaconf_syntax(value, name)


def _check_list(inner: type | None, value: Any, name: str) -> None:
    if not isinstance(value, list):
        raise ConfigError(f"{name} = {value}: must be a list, such as [a, b]")
    for index, item in enumerate(value):
        if inner is None:
            _check_kind(None, item, f"{name}[{index}]")
        elif not isinstance(item, dict):
            raise ConfigError(f"{name}[{index}] = {item}: must be a mapping")
        else:
            _check_keys(inner, item, where=f"{name}[{index}].")


def _try_items(schema: type, tree: dict[str, Any], prefix: str) -> None:
    """Raise ConfigError for the first item of a list that does not fit.

    OmegaConf names no place within a list: each item is tried by itself.
    """
    for key, value in tree.items():
        inner = _dataclass_in(_hints(schema)[key])
        if inner is None:
            continue
        if isinstance(value, dict):
            _try_items(inner, value, f"{prefix}{key}.")
        for index, item in enumerate(value if isinstance(value, list) else []):
            build(inner, item, prefix=f"{prefix}{key}[{index}].")


def _refuse_omegaconf_syntax(value: Any, name: str) -> None:
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise ConfigError(f"{name} = {value}: ${{ and ??? cannot be part of a value")


def _clear_mappings(schema: type, tree: dict[str, Any], base: DictConfig) -> None:
    """Empty the mappings of `base` that `tree` states: OmegaConf would merge key by key."""
    hints = _hints(schema)
    for key, value in tree.items():
        inner = _dataclass_in(hints[key])
        if typing.get_origin(hints[key]) is dict:
            base[key] = {}
        elif (inner is not None and isinstance(value, dict)
              and not OmegaConf.is_missing(base, key) and base[key] is not None):
            _clear_mappings(inner, value, base[key])


def _named_enums(schema: type, tree: Any, where: str) -> Any:
    """Return `tree` with enum values turned into the member names that OmegaConf expects."""
    if isinstance(tree, list):
        return [_named_enums(schema, item, f"{where.removesuffix('.')}[{index}].")
                for index, item in enumerate(tree)]
    named = {}
    for key, value in tree.items():
        hint = _hints(schema)[key]
        inner = _dataclass_in(hint)
        if inner is not None and value is not None:
            named[key] = _named_enums(inner, value, f"{where}{key}.")
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            # YAML reads a bare on or off as a truth value.
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            if text not in [member.value for member in hint]:
                allowed = ", ".join(str(member.value) for member in hint)
                raise ConfigError(f"{where}{key} = {text}: must be one of {allowed}")
            named[key] = hint(text).name
        else:
            named[key] = value
    return named
