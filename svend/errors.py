"""The errors a user can mend: each is one line that says what is wrong, where, and what to do."""

REASON_CHARACTERS = 200


class UserError(Exception):
    """A mistake, or a state of the machine, that the user can mend; shown without a traceback."""


class ConfigError(UserError, ValueError):
    """A key, value or combination in the configuration that is not allowed."""


class DataError(UserError, ValueError):
    """A data source that is missing, empty or malformed."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged or does not fit the model."""


class ResourceError(UserError, RuntimeError):
    """The machine lacks what the run needs: memory, disk, a device."""


class TrackingError(UserError, RuntimeError):
    """The tracking store cannot be reached or written."""


class PermissionRefused(TrackingError):
    """The tracking server knows who asks, and does not let them do that."""


class GateFailure(UserError, RuntimeError):
    """A required gate failed under strict validation."""


class DivergenceError(UserError, RuntimeError):
    """Training that cannot go on: step after step is skipped, or weights are not finite."""


class HealthError(UserError, RuntimeError):
    """A run that look after look is outside the bounds that the configuration sets its health."""


class RankLost(UserError, RuntimeError):
    """A process of the run has ended before the others."""


class TrialPruned(UserError):
    """A trial of a sweep that is not worth going on with; no failure."""


def one_line(message: object) -> str:
    """Return a message as one line of what a terminal shows and does not obey.

    A message names keys and files that strangers chose, with line breaks or escape sequences.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(str(message).split())
    )


def reason_of(error: BaseException) -> str:
    """Return why something failed, in a line: the system's word, else the message's first line."""
    said = str(getattr(error, "strerror", None) or error).strip()
    return one_line(said.partition("\n")[0])[:REASON_CHARACTERS] or type(error).__name__


class Interrupted(BaseException):
    """The user or the scheduler asked the process to stop.

    Like KeyboardInterrupt no Exception, so that no library takes it for an error and goes on.
    """
