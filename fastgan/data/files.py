"""Folders and zip archives of image files."""

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image

from fastgan.data.decode import SUFFIXES, open_image
from fastgan.data.sources import Item, Listing
from fastgan.errors import DataError

MAX_FILE_BYTES = 512 * 2**20
"""No archive member larger than this is unpacked: a few kilobytes of zip can claim to hold terabytes."""


class FolderSource:
    """Every image below a folder, in the order of the sorted paths.

    The tree is walked once to count it and once more to read it, so that a million names are never held
    together. Links are followed; a folder that is met twice is read once.
    """

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = str(folder)
        self._length = 0
        listing = Listing()
        ignored: Counter[str] = Counter()
        folders: set[str] = set()
        for path, status in _walk(self._folder, ignored):
            listing.add(path, status.st_size, status.st_mtime_ns, status.st_mode)
            folders.add(os.path.dirname(path))
            self._length += 1
        self.ignored = ignored.total()
        if not self._length:
            raise DataError(_no_images(self.name, ignored))
        self._listing = listing.hexdigest()
        self.identity = f"folder {os.path.realpath(folder)} {self._listing}"
        self.classes, self._labels = class_labels(folders)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        listing = Listing()
        for path, status in _walk(self._folder, Counter()):
            listing.add(path, status.st_size, status.st_mtime_ns, status.st_mode)
            label = self._labels.get(os.path.dirname(path), -1)
            yield Item(path, label, partial(open_image, os.path.join(self._folder, path)))
        if listing.hexdigest() != self._listing:
            raise DataError(f"{self.name} changed while it was being read; start again when it is complete")


class ZipSource:
    """Every image in a zip archive, in the order of the sorted paths. Nothing is ever unpacked to disk.

    Python's zipfile holds the archive's table of contents in memory, about 600 bytes for each file in it.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"{path} cannot be read as a zip archive: {error}") from error
        ignored: Counter[str] = Counter()
        self._members = []
        for member in self._archive.infolist():
            if member.is_dir():
                continue
            if _is_image(*PurePosixPath(member.filename.replace("\\", "/")).parts):
                self._members.append(member)
            else:
                ignored[PurePosixPath(member.filename).suffix.lower()] += 1
        self.ignored = ignored.total()
        if not self._members:
            raise DataError(_no_images(self.name, ignored))
        self._members.sort(key=lambda member: member.filename.split("/"))
        status = os.stat(path)
        self.identity = f"zip {os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"
        self.classes, self._labels = class_labels(
            {os.path.dirname(m.filename) for m in self._members if _stays_inside(m.filename)}
        )

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Item]:
        for member in self._members:
            label = self._labels.get(os.path.dirname(member.filename), -1)
            yield Item(member.filename, label, partial(self._open, member))

    def _open(self, member: zipfile.ZipInfo) -> Image.Image:
        if not _stays_inside(member.filename):
            raise ValueError("its path leads out of the archive")
        if member.file_size > MAX_FILE_BYTES:
            raise ValueError(f"unpacks to {member.file_size} bytes, the limit is {MAX_FILE_BYTES}")
        return open_image(BytesIO(self._archive.read(member)))


def class_labels(folders: Collection[str]) -> tuple[list[str], dict[str, int]]:
    """Classes, and the class of each folder: the first path component in which the folders differ.

    There are no classes where all images lie in one folder, or some beside the folders of the others.
    """
    if not folders:
        return [], {}
    parts = {folder: tuple(filter(None, folder.split("/"))) for folder in folders}
    first, last = min(parts.values()), max(parts.values())  # what these two share, all share
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    if any(len(p) == depth for p in parts.values()):
        return [], {}
    classes = sorted({p[depth] for p in parts.values()})
    index = {name: i for i, name in enumerate(classes)}
    return classes, {folder: index[p[depth]] for folder, p in parts.items()}


def _walk(root: str, ignored: Counter[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Image files below `root`, as sorted paths relative to it."""
    seen: set[tuple[int, int]] = set()

    def visit(below: str) -> Iterator[tuple[str, os.stat_result]]:
        folder = os.path.join(root, below)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                names = sorted((entry.name, entry.is_dir()) for entry in entries)
        except OSError as error:
            raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from error
        for name, is_folder in names:
            path = f"{below}/{name}" if below else name
            if is_folder and not name.startswith("."):
                yield from visit(path)
            elif not is_folder and _is_image(name) and (found := _regular(os.path.join(root, path))):
                yield path, found
            else:
                ignored[os.path.splitext(name)[1].lower()] += 1

    return visit("")


def _regular(path: str) -> os.stat_result | None:
    """Status of a file; None for a dangling link, or a pipe on which reading would wait for ever."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _is_image(*parts: str) -> bool:
    hidden = any((p.startswith(".") and p != "..") or p == "__MACOSX" for p in parts)
    return not hidden and os.path.splitext(parts[-1])[1].lower() in SUFFIXES


def _stays_inside(name: str) -> bool:
    return not (name.startswith(("/", "\\")) or ":" in name.split("/")[0] or ".." in name.replace("\\", "/").split("/"))


def _no_images(name: str, ignored: Counter[str]) -> str:
    if not ignored:
        return f"{name} is empty; expected images ({' '.join(sorted(SUFFIXES))})"
    found = ", ".join(f"{count} {suffix or 'without ending'}" for suffix, count in ignored.most_common(5))
    endings = " ".join(sorted(SUFFIXES))
    return f"no images in {name}: its {ignored.total()} files ({found}) have none of the endings {endings}"
