"""A version of the registry, opened and held against what was put on record as it was made."""

from __future__ import annotations

from svend.data.records import file_digest
from svend.errors import CheckpointError, UserError
from svend.pipeline.moves import History, Moves, Registration
from svend.tracking.registry import OpenedVersion, open_version


def open_verified(uri: str) -> tuple[OpenedVersion, Registration]:
    """Open a version of the registry whose every file is what was registered.

    Raises UserError, in one line, for what is missing, not on record, or changed.
    """
    version = open_version(uri)
    history = Moves.find(version.name).history()
    registration = registration_of(version.name, version.version, history)
    verify_files(version, registration)
    return version, registration


def open_registered(
    model: str, history: History, version: str
) -> tuple[OpenedVersion, Registration]:
    """Return a version with what was registered. Raises UserError where either is missing."""
    registration = registration_of(model, version, history)
    return open_version(f"models:/{model}/{version}"), registration


def registration_of(model: str, version: str, history: History) -> Registration:
    """Return what a version was when it was registered. Raises UserError if it is not on record."""
    registration = history.registration(version)
    if registration is None:
        known = ", ".join(reversed(history.registered())) or "none"
        raise UserError(
            f"{model} version {version}: its registration is not on record; there are the "
            f"versions {known}"
        )
    return registration


def verify_files(version: OpenedVersion, registration: Registration) -> None:
    """Raise CheckpointError unless every file of a version is what was registered."""
    where = f"model models:/{version.name}/{version.version}"
    for name, sha256 in registration.files.items():
        path = version.folder / name
        if not path.is_file():
            raise CheckpointError(f"{where}: {path} is missing; restore it, or register another")
        found = file_digest(path)
        if found != sha256:
            raise CheckpointError(
                f"{where}: {path} has the hash {found[:12]}, recorded is {sha256[:12]}; it is not "
                "what was registered"
            )
