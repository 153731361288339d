"""What stands in two places agrees: packages, versions, commands, keys."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import svend.pipeline
from svend.pipeline.config import CONF_DIR, group_members
from svend.pipeline.loading import load_config
from svend.pipeline.schema import to_tree

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("scale", "data", "gates", "preset")
MEMBERS = [(group, path.stem) for group in GROUPS
           for path in sorted((CONF_DIR / group).glob("*.yaml"))]


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _yaml(name: str) -> dict[str, Any]:
    tree = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict) and tree and not prefix.endswith(("mix_ratios.", "_gates.")):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}{key}.")]
    return [(prefix.removesuffix("."), tree)]


def test_conda_and_pip_install_the_same_packages() -> None:
    (by_pip,) = [d["pip"] for d in _yaml("conda.yaml")["dependencies"] if isinstance(d, dict)]
    assert by_pip == _pyproject()["project"]["dependencies"]


def test_every_place_names_the_same_python() -> None:
    (conda,) = [d.removeprefix("python=") for d in _yaml("conda.yaml")["dependencies"]
                if isinstance(d, str) and d.startswith("python=")]
    major, minor, _ = (int(part) for part in conda.split("."))
    pyproject = _pyproject()
    # Colab has the next one.
    assert pyproject["project"]["requires-python"] == f">={major}.{minor},<{major}.{minor + 2}"
    assert pyproject["tool"]["mypy"]["python_version"] == f"{major}.{minor}"
    assert pyproject["tool"]["ruff"]["target-version"] == f"py{major}{minor}"
    assert re.search(r"^PYTHON \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M)[1] == (  # type: ignore[index]
        f"python{major}.{minor}"
    )


def test_the_readme_starts_with_the_commands_to_run_and_to_test() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("    ", "```")))
    assert [line for line in lines[:start] if line.strip()] == ["# Svend"]
    commands = [line.strip() for line in lines[start:] if not line.startswith("```")]
    assert [command.split("#")[0].strip() for command in commands[:2]] == ["make run", "make test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"run", "test"} <= set(targets)


def test_every_placeholder_of_mlproject_is_a_parameter_with_a_default() -> None:
    project = _yaml("MLproject")
    assert (ROOT / project["conda_env"]).is_file()
    entry = project["entry_points"]["main"]
    placeholders = re.findall(r"\{(\w+)\}", entry["command"])
    assert placeholders
    assert set(placeholders) == set(entry["parameters"])
    assert all("default" in parameter for parameter in entry["parameters"].values())


def test_no_placeholder_of_mlproject_is_quoted() -> None:
    """`mlflow run` quotes each value itself; quotes around it would become part of the value."""
    command = _yaml("MLproject")["entry_points"]["main"]["command"]
    assert not re.search(r"""["']\{|\}["']""", command)


def test_the_defaults_of_mlproject_are_those_of_the_configuration() -> None:
    parameters = _yaml("MLproject")["entry_points"]["main"]["parameters"]
    groups = _yaml("conf/config.yaml")["groups"]
    assert {name: parameters[name]["default"] for name in ("scale", "data")} == {
        name: groups[name] for name in ("scale", "data")
    }


def test_the_installed_version_is_that_of_the_package() -> None:
    try:
        installed = importlib.metadata.version("svend")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("svend is not installed")
    pyproject = _pyproject()
    assert pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "svend.__version__"}
    assert svend.__version__ == installed


@pytest.mark.parametrize(("group", "member"), MEMBERS)
def test_every_key_of_a_group_member_is_a_key_of_the_schema_and_takes_effect(
    group: str, member: str
) -> None:
    chosen = {group: member} if group == "preset" else {"preset": "full", group: member}
    config = to_tree(load_config(chosen))
    stated = _leaves(_yaml(f"conf/{group}/{member}.yaml"))
    if group == "scale":
        stated = [(key, value) for key, value in stated if key != "preset"]
    for key, value in stated:
        found = config
        for part in key.split("."):
            found = found[part]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found = [{k: v for k, v in gate.items() if k in value[i]}
                     for i, gate in enumerate(found)]
        assert found == value, key


def test_every_group_member_is_offered_and_nothing_else() -> None:
    for group in GROUPS:
        found = sorted(member for kind, member in MEMBERS if kind == group)
        assert sorted(group_members(group)) == found
    folders = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "sweep", "ladder"}  # the last two are no run's


def test_every_key_of_the_default_file_is_a_key_of_the_schema() -> None:
    config = to_tree(load_config())
    for key, _ in _leaves(_yaml("conf/config.yaml")):
        if not key.startswith("groups."):
            found = config
            for part in key.split("."):
                assert part in found, key
                found = found[part]


def test_every_key_that_a_scale_may_set_is_set_by_all_scales() -> None:
    keys = [{key for key, _ in _leaves(_yaml(f"conf/scale/{member}.yaml"))}
            for group, member in MEMBERS if group == "scale"]
    assert len(keys) == 7
    assert all(found == keys[0] for found in keys)


def _layers() -> list[set[str]]:
    contract = next(c for c in _pyproject()["tool"]["importlinter"]["contracts"]
                    if c["name"] == "imports point downward")
    return [{name.strip() for name in layer.split("|")} for layer in contract["layers"]]


def test_the_picture_of_imports_shows_the_layers_that_are_enforced() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = next(block for block in text.split("\n\n") if block.startswith("    cli "))
    shown = [re.split(r"\s{2,}", line.strip())[0] for line in picture.splitlines()
             if not line.startswith(" " * 8)]
    assert [{name.strip() for name in row.split("|")} for row in shown] == [
        {name.rpartition(".")[2] for name in layer} for layer in _layers()
    ]


def test_every_module_has_a_layer() -> None:
    layered = set().union(*_layers())
    found = {
        f"{package.__name__}.{module.name}"
        for package in (svend, svend.pipeline)
        for module in pkgutil.iter_modules(package.__path__) if module.name != "__main__"
    }
    commands = {name for name in found if name.endswith("_command")}  # the command line's
    assert found - commands - {"svend.pipeline"} == layered
