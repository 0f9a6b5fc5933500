"""Writing files so that readers, crashes and full disks never leave half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".writing"


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
