"""The Colab notebook, executed in a real kernel without Colab: whole, and after a time-out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from svend.pipeline.checkpoints import CheckpointManager
from tests.conftest import ROOT, Workplace

NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
LAST_STEP, SAVE_STEPS = 120, 30
SMALL = f"""
REPOSITORY = "unused"
SCALE = "tiny"
PRESET = "quick_test"
EXPERIMENT = "svend-colab"
OVERRIDES = [("training.max_steps", "{LAST_STEP}"), ("training.save_steps", "{SAVE_STEPS}"),
             ("training.compile", "off")]
DRIVE_FOLDER = "unused"
LOCAL_FOLDER = "work"
"""


@pytest.fixture
def small_environment(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A folder in which a kernel leaves everything that it writes."""
    for name, value in workplace.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(workplace.folder / "home"))
    (workplace.folder / "home").mkdir()
    # The notebook's own choice of a store is what is tested.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    return workplace


def stored_notebook() -> nbformat.NotebookNode:
    notebook: nbformat.NotebookNode = nbformat.read(  # type: ignore[no-untyped-call]
        NOTEBOOK, as_version=4
    )
    return notebook


def small_notebook() -> nbformat.NotebookNode:
    """Return the notebook with small parameters."""
    notebook = stored_notebook()
    for cell in notebook.cells:
        if "parameters" in tags(cell):
            cell.source = SMALL
    return notebook


def tags(cell: nbformat.NotebookNode) -> list[str]:
    found: list[str] = cell.metadata.get("tags", [])
    return found


def client(notebook: nbformat.NotebookNode, folder: Path) -> NotebookClient:
    return NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})


def printed(notebook: nbformat.NotebookNode) -> str:
    """Return what all cells showed, as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for output in outputs
    )


def test_the_notebook_is_stored_without_outputs_and_names_every_parameter() -> None:
    notebook = stored_notebook()
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    [parameters] = [cell.source for cell in notebook.cells if "parameters" in tags(cell)]
    assert names_set(parameters) == names_set(SMALL)


def names_set(source: str) -> set[str]:
    names: dict[str, Any] = {}
    exec(source, names)
    return names.keys() - {"__builtins__"}


def set_up_on_colab(monkeypatch: pytest.MonkeyPatch, **names: Any) -> list[list[str]]:
    """Run the set-up cell as on Colab, but for the commands; return them."""
    commands: list[list[str]] = []
    colab = ModuleType("google.colab")
    colab.drive = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: commands.append([*map(str, command)])
    )
    [cell] = [cell for cell in stored_notebook().cells if "setup" in tags(cell)]
    exec(cell.source, {"REPOSITORY": "https://example.org/svend.git", **names})
    return commands


def test_the_set_up_on_colab_clones_and_installs_what_was_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clone, install = set_up_on_colab(monkeypatch)
    assert clone[:2] == ["git", "clone"] and "https://example.org/svend.git" in clone
    assert install[1:4] == ["-m", "pip", "install"]
    assert install[-1] == f"{clone[-1]}/constraints.txt"
    assert (ROOT / "constraints.txt").is_file()


def test_what_colab_cannot_do_is_told_before_anything_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match="set REPOSITORY in the first cell"):
        set_up_on_colab(monkeypatch, REPOSITORY="https://github.com/YOUR_REPO/svend.git")
    import numpy as np

    with monkeypatch.context() as patch:
        patch.setattr(np, "__version__", "1.0")
        with pytest.raises(RuntimeError, match="still has the former numpy: choose Runtime, Rest"):
            set_up_on_colab(patch)
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(RuntimeError, match=r"needs Python 3\.11 or 3\.12, and this runtime has"):
        set_up_on_colab(monkeypatch)


def test_the_notebook_takes_the_pythons_that_the_package_does() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == ">=3.11,<3.13"  # the set-up cell and the text above it say so too


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_without_colab(small_environment: Workplace) -> None:
    folder = small_environment.folder
    notebook = small_notebook()
    # Run all again, on a run that is finished, trains nothing.
    notebook.cells += [deepcopy(cell) for cell in notebook.cells if "train" in tags(cell)]
    client(notebook, folder).execute()
    output = printed(notebook)
    assert "not on Colab: nothing to install" in output
    assert "GPU: " in output
    assert "FAIL" not in output
    assert "finished, held-out loss" in output
    assert "nothing to resume: the newest run of experiment 'svend-colab'" in output
    assert f"step_{LAST_STEP:08d}" in output
    assert "registered   models:/svend-quick-test/1, passed " in output
    assert "-m svend evaluate --model models:/svend-quick-test/1" in output
    shown = [kind for cell in notebook.cells for out in cell.get("outputs", [])
             for kind in out.get("data", {})]
    assert "image/png" in shown  # the losses
    manager = CheckpointManager(folder / "work" / "checkpoints" / "svend-colab")
    assert [c.step for c in manager.list_checkpoints()][-1] == LAST_STEP
    assert (folder / "work" / "mlflow.db").is_file()


@pytest.mark.slow
def test_a_run_whose_kernel_died_goes_on_from_its_last_checkpoint(
    small_environment: Workplace,
) -> None:
    folder = small_environment.folder
    checkpoints = folder / "work" / "checkpoints" / "svend-colab"
    first = client(small_notebook(), folder)
    killer = threading.Thread(target=kill_kernel_at_checkpoint, args=(first, checkpoints))
    killer.start()
    with pytest.raises(DeadKernelError):
        first.execute()
    killer.join()
    saved = CheckpointManager(checkpoints).list_checkpoints()[-1].step
    assert saved < LAST_STEP

    notebook = small_notebook()
    client(notebook, folder).execute()
    output = printed(notebook)
    assert f"from step {saved}" in output
    assert "finished, held-out loss" in output
    assert CheckpointManager(checkpoints).list_checkpoints()[-1].step == LAST_STEP
    assert [path.name for path in checkpoints.parent.iterdir()] == ["svend-colab"]


def kill_kernel_at_checkpoint(running: NotebookClient, checkpoints: Path) -> None:
    """Kill the kernel outright once its run has a checkpoint, as a time-out does."""
    deadline = time.monotonic() + 90
    while not list(checkpoints.glob("step_*/metadata.json")):
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)
    assert running.km is not None
    provisioner = running.km.provisioner
    assert isinstance(provisioner, LocalProvisioner)
    assert provisioner.pid is not None
    os.kill(provisioner.pid, signal.SIGKILL)
