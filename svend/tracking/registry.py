"""The model registry: a checkpoint becomes a version, and a passed level an alias."""

from __future__ import annotations

import atexit
import errno
import getpass
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.credentials import read_mlflow_creds

from svend.data.records import file_digest
from svend.errors import TrackingError
from svend.tracking.chat_model import describe_model
from svend.tracking.delivery import is_missing, is_refusal
from svend.tracking.ledger import retried
from svend.tracking.runs import configure_mlflow
from svend.tracking.store_errors import store_error, told_by_the_store

CHECKPOINT_TAG = "svend.checkpoint_sha256"
VERSION_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry; files: the hash of each of its files."""

    name: str
    version: str
    files: dict[str, str]
    aliases: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OpenedVersion:
    """A version of the registry with its files in a folder of this machine."""

    name: str
    version: str
    run_id: str | None
    experiment: str
    tags: dict[str, str]
    folder: Path


def open_version(uri: str) -> OpenedVersion:
    """Return the version that `models:/name/3` or `models:/name@alias` stands for.

    Files in a local store are used where they lie, others are fetched, and go with this process.
    Raises TrackingError, in one line, for an address of another form, or one that leads nowhere.
    """
    parsed = VERSION_URI.fullmatch(uri)
    if parsed is None:
        raise TrackingError(
            f"model {uri}: is no version of the registry; give models:/NAME/VERSION or "
            "models:/NAME@ALIAS"
        )
    name, alias = parsed["name"], parsed["alias"]
    configure_mlflow()
    client = MlflowClient()
    try:
        found = (
            client.get_model_version_by_alias(name, alias) if alias
            else client.get_model_version(name, parsed["version"])
        )
        experiment_id = client.get_run(str(found.run_id)).info.experiment_id
        experiment = str(client.get_experiment(experiment_id).name)
        location = client.get_model_version_download_uri(name, str(found.version))
        place = None if _local_folder(location) else tempfile.mkdtemp(dir=_fetched())
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=place))
    except (MlflowException, OSError) as error:
        told = isinstance(error, MlflowException) and (is_missing(error) or is_refusal(error))
        raise store_error(
            f"model {uri}: not read from {mlflow.get_tracking_uri()}", error,
            _known_versions(client, name) if told else "check that it is up",
        ) from error
    return OpenedVersion(
        name, str(found.version), found.run_id, experiment, dict(found.tags), folder
    )


def tag_version(name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version; one that was deleted keeps none."""
    client = MlflowClient()
    with told_by_the_store(f"{name} version {version}"):
        for key, value in tags.items():
            _unless_gone(partial(client.set_model_version_tag, name, version, key, value))


def describe_version(name: str, version: str, text: str) -> None:
    """Set the description of a version, as Markdown; one that was deleted keeps none."""
    with told_by_the_store(f"{name} version {version}"):
        _unless_gone(partial(MlflowClient().update_model_version, name, version, text))


def set_alias(name: str, alias: str, version: str) -> None:
    """Point an alias at a version; at one that was deleted none can point."""
    with told_by_the_store(f"{name} version {version}"):
        _unless_gone(partial(MlflowClient().set_registered_model_alias, name, alias, version))


def drop_alias(name: str, alias: str) -> None:
    """Take an alias away."""
    with told_by_the_store(name):
        retried(lambda: MlflowClient().delete_registered_model_alias(name, alias))


def aliases_of(name: str) -> dict[str, str]:
    """Return the version that each alias of a model points at."""
    with told_by_the_store(f"model {name}"):
        found = retried(lambda: MlflowClient().get_registered_model(name))
    return {str(alias): str(version) for alias, version in found.aliases.items()}


def tags_of_version(name: str, version: str) -> dict[str, str] | None:
    """Return a version's tags; None if the registry has no such version."""
    with told_by_the_store(f"{name} version {version}"):
        try:
            return dict(retried(lambda: MlflowClient().get_model_version(name, version)).tags)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None


def acting_user() -> str:
    """Return who is at work: the tracking server's user, else the machine's, and the machine."""
    name = read_mlflow_creds().username or getpass.getuser()
    return f"{name}@{socket.gethostname()}"


def _unless_gone(call: Callable[[], object]) -> None:
    try:
        retried(call)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise


def _known_versions(client: MlflowClient, name: str) -> str:
    """Say what of a model the registry has, for someone who asked for what it has not."""
    try:
        model = client.get_registered_model(name)
    except MlflowException:
        names = sorted(str(model.name) for model in client.search_registered_models())
        return f"there are the models {', '.join(names)}" if names else "there is no model"
    aliases = ", ".join(f"@{alias} = {version}" for alias, version in model.aliases.items())
    return f"{name} has the aliases {aliases}" if aliases else f"{name} has no alias"


def find_version(name: str, run_id: str, checkpoint_sha256: str) -> RegisteredVersion | None:
    """Return the version that a run has of a checkpoint, if there is one.

    A version is made after all of its files are there, so that it is whole.
    """
    client = MlflowClient()
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get(CHECKPOINT_TAG) == checkpoint_sha256:
            opened = open_version(f"models:/{name}/{version.version}")
            hashes = {path.name: file_digest(path) for path in opened.folder.iterdir()}
            return RegisteredVersion(name, str(version.version), hashes)
    return None


def register_checkpoint(
    name: str,
    files: Sequence[Path],
    run_id: str,
    step: int,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    description: str,
) -> RegisteredVersion:
    """Register files as a new version of `name`, which is there, with how MLflow loads them.

    Where the artifact store is on the same file system the files are hard links, not copies.
    """
    client = MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    model = mlflow.initialize_logged_model(
        name=f"{name}-step-{step}",
        source_run_id=run_id,
        model_type="checkpoint",
        params=dict(params),
        tags=dict(tags),
        experiment_id=experiment_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        placed = [*files, *describe_model(Path(folder), model.model_id, run_id)]
        hashes = {path.name: file_digest(path) for path in placed}
        _place_files(client, model.model_id, model.artifact_location, placed)
    mlflow.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    version = client.create_model_version(
        name,
        f"models:/{model.model_id}",
        run_id,
        dict(tags),
        description=description,
        model_id=model.model_id,
    )
    return RegisteredVersion(name, str(version.version), hashes)


def _place_files(
    client: MlflowClient, model_id: str, location: str, files: Sequence[Path]
) -> None:
    """Link each file into a local artifact store, or upload it."""
    folder = _local_folder(location)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        if folder is None or not _linked(path, folder / path.name):
            client.log_model_artifact(model_id, str(path))


def _local_folder(location: str) -> Path | None:
    """Return the folder that an address in an artifact store is; None where it is none here."""
    parsed = urlparse(location)
    return Path(unquote(parsed.path)) if parsed.scheme in ("", "file") else None


@cache
def _fetched() -> Path:
    """Return a folder for what this process fetches, which is removed as it ends."""
    folder = Path(tempfile.mkdtemp(prefix="svend-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _linked(path: Path, place: Path) -> bool:
    """Make a hard link; return False where the file system is another, or knows none."""
    try:
        os.link(path, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        return False
    return True
