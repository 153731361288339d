"""What a refusal is: one line, an exit code, and not a byte changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from svend.cli import main


def tree_of(folder: Path) -> dict[str, str]:
    """Return what a folder holds: the hash of each file, where each link leads.

    But for what Python keeps of the modules there that it imports.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def refusal_of(
    arguments: Sequence[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """Return the one line that a command ends with, which fails and changes nothing in a folder."""
    before = tree_of(folder)
    capsys.readouterr()
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 1, (code, out, err)
    assert "Traceback" not in out + err, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    assert lines[0].isprintable(), repr(lines[0])
    after = tree_of(folder)
    assert after == before, [name for name in {**before, **after}
                             if before.get(name) != after.get(name)]
    return lines[0]
