"""Functions of the user's own, imported by the name that a configuration gives them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from svend.errors import ConfigError


def load_function(reference: str, key: str, *, anew: bool = False) -> Callable[..., Any]:
    """Return the function that `file.py:function` or `module:function` names.

    What stands beside the file can be imported by it. anew: of a module, too, what its file says
    now, beside what was imported of it before. Raises ConfigError, naming the key that has the
    reference, for what cannot be imported or is no function.
    """
    place, _, name = reference.rpartition(":")
    try:
        if place.endswith(".py"):
            module = _load_file(Path(place))
        elif anew and (spec := importlib.util.find_spec(place)) is not None:
            module = _load(spec)
        else:
            module = importlib.import_module(place)
        found = getattr(module, name)
    except Exception as error:
        raise ConfigError(
            f"{key} = '{reference}' cannot be loaded ({type(error).__name__}: {error}); give "
            "file.py:function or module:function"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key} = '{reference}': {name} is {type(found).__name__}, no function")
    function: Callable[..., Any] = found
    return function


def source_file(reference: str) -> Path | None:
    """Return the file that a reference leads to, where it is one of Python's."""
    place, _, _ = reference.rpartition(":")
    if place.endswith(".py"):
        return Path(place).expanduser().resolve()
    spec = importlib.util.find_spec(place)
    origin = None if spec is None else spec.origin
    return Path(origin) if origin and origin.endswith(".py") else None


def _load_file(file: Path) -> ModuleType:
    path = file.expanduser().resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: it hides nothing
    return _load(spec)


def _load(spec: ModuleSpec) -> ModuleType:
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
