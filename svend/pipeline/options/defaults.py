"""Defaults, which stand in `conf/`, once, and the error for a value that cannot be.

`conf/config.yaml` has what is the same everywhere, `conf/scale/` what is a property of a scale.
"""

from __future__ import annotations

from dataclasses import field
from enum import Enum
from typing import Any

from svend.errors import ConfigError
from svend.pipeline.groups import default_tree


def default(key: str) -> Any:
    """A dataclass field whose default is what `conf/` says at `key`."""

    def look_up() -> Any:
        value: Any = default_tree()
        for part in key.split("."):
            value = value[part]
        return list(value) if isinstance(value, list) else value

    return field(default_factory=look_up)


def default_enum(key: str, enum: type[Enum]) -> Any:
    """As `default`, for a choice of a few named values."""
    factory = default(key).default_factory
    return field(default_factory=lambda: enum(factory()))


def default_dict(key: str) -> Any:
    """As `default`, for a mapping."""
    factory = default(key).default_factory
    return field(default_factory=lambda: dict(factory()))


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise ConfigError, with what is allowed, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} = {value}: must be {allowed}")
