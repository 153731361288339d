"""Google Drive and other mounts that checkpoints go to, and the caches on the way there."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from pathlib import Path

from svend.errors import CheckpointError, reason_of
from svend.pipeline.checkpoints.files import tidy_folder
from svend.pipeline.whole_files import write_bytes

MOUNT_POINT = Path("/content/drive")  # where Colab's notebooks have Google Drive


def reach_drive(drive_path: Path) -> None:
    """Mount Google Drive if `drive_path` lies on it, make the folder, and clear it of leftovers.

    Raises CheckpointError where that cannot be done.
    """
    try:
        mount_google_drive(drive_path)
        drive_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{drive_path}: cannot be used ({reason_of(error)}); give drive_path a folder that "
            "exists and can be written, or mount the drive first"
        ) from error
    # One run writes here; another machine's process ids mean nothing, so all is abandoned. A
    # copier that is in fact at work loses its attempt, and makes another.
    with contextlib.suppress(OSError):  # a drive that cannot be written may still be read
        tidy_folder(drive_path, lambda _: True)


def is_on_google_drive(path: Path) -> bool:
    """Whether a path lies where Colab mounts Google Drive."""
    return path.absolute().is_relative_to(MOUNT_POINT)


def mount_google_drive(drive_path: Path) -> None:
    """Mount Google Drive if `drive_path` lies on it and it is not mounted yet.

    Raises CheckpointError, with what to do, where that cannot be done.
    """
    if not is_on_google_drive(drive_path):
        return
    # A folder of that name on the local disk is not Drive, whatever it holds.
    if MOUNT_POINT.is_mount():
        return
    try:
        drive = importlib.import_module("google.colab.drive")
    except ImportError:
        raise CheckpointError(
            f"{drive_path}: nothing is mounted at {MOUNT_POINT}, and google.colab, which could "
            "mount Google Drive there, is not installed here; give a folder elsewhere, or mount "
            "the drive first"
        ) from None
    try:
        drive.mount(str(MOUNT_POINT))
    except (ValueError, RuntimeError, AttributeError) as error:
        # AttributeError: a process without a notebook's kernel cannot ask for permission.
        raise CheckpointError(
            f"{MOUNT_POINT}: Google Drive cannot be mounted ({reason_of(error)}); run "
            f"google.colab.drive.mount('{MOUNT_POINT}') in a notebook cell first"
        ) from error


def own_cache(drive_path: Path) -> Path:
    """Return the cache that belongs to a drive's folder and to no other."""
    place = hashlib.sha256(str(drive_path).encode()).hexdigest()[:8]
    return default_cache_dir() / f"{drive_path.name}-{place}"


def default_cache_dir() -> Path:
    """Return the folder of caches, on the machine's own disk."""
    return Path.home() / ".cache" / "svend" / "checkpoints"


def claim_cache(cache: Path, drive_path: Path) -> None:
    """Keep two runs from taking each other's checkpoints for their own."""
    claim = cache / ".drive_path"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # An empty one was cut short by a kill.
        owner = claim.read_text(encoding="utf-8") if claim.exists() else ""
        if not owner:
            write_bytes(claim, str(drive_path).encode())
    except OSError as error:
        raise CheckpointError(
            f"{cache}: cannot be written ({reason_of(error)}); choose another local_cache"
        ) from error
    if owner and owner != str(drive_path):
        raise CheckpointError(f"{cache}: is the cache of {owner}; choose another local_cache")
