"""What stands in two places agrees: packages, versions, commands, keys."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import svend
import svend.pipeline
from svend.cli import main
from svend.pipeline.config import CONF_DIR, group_members
from svend.pipeline.loading import load_config
from svend.pipeline.schema import to_tree
from svend.tracking import environment

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


def _requirements() -> dict[str, list[Requirement]]:
    """Return what pyproject.toml requires, by extra; "" is what every installation has."""
    project = _pyproject()["project"]
    lines = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in of_extra] for extra, of_extra in lines.items()}


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    """The script that writes docs/licences.md, as a module."""
    spec = importlib.util.spec_from_file_location("licences", ROOT / ".ci" / "licences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["licences"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pins(licences: ModuleType) -> dict[str, str]:
    """The pinned version of each package, by its name as packages are compared."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return {canonicalize_name(name): version for name, version in licences.pins(text).items()}


def test_conda_and_pip_install_the_same_packages() -> None:
    (by_pip,) = [d["pip"] for d in _yaml("conda.yaml")["dependencies"] if isinstance(d, dict)]
    assert by_pip == ["-c constraints.txt", *_pyproject()["project"]["dependencies"]]


def test_every_pin_lies_in_the_range_that_pyproject_allows(pins: dict[str, str]) -> None:
    for of_extra in _requirements().values():
        for requirement in of_extra:
            if requirement.name != "svend":
                pin = pins[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(pin), requirement


def test_the_pins_serve_cpu_and_cuda_alike() -> None:
    """A local version, such as 2.13.0+cpu, would refuse the other build of torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[a-z0-9.]+", line) for line in lines)
    assert not [line for line in lines if line.startswith(("nvidia-", "cuda-", "triton="))]


def test_everything_that_is_installed_for_svend_is_pinned(
    licences: ModuleType, pins: dict[str, str]
) -> None:
    brought = {name for name in licences.needed(["svend[dev]"])
               if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert len(brought) > 150
    assert brought - pins.keys() == {"svend"}


def test_what_svend_imports_is_required_and_what_is_required_is_imported() -> None:
    statement = re.compile(
        r"^ *(?:import (\w+)[\w.]*(?: as \w+)?(?:  #.*)?$|from (\w+)[\w.]* import )", re.M
    )
    imported = {plain or of for path in (ROOT / "svend").rglob("*.py")
                for plain, of in statement.findall(path.read_text(encoding="utf-8"))}
    packages = {canonicalize_name({"yaml": "PyYAML"}.get(name, name))
                for name in imported - sys.stdlib_module_names}
    by_extra = {extra: {canonicalize_name(requirement.name) for requirement in of_extra}
                for extra, of_extra in _requirements().items()}
    optional = set().union(*(by_extra[extra] for extra in by_extra if extra not in ("", "dev")))
    elsewhere = {"lightning", "litgpt", canonicalize_name("_typeshed")}  # peers', type checkers'
    assert packages - {"svend"} - (optional - by_extra[""]) - elsewhere == by_extra[""]


def test_the_page_of_licences_lists_every_pin(licences: ModuleType) -> None:
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    by_group = page[page.index("## Runtime"):]
    listed = re.findall(r"^\| ([\w.-]+) \| ([\w.]+) \| \S.* \|$", by_group, re.M)
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert sorted(row for row in listed if row[0] != "package") == sorted(
        licences.pins(text).items()
    )


@pytest.mark.parametrize(("licence", "kind"), [
    ("GPL-3.0-or-later", "copyleft"),
    ("GNU Affero General Public License v3", "copyleft"),
    ("GNU Lesser General Public License v3", "weak copyleft"),
    ("LGPL-3.0-only", "weak copyleft"),
    ("MPL-2.0 AND MIT", "weak copyleft"),
    ("Other/Proprietary License", "proprietary"),
    ("3-Clause BSD License", "permissive"),
    ("Apache-2.0 WITH LLVM-exception", "permissive"),
    ("see LICENSE", "unknown"),
])
def test_what_is_not_permissive_is_called_out_first(
    licences: ModuleType, licence: str, kind: str
) -> None:
    free = licences.Package("free", "1", "MIT", licences.RUNTIME)
    package = licences.Package("one", "2", licence, licences.DEVELOPMENT)
    assert package.kind == kind
    called_out, _ = licences.render([free, package], "").split("## Runtime")
    assert (f"| one | 2 | {licence} | {kind} | development |" in called_out) == (
        kind != "permissive"
    )
    assert "free" not in called_out


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


def test_the_readme_begins_with_the_commands_to_run_and_to_test() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("    ")]
    assert commands[:2] == ["make run", "make test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"run", "test"} <= set(targets)


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.M)
    helped = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True)
    listed = re.findall(r"^make (\S+) +\S", helped.stdout, re.M)
    assert sorted(listed) == sorted([*phony.split(), ".venv/installed"])


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


def test_the_version_is_one_number(capsys: pytest.CaptureFixture[str]) -> None:
    """What a run and a registered version are tagged with: tests/test_run.py."""
    pyproject = _pyproject()
    assert pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "svend.__version__"}
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"svend {svend.__version__}\n"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None
    assert newest[1] == svend.__version__


def test_the_installed_version_is_that_of_the_package() -> None:
    try:
        installed = importlib.metadata.version("svend")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("svend is not installed")
    assert svend.__version__ == installed


def test_a_repository_that_svend_was_installed_into_is_not_taken_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", environment.environment_tags()["svend.git_commit"])
    for words in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "theirs",
                             "--allow-empty"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    package = tmp_path / ".venv" / "site-packages" / "svend" / "tracking"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert "svend.git_commit" not in environment.environment_tags()


def test_what_commands_write_by_default_does_not_make_the_next_run_one_of_changed_code() -> None:
    """`svend.git_dirty` is on record in every run, and an untracked file would set it."""
    written = ["mlflow.db", "mlruns/0/meta.yaml", "checkpoints/svend/run.json", ".svend-cache/x",
               "comparison/report.html", "faults/tiny.json", "gpu-report/report.md",
               "imported/llama/model.pt", "svend-tiny-50m-v1-hf/config.json", "wandb/run/x",
               "notebooks/svend-work/mlflow.db", ".litgpt/pyvenv.cfg", ".venv/pyvenv.cfg"]
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", *written],
                             capture_output=True, text=True, check=False)
    if ignored.returncode == 128:
        pytest.skip("no git repository here")
    assert ignored.stdout.split() == written


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
