"""What a tracking store answers when it does not do what it was asked, as one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    CUSTOMER_UNAUTHORIZED,
    PERMISSION_DENIED,
    UNAUTHENTICATED,
    ErrorCode,
)
from mlflow.utils.credentials import read_mlflow_creds
from requests import RequestException

from svend.errors import PermissionRefused, TrackingError, reason_of

UNKNOWN_USER = (ErrorCode.Name(UNAUTHENTICATED), ErrorCode.Name(CUSTOMER_UNAUTHORIZED))
# A server that is reached by a name that it does not know answers 403 too.
WRONG_NAME = "Invalid Host header"
CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def store_error(what: str, error: Exception, remedy: str) -> TrackingError:
    """Return the line for something that a store did not do.

    what: the store, or what was asked of it. remedy: what to do, unless it is about who asked.
    """
    kind = PermissionRefused if is_forbidden(error) else TrackingError
    return kind(f"{what} ({store_reason(error)}); {_remedy(error) or remedy}")


@contextmanager
def told_by_the_store(subject: str) -> Iterator[None]:
    """Turn what MLflow raises into one line for the user."""
    try:
        yield
    except (MlflowException, OSError) as error:
        raise store_error(
            f"{subject}: the store {mlflow.get_tracking_uri()} did not do it", error,
            "check that it is up, and run the command again",
        ) from error


def as_user_error(error: Exception) -> TrackingError | None:
    """Return the line for an error that no command told by itself, if the user can mend it.

    That is a store that is away, and one that asks who is there.
    """
    if not isinstance(error, (MlflowException, RequestException)):
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RequestException):
        cause = cause.__cause__ or cause.__context__
    if cause is None and _remedy(error) is None:
        return None
    return store_error(
        f"tracking store {mlflow.get_tracking_uri()}: did not do what was asked", error,
        "check MLFLOW_TRACKING_URI and that the server is up",
    )


def store_reason(error: Exception) -> str:
    """Return why a store did not do something, in a line, in terms of who asked."""
    user = read_mlflow_creds().username
    if _is_unknown_user(error):
        return f"it does not take the password of {user}" if user else "it asks for a password"
    if is_forbidden(error):
        return f"{user} may not do that"
    return reason_of(error)


def is_access(error: Exception) -> bool:
    """Whether it is about who asks: the server does not know them, or does not let them."""
    return _is_unknown_user(error) or is_forbidden(error)


def is_forbidden(error: Exception) -> bool:
    """Whether the server knows who asks, and does not let them."""
    if WRONG_NAME in str(error):
        return False
    return (_error_code(error) == ErrorCode.Name(PERMISSION_DENIED)
            or _http_status(error) == 403)


def _is_unknown_user(error: Exception) -> bool:
    return _error_code(error) in UNKNOWN_USER or _http_status(error) == 401


def _remedy(error: Exception) -> str | None:
    """Return what to do about who asks; None where the answer is about something else."""
    if _is_unknown_user(error):
        return f"{'check' if read_mlflow_creds().username else 'set'} {CREDENTIALS}"
    if is_forbidden(error):
        return "whoever runs the server can give the permission (docs/server.md)"
    return None


def _error_code(error: Exception) -> str | None:
    return str(error.error_code) if isinstance(error, MlflowException) else None


def _http_status(error: Exception) -> int | None:
    """Return the status of an answer about artifacts, which MLflow passes on as it comes."""
    response = error.response if isinstance(error, RequestException) else None
    return None if response is None else int(response.status_code)
