"""Writing files: where it can be done, and so that readers, crashes and full disks never leave half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgan.errors import FastganError

MARK = ".writing"


def check_place(path: Path, option: str) -> None:
    """FastganError where `path`, which `option` gave, cannot become a file: to be asked before the work that it shall
    hold."""
    if path.is_dir():  # the empty name is the folder `.`
        raise FastganError(f"{option}: expected the name of a file, got the folder {path}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise FastganError(f"{option}: {path.parent} is not a folder that can be written to")


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, of the same suffix, that takes its place when the block ends without an error.

    `durable` waits until the content and the new name are on the disk. An OSError names `path`, which the user knows,
    not the temporary file.
    """
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{MARK}{path.suffix}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
