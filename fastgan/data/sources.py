"""What every data source offers: a cheap identity, and its images one after another."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image


class Item(NamedTuple):
    """One image that has not been decoded yet."""

    name: str
    """How messages call it: a path below the source, or a name with an index."""
    label: int
    """Index into the source's `classes`, or -1 if it has no label."""
    open: Callable[[], Image.Image | np.ndarray]
    """Called once, in a worker thread: an image that Pillow has opened, or uint8 [H, W, C]."""


class Source(Protocol):
    """A place that images come from. Opening one reads listings and headers, never all the pixels."""

    name: str
    """Shown to people and in messages."""
    classes: list[str]
    ignored: int
    """Hidden files and files that are no images, which are passed over without a word."""
    identity: str
    """Changes whenever a file is added, removed, renamed or modified; part of the cache's key."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class Listing:
    """A running digest of file names, sizes and modification times."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, *facts: object) -> None:
        self._digest.update("\0".join(map(str, facts)).encode("utf-8", "surrogateescape") + b"\n")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
