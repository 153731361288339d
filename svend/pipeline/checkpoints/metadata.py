"""What a checkpoint says of itself, in the file that is written last; nothing else is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svend.errors import CheckpointError, one_line
from svend.pipeline.whole_files import flush_folder, write_whole

METADATA = "metadata.json"
METADATA_SHA256 = "metadata_sha256"
MODEL = "model.pt"
EXTRA_STATE = "extra_state.pt"  # in every checkpoint
# Of one that was written in parts: what is not sharded, and where the parts lie.
LAYOUT, PARTS_INDEX, PART_SUFFIX = "layout.pt", ".metadata", ".distcp"
METADATA_TYPES = {"checkpoint_id": str, "sequence": int, "step": int, "epoch": int,
                  "metrics": dict, "created": str, "files": dict}
ENTRY_TYPES = {"sha256": str, "bytes": int}


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without loading it."""

    checkpoint_id: str
    path: Path
    sequence: int  # counts the saves into a folder
    step: int
    epoch: int
    metrics: dict[str, float]
    created: str
    files: dict[str, dict[str, Any]]

    @property
    def weights_sha256(self) -> str:
        """The hash of the weights' file: what a verdict and a registered version refer to.

        Of parts, until they are put together, it is that of their hashes.
        """
        if MODEL in self.files:
            digest: str = self.files[MODEL]["sha256"]
            return digest
        if not self.in_parts:
            raise CheckpointError(f"{self.path}: was saved without a model")
        parts = {name: entry["sha256"] for name, entry in self.files.items()
                 if name.endswith(PART_SUFFIX) or name == PARTS_INDEX}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def in_parts(self) -> bool:
        """Whether several processes each wrote a part of model and optimizer."""
        return LAYOUT in self.files

    @property
    def bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.files.values())

    @property
    def age_key(self) -> tuple[int, str]:
        """Sorts checkpoints from old to new, whatever their steps: a run may have gone back."""
        return self.sequence, self.created

    def is_copy_of(self, other: Checkpoint) -> bool:
        """Whether both say they hold the same, wherever they lie."""
        return replace(self, path=other.path) == other


def read_folder(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints from old to new, unverified, and what is said of the others."""
    found, complaints = [], []
    for path in sorted(folder.glob("step_*")):
        try:
            found.append(read_metadata(path))
        except (OSError, ValueError) as error:
            complaints.append(f"{path}: not a checkpoint ({one_line(error)}); passed over")
    return sorted(found, key=lambda c: c.age_key), complaints


def read_metadata(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself."""
    return parse_metadata(path, (path / METADATA).read_bytes())


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """Return the content of a metadata file, which ends with a hash of itself."""
    return json.dumps({**metadata, METADATA_SHA256: _metadata_sha256(metadata)}, indent=1).encode()


def write_metadata(checkpoint: Checkpoint) -> None:
    """Write anew what a checkpoint says of itself, whole or not at all."""
    told = {name: value for name, value in vars(checkpoint).items() if name != "path"}
    write_whole(checkpoint.path / METADATA, metadata_bytes(told))
    flush_folder(checkpoint.path)


def _metadata_sha256(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def parse_metadata(path: Path, content: bytes) -> Checkpoint:
    """Return what a metadata file says; raise ValueError if it is not what was written."""
    try:
        metadata = json.loads(content)
        recorded = metadata.pop(METADATA_SHA256, None) if isinstance(metadata, dict) else None
        damaged = recorded != _metadata_sha256(metadata)
    except RecursionError:
        damaged = True
    if damaged:
        raise ValueError(f"{METADATA} is damaged (its hash is not the recorded one)")
    _check_types(metadata)
    checkpoint = Checkpoint(path=path, **metadata)
    if path.name != checkpoint.checkpoint_id:
        raise ValueError(f"is a copy of {checkpoint.checkpoint_id} under another name")
    for name in checkpoint.files:
        # A file named ../../x would be copied out of the folder.
        if name in ("", ".", "..", METADATA) or "/" in name or "\0" in name:
            raise ValueError(f"'{name}' is no name of a checkpoint's file")
    return checkpoint


def _check_types(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError unless everything has its type: a stranger can compute a hash too."""
    for name, kind in METADATA_TYPES.items():
        if type(metadata.get(name)) is not kind:
            raise ValueError(f"{METADATA}: {name} is no {kind.__name__}")
    if metadata.keys() != METADATA_TYPES.keys():
        raise ValueError(f"{METADATA}: holds more than it should")
    if min(metadata["sequence"], metadata["step"], metadata["epoch"]) < 0:
        raise ValueError(f"{METADATA}: sequence, step and epoch must be at least 0")
    if not all(type(value) in (int, float) for value in metadata["metrics"].values()):
        raise ValueError(f"{METADATA}: a metric is no number")
    for name, entry in metadata["files"].items():
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != ENTRY_TYPES:
            raise ValueError(f"{METADATA}: '{name}' must have a sha256 and a number of bytes")
