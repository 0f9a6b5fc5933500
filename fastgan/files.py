"""Writing files so that readers, crashes and full disks never leave half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".writing"


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, of the same suffix, that takes its place when the block ends without an error.

    `durable` waits until the content and the new name are on the disk. An OSError without a file name gets `path`'s.
    """
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{MARK}{path.suffix}")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
