"""A tracking server for a team: MLflow's own, on PostgreSQL, that asks who is there.

    pip install 'svend[server]'
    export MLFLOW_AUTH_ADMIN_PASSWORD=...                       # for the first start
    python docs/examples/tracking_server.py serve --database postgresql://mlflow@127.0.0.1/mlflow
    python docs/examples/tracking_server.py user ada --may train

`serve` checks what is needed and becomes `mlflow server`; run again, it goes on with the same data.
`user` adds people and says what they may do. docs/server.md has the rest.
"""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import ipaddress
import logging
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import psycopg
    from mlflow.server.auth.client import AuthServiceClient

# Whoever has no role reads. A role is good for all that there is, and all to come.
DEFAULT_PERMISSION = "READ"
ROLES = {"train": "EDIT", "manage": "MANAGE"}
GRANTED_ON = ("experiment", "registered_model")
WORKSPACE = "default"  # the only one, unless MLflow is told of others
# Checking a password anew at each request costs more than most requests do. The price: after a
# change the other workers take the former password for so long.
PASSWORD_CACHE_SECONDS = 60
CONNECT_SECONDS = 10
# MLflow's own rules, looked at before it starts, which takes long and fails at length.
PASSWORD_CHARACTERS, SHIPPED_PASSWORD = 12, "password1234"
# The package for a kind of artifact store; what other kinds need, MLflow says.
STORE_PACKAGES = {"s3": "boto3", "gs": "google-cloud-storage"}
MODULES = {"flask-wtf": "flask_wtf", "google-cloud-storage": "google.cloud.storage"}


class Refusal(Exception):
    """What stops a command: what is wrong, and what to do, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    options = _parse(arguments)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    try:
        for package in ("flask-wtf", "psycopg"):
            _require(package, "pip install 'svend[server]'")
        if options.command == "serve":
            serve(options)
        change_user(options)
    except Refusal as refusal:
        print(f"error: {' '.join(str(refusal).split())}", file=sys.stderr)
        return 1
    return 0


def serve(options: argparse.Namespace) -> NoReturn:
    """Check what the server needs, and become it."""
    _check_port(options.host, options.port)
    database = _checked_database(options.database)
    artifacts = _checked_store(options.artifacts or str(options.folder / "artifacts"))
    if not _is_loopback(options.host):
        print(f"warning: {options.host} is open to other machines, and passwords travel in clear; "
              "put TLS in front and keep 127.0.0.1 (docs/server.md)", file=sys.stderr, flush=True)
    os.environ |= {
        # By the environment: other users of this machine see the options of its processes.
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_AUTH_CONFIG_PATH": str(_write_settings(options.folder, database)),
        # Signs the forms of MLflow's pages. A new one at each start does no more than close open
        # forms; several servers behind one address must share one.
        "MLFLOW_FLASK_SERVER_SECRET_KEY":
            os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY") or secrets.token_hex(32),
    }
    # Jobs are what MLflow judges chats with by other models.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    names = [name for host in ("127.0.0.1", "localhost", *options.name)
             for name in (host, f"{host}:*")]
    arguments = [
        "--app-name", "basic-auth", "--artifacts-destination", artifacts,
        "--host", options.host, "--port", str(options.port), "--workers", str(options.workers),
        "--allowed-hosts", ",".join(names),
    ]
    if options.name:
        origins = ",".join(f"https://{name}" for name in options.name)
        arguments += ["--cors-allowed-origins", origins]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *arguments])


def change_user(options: argparse.Namespace) -> None:
    """Add a user, change a password or what the user may do, or take the user away."""
    warnings.simplefilter("ignore")  # of MLflow, about what it is made of
    from mlflow.exceptions import MlflowException
    from mlflow.server.auth.client import AuthServiceClient

    client = AuthServiceClient(options.server)
    try:
        known = _is_known(client, options.user)
        if options.remove:
            if not known:
                raise Refusal(f"user {options.user}: {options.server} knows nobody of this name")
            client.delete_user(options.user)
            print(f"{options.user}: gone")
            return
        if not known:
            client.create_user(options.user, _ask_password(options.user))
        elif options.new_password:
            client.update_user_password(options.user, _ask_password(options.user))
        if options.may is not None:
            _give_role(client, options.user, options.may)
        held = [role.name for role in client.list_user_roles(options.user) if role.name in ROLES]
    except MlflowException as error:
        hints = {"UNAUTHENTICATED": "give its admin's name and password by "
                                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
                 "PERMISSION_DENIED": "only its admin may do that"}
        raise Refusal(
            f"server {options.server}: {hints.get(error.error_code, error.message)}"
        ) from error
    print(f"{options.user}: {'known' if known else 'added'}, may {held[0] if held else 'read'}")


def _is_known(client: AuthServiceClient, name: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_user(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _give_role(client: AuthServiceClient, user: str, may: str) -> None:
    """Let a user have one role of ours, or none, which is to read; make it where it is missing."""
    made = {role.name: role for role in client.list_roles(WORKSPACE)}
    held = {role.name for role in client.list_user_roles(user)}
    for name, permission in ROLES.items():
        if name == may:
            role = made.get(name) or client.create_role(WORKSPACE, name)
            granted = {grant.resource_type for grant in role.permissions}
            for kind in GRANTED_ON:
                if kind not in granted:
                    client.add_role_permission(role.id, kind, "*", permission)
            if name not in held:
                client.assign_role(user, role.id)
        elif name in held:
            client.unassign_role(user, made[name].id)


def _ask_password(name: str) -> str:
    """Ask for a password, which a script gives by standard input."""
    if sys.stdin.isatty():
        return getpass.getpass(f"password for {name}: ")
    return sys.stdin.readline().rstrip("\n")


def _require(package: str, install: str) -> None:
    module = MODULES.get(package, package)
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    if not found:
        raise Refusal(f"the package {package} is missing here: {install}")


def _checked_database(address: str | None) -> str:
    """Return SQLAlchemy's address of a PostgreSQL that answers."""
    import psycopg
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    if not address:
        raise Refusal("no database: give --database postgresql://USER@HOST/NAME")
    try:
        url = make_url(address)
    except ArgumentError:
        raise Refusal("--database is no address: give postgresql://USER@HOST/NAME") from None
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() != "postgresql":
        raise Refusal(f"--database {shown}: is no PostgreSQL, which several people need; "
                      "give postgresql://USER@HOST/NAME")
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        with psycopg.connect(plain, connect_timeout=CONNECT_SECONDS) as connection:
            _check_admin_password(connection)
    except psycopg.Error as error:
        raise Refusal(f"--database {shown}: {error}; is PostgreSQL up, and the database made "
                      "(createdb)? a password belongs into ~/.pgpass or PGPASSWORD") from None
    return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def _checked_store(place: str) -> str:
    """Return the address of the artifact store; a folder is made."""
    scheme, separator, _ = place.partition("://")
    if separator and scheme != "file":
        if scheme in STORE_PACKAGES:
            package = STORE_PACKAGES[scheme]
            _require(package, f"pip install {package}, for --artifacts {place}")
        return place
    folder = Path(place.removeprefix("file://")).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--artifacts {folder}: {error.strerror}; give a folder that can be "
                      "written") from None
    if not os.access(folder, os.W_OK):
        raise Refusal(f"--artifacts {folder}: may not be written by this user")
    return str(folder)


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the server does: a port whose connections are only dying out is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise Refusal(f"--host {host} --port {port}: {error.strerror}; another server may have "
                      "it, give another --port") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _write_settings(folder: Path, database: str) -> Path:
    """Write MLflow's settings of users and permissions, anew at each start; return their place."""
    settings = ConfigParser(interpolation=None)
    settings["mlflow"] = {
        "default_permission": DEFAULT_PERMISSION,
        # MLflow reads a % as a reference.
        "database_uri": database.replace("%", "%%"),
        "admin_username": "admin",
        "auth_cache_ttl_seconds": str(PASSWORD_CACHE_SECONDS),
    }
    place = (folder / "basic_auth.ini").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The database's address may have a password.
        place.touch(0o600)
        with place.open("w", encoding="utf-8") as stream:
            settings.write(stream)
    except OSError as error:
        raise Refusal(f"--folder {folder}: {error.strerror}; give one that can be "
                      "written") from None
    return place


