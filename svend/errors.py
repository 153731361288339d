"""The errors a user can mend: each is one line that says what is wrong, where, and what to do."""


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


class GateFailure(UserError, RuntimeError):
    """A required gate failed under strict validation."""


class Interrupted(Exception):
    """The user or the scheduler asked the process to stop; the run can be resumed."""
