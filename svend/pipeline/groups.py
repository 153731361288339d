"""The files of `conf/`, as groups of named members."""

from __future__ import annotations

import functools
from enum import Enum
from pathlib import Path
from typing import Any

from svend.errors import ConfigError
from svend.pipeline.schema import merge_trees, read_yaml

# A link in a working copy; in an installed package, the files themselves.
CONF_DIR = (Path(__file__).resolve().parents[1] / "conf").resolve()
GROUPS = ("scale", "data", "gates", "preset")  # of a run; sweeps and ladders have their own


class ModelScale(Enum):
    """The seven rungs of the ladder."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
    XL = "xl"
    XXL = "xxl"
    FLAGSHIP = "flagship"


def group_members(group: str) -> list[str]:
    """Return the names that `conf/<group>/` offers; scales in the ladder's order."""
    if group == "scale":
        return [scale.value for scale in ModelScale]
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def read_group(group: str, member: str) -> dict[str, Any]:
    """Return the tree of one group member, such as ("scale", "tiny")."""
    if member not in group_members(group):
        raise ConfigError(
            f"unknown {group} '{member}': choose one of {', '.join(group_members(group))}"
        )
    return read_yaml(CONF_DIR / group / f"{member}.yaml")


@functools.cache
def default_tree() -> dict[str, Any]:
    """`conf/config.yaml` with the default data recipe and gate set."""
    tree = read_yaml(CONF_DIR / "config.yaml")
    groups = tree.pop("groups")
    for group in ("data", "gates"):
        tree = merge_trees(tree, read_group(group, groups[group]))
    return tree
