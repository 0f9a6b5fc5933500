"""The errors that a user can mend. Commands print them as one line and exit with 2; the API raises them."""


class FastganError(Exception):
    """Something the user gave, or the machine lacks: the message says what was expected, what came, what
    to do."""


class DataError(FastganError):
    """A data source or an image file that cannot be used."""


class CheckpointError(FastganError):
    """A checkpoint that is missing, cut short, of another architecture or of a newer version."""


class BackendError(FastganError):
    """A backend was asked for by name and cannot run; the message says why and how to get it."""
