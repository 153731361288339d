"""A state that torch wrote, read as data: whatever a file holds, none of it is run."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from svend.errors import CheckpointError, one_line

PICKLE_PROTOCOL_2 = b"\x80\x02"  # what torch.save writes
NAMED_GLOBAL = re.compile(r"(?:GLOBAL|global) ([\w.]+)")


def read_state(path: Path, *, mapped: bool = False) -> Any:
    """Read a state onto the CPU; no pickled code is ever run.

    mapped: leave the tensors in the file until they are used.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own text tells how to run the code after all.
        named = NAMED_GLOBAL.search(str(error))
        what = f"names {named[1]}, which could run code" if named else "its pickle is no state"
        raise CheckpointError(
            f"{path}: cannot be loaded ({what}); use another checkpoint"
        ) from None
    except Exception as error:  # noqa: BLE001 - made-up files raise whatever torch did not foresee
        raise CheckpointError(f"{path}: cannot be loaded ({one_line(error)[:200]})") from None


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for what `write_state` does not write.

    A bare pickle, TorchScript, the format before zip, and an archive that unpacks to more than its
    own size.
    """
    fault = CheckpointError(
        f"{path}: is no archive as torch.save writes it; use another checkpoint"
    )
    if not zipfile.is_zipfile(path):
        raise fault
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
            sum(entry.file_size for entry in entries) > path.stat().st_size
        ):
            raise fault
        states = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        scripts = [entry for entry in entries if entry.filename.endswith("/constants.pkl")]
        if len(states) != 1 or scripts:
            raise fault
        with archive.open(states[0]) as stream:
            if stream.read(len(PICKLE_PROTOCOL_2)) != PICKLE_PROTOCOL_2:
                raise fault
