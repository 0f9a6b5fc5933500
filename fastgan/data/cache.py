"""Prepared images on disk: an entry for each source and preparation, written once, then mapped."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastgan.errors import DataError
from fastgan.files import sync

FORMAT = 1
"""Raised whenever the files below, or the pixels that a preparation gives, change."""

_IMAGES, _LABELS, _META = "images.u8", "labels.npy", "meta.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STALE_SECONDS = 24 * 3600
_BLOCK_BYTES = 16 * 2**20


class DataWarning(UserWarning):
    """Images can be used, but not quite as someone may expect: some skipped, some enlarged, nothing cached."""


@dataclass(frozen=True)
class PreparedImages:
    """Decoded images of one size, ready to be drawn from."""

    images: np.ndarray
    """uint8 [N, S, S, C], mapped from disk; S is `image_size`, for random crops 1/8 larger."""
    labels: np.ndarray | None
    """int64 [N], indices into `classes`, -1 for an image without one; None if no image has one."""
    classes: list[str]
    source: str
    """Where the images come from, for people."""
    image_size: int
    crop: str
    fingerprint: str
    """Hexadecimal digest of shape, pixels and labels: equal means that training sees the same data."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Files that could not be read, each with the reason."""
    ignored: int = 0
    """Hidden files and files that are no images."""
    enlarged: int = 0
    """Images that were smaller than they had to become."""

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    def __len__(self) -> int:
        return len(self.images)


class Store:
    """Collects images one after another in a file, so that memory does not grow with their number."""

    def __init__(self, file: IO[bytes], side: int, channels: int | None) -> None:
        self._file = file
        self._side = side
        self._fixed = channels is not None
        self._channels = channels or 1
        self._labels = array("q")

    def add(self, pixels: np.ndarray, label: int) -> None:
        """Append uint8 [S, S, C]; where the number of channels is open, the first image in colour decides."""
        if not self._fixed and pixels.shape[2] == 3:
            self._widen()
        if pixels.shape[2] < self._channels:
            pixels = np.broadcast_to(pixels, (self._side, self._side, self._channels))
        self._file.write(np.ascontiguousarray(pixels).data)
        self._labels.append(label)

    def finish(self) -> tuple[np.ndarray, np.ndarray | None, str]:
        """Images, labels and fingerprint of all that was added."""
        self._file.flush()
        labels = np.array(self._labels, np.int64)
        shape = (len(labels), self._side, self._side, self._channels)
        images = np.memmap(self._file, np.uint8, "r", shape=shape)
        digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
        step = max(1, _BLOCK_BYTES // images[0].size)
        for start in range(0, len(images), step):
            digest.update(np.ascontiguousarray(images[start : start + step]).data)
        digest.update(labels.data)
        return images, labels if (labels >= 0).any() else None, digest.hexdigest()

    def _widen(self) -> None:
        """Turn the grayscale images so far into RGB, in place, from the last to the first."""
        self._fixed, self._channels = True, 3
        size = self._side**2
        step = max(1, _BLOCK_BYTES // (3 * size))
        for stop in range(len(self._labels), 0, -step):
            start = max(0, stop - step)
            self._file.seek(start * size)
            grey = np.frombuffer(self._file.read((stop - start) * size), np.uint8)
            self._file.seek(3 * start * size)
            self._file.write(np.repeat(grey, 3).data)
        self._file.seek(3 * len(self._labels) * size)


def cached(
    key: str, cache_dir: str | os.PathLike | None, needed: int, build: Callable[[IO[bytes]], PreparedImages]
) -> PreparedImages:
    """The entry `key`, after building it if it is not there; `needed` is its expected size in bytes.

    An entry appears under its name only when it is complete and on disk. Where the default folder cannot be
    written to, the images are prepared in an unnamed file for this process alone, with a warning; a folder
    that was chosen (`cache_dir`, FASTGAN_CACHE) must work.
    """
    chosen = cache_dir or os.environ.get("FASTGAN_CACHE")
    root = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fastgan"
    entry = root / f"images-{key}"  # compiled code is cached in the same folder
    found = _load(entry)
    if found is not None:
        return found
    temporary = root / f".{entry.name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        temporary.mkdir()
    except OSError as error:
        problem = f"the cache folder {root} cannot be written to ({error.strerror})"
        if chosen:
            raise DataError(f"{problem}; choose another one, or leave the choice to fastgan") from error
        advice = "images are decoded anew in each run until FASTGAN_CACHE names another"
        warnings.warn(f"{problem}; {advice}", DataWarning, stacklevel=3)
        with _room(Path(tempfile.gettempdir()), needed), tempfile.TemporaryFile() as file:
            return build(file)
    try:
        with _room(root, needed):
            with open(temporary / _IMAGES, "x+b") as file:
                prepared = build(file)
                os.fsync(file.fileno())
            _save(temporary, prepared)
            _rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _load(entry) or prepared


def _load(entry: Path) -> PreparedImages | None:
    """The entry, or None if there is none or it is not whole."""
    try:
        meta = json.loads((entry / _META).read_text())
        shape, labelled = tuple(meta.pop("shape")), meta.pop("labelled")
        if (entry / _IMAGES).stat().st_size != np.prod(shape, dtype=np.int64):
            return None
        images = np.memmap(entry / _IMAGES, np.uint8, "r", shape=shape)
        labels = np.load(entry / _LABELS, mmap_mode="r") if labelled else None
        if labels is not None and labels.shape != shape[:1]:
            return None
        meta["skipped"] = [(name, reason) for name, reason in meta["skipped"]]
        return PreparedImages(images, labels, **meta)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _save(folder: Path, prepared: PreparedImages) -> None:
    """Write what stands beside the images, and see that all of it is on disk."""
    meta: dict[str, Any] = {name: value for name, value in vars(prepared).items() if name not in ("images", "labels")}
    meta |= {"shape": prepared.images.shape, "labelled": prepared.labels is not None}
    if prepared.labels is not None:
        with open(folder / _LABELS, "xb") as file:
            np.save(file, prepared.labels)
            file.flush()
            os.fsync(file.fileno())
    with open(folder / _META, "x") as text:
        json.dump(meta, text)
        text.flush()
        os.fsync(text.fileno())
    sync(folder)


def _rename(temporary: Path, entry: Path) -> None:
    if entry.exists() and _load(entry) is None:  # damaged, or cut short by a crash of the whole machine
        shutil.rmtree(entry, ignore_errors=True)
    try:
        temporary.rename(entry)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return  # another process was first with the same content
    sync(entry.parent)


@contextmanager
def _room(folder: Path, needed: int) -> Iterator[None]:
    """Refuse at once what cannot fit, and explain a failure to write."""
    free = shutil.disk_usage(folder).free
    advice = "free some space, or set FASTGAN_CACHE to a folder on another disk"
    if free < needed:
        raise DataError(f"the prepared images need {needed} bytes, {folder} has {free} left; {advice}")
    try:
        yield
    except OSError as error:
        reason = f"the disk is full ({error.strerror})" if error.errno in _FULL else error.strerror
        raise DataError(
            f"the prepared images (about {needed} bytes) cannot be written to {folder}: {reason}; {advice}"
        ) from error


def _remove_stale(root: Path) -> None:
    """Clear away what killed processes left behind, once it is a day old."""
    for left in root.glob(".images-*"):
        try:
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(left)
        except OSError:
            continue  # another process is at it, or it belongs to someone else
