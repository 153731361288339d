"""Results of an experiment in a file: written as they come, so that it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from svend.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R")


def read_results(
    file: Path, setting: DataclassInstance, experiment: str, read: Callable[[dict[str, Any]], R]
) -> list[R]:
    """Return the results in a file, each made by `read` of what was written; none without a file.

    setting: what all runs share. Raises UserError if the file is of another, or no results.
    """
    if not file.exists():
        return []
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        was, results = told["setting"], [read(run) for run in told["runs"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not results of {experiment} ({error}); give another") from None
    for name, value in asdict(setting).items():
        if was.get(name) != value:
            raise UserError(
                f"{file}: holds results with {name} = {was.get(name)}, now {value}; give another "
                "file, or the same setting"
            )
    return results


def write_results(
    file: Path, setting: DataclassInstance, results: Iterable[DataclassInstance]
) -> None:
    """Write the setting and all results, whole or not at all."""
    tree = {"setting": asdict(setting), "runs": [asdict(result) for result in results]}
    writing = file.with_name(f"{file.name}.writing")
    writing.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    writing.replace(file)
