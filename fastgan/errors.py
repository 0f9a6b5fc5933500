"""The errors that a user can mend. Commands print them as one line and exit with 2; the API raises them."""

import signal
from pathlib import Path


class FastganError(Exception):
    """Something the user gave, or the machine lacks: the message says what was expected, what came, what
    to do."""


class DataError(FastganError):
    """A data source or an image file that cannot be used."""


class CheckpointError(FastganError):
    """A checkpoint that is missing, cut short, of another architecture or of a newer version."""


class BackendError(FastganError):
    """A backend was asked for by name and cannot run; the message says why and how to get it."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run in `run_folder` was saved first. `exit_code` is what a shell expects of the signal."""

    def __init__(self, number: int, saved: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved {saved}")
        self.exit_code = 128 + number
        self.run_folder = saved.parent.parent