def _check_admin_password(connection: psycopg.Connection) -> None:
    """Refuse a server whose admin would have to be made without a password, or with a known one."""
    name = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME") or "admin"
    (users,) = connection.execute("SELECT to_regclass('users')").fetchone() or (None,)
    if users is not None and connection.execute(
        "SELECT 1 FROM users WHERE username = %s", [name]
    ).fetchone():
        return
    password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    if len(password) < PASSWORD_CHARACTERS or password == SHIPPED_PASSWORD:
        wrong = ("is not set", "is too short", "is the one that MLflow shipped once")[
            bool(password) + (password == SHIPPED_PASSWORD)]
        raise Refusal(f"MLFLOW_AUTH_ADMIN_PASSWORD {wrong}: the first start makes the user {name}, "
                      f"whose password has {PASSWORD_CHARACTERS} characters or more")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve", help="start the server, in the foreground")
    server.add_argument("--database", default=os.environ.get("MLFLOW_BACKEND_STORE_URI"),
                        metavar="URL", help="postgresql://USER@HOST/NAME")
    server.add_argument("--artifacts", metavar="PLACE",
                        help="a folder (artifacts in --folder), or s3://BUCKET/PATH")
    server.add_argument("--folder", type=Path, default=Path("tracking-server"),
                        help="what the server keeps on this machine (tracking-server)")
    server.add_argument("--host", default="127.0.0.1",
                        help="where it listens: 127.0.0.1, so that only this machine reaches it")
    server.add_argument("--port", type=int, default=5000)
    server.add_argument("--workers", type=int, default=2)
    server.add_argument("--name", action="append", default=[], metavar="HOST",
                        help="a name by which others reach it, through a proxy with TLS")
    user = commands.add_parser("user", help="add a user, or change one, as the server's admin")
    user.add_argument("user", metavar="NAME")
    user.add_argument("--may", choices=("read", *ROLES),
                      help="read, for one who is new, unless another is given")
    user.add_argument("--new-password", action="store_true")
    user.add_argument("--remove", action="store_true")
    user.add_argument("--server", metavar="URL",
                      default=os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
