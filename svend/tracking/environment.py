"""What a run was made with: package versions and the git commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from svend import __version__

PACKAGES = ("torch", "mlflow", "omegaconf", "tokenizers", "datasets", "reasoning-gym", "numpy")


def environment_tags() -> dict[str, str]:
    """Return the versions and the git commit that a run was made with, as tags."""
    tags = {"svend.version": __version__}
    tags |= {f"svend.package.{name}": importlib.metadata.version(name) for name in PACKAGES}
    root = Path(__file__).resolve().parents[2]
    # Installed as a package, Svend may lie within a repository of somebody else's.
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if commit is not None:
        tags["svend.git_commit"] = commit
        tags["svend.git_dirty"] = str(bool(_git(root, "status", "--porcelain"))).lower()
    return tags


def installed_packages() -> str:
    """Return every installed distribution with its version, as requirements."""
    found = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return "\n".join(f"{name}=={found[name]}" for name in sorted(found, key=str.lower)) + "\n"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
