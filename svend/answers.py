"""The answer of a command as one JSON document."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


def to_json(answer: Any) -> str:
    """Return the document. What is no number is null: JSON has neither NaN nor infinity."""
    return json.dumps(plain(answer), indent=1, allow_nan=False)


def plain(value: Any) -> Any:
    """Return a value in what JSON knows; raises TypeError for what is nothing of it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        value = value.value
    if hasattr(value, "dtype"):  # a number of numpy's, which is not imported for this
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is nothing that JSON knows")
