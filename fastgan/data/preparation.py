"""From a data source to prepared images: find out what it is, decode it once, in parallel, in order."""

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastgan.data.arrays import idx_source, npy_source, npz_source
from fastgan.data.cache import FORMAT, DataWarning, PreparedImages, Store, cached
from fastgan.data.decode import CROPS, square, stored_side
from fastgan.data.files import FolderSource, ZipSource
from fastgan.data.sources import Item, Source
from fastgan.data.torchvision_source import PREFIX, TorchvisionSource
from fastgan.errors import DataError

MAX_IMAGE_SIZE = 4096
_DIGITS = Path(__file__).parent / "digits"
_MAX_WORKERS = 16
_BLOCK_BYTES = 4 * 2**20


def prepare(
    source: str | os.PathLike | None,
    image_size: int,
    *,
    channels: int | None = None,
    crop: str = "center",
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedImages:
    """Decode all images of a source to uint8 [N, S, S, C] once; later calls map the result from the cache.

    source: None or "digits" (10,000 bundled MNIST digits), a folder or a .zip of images (sub-folders are
    classes), an IDX file (gzipped or not), a .npy or .npz file, or "torchvision:NAME".
    image_size: side of the square images in pixels, 1 to 4096.
    channels: 1, 3 or 4; None takes 1 if no image has colour, else 3.
    crop: "center" (largest centred square), "random" (the same, but S is 1/8 larger than image_size and
    `Batches` cuts at random), "none" (whole image, aspect ratio ignored).
    cache_dir: default $FASTGAN_CACHE, else ~/.cache/fastgan.
    progress: called as progress(done, total) while decoding, with numbers of images.

    Images keep the order of their sorted paths. They are turned as their EXIF orientation says; transparency
    is laid over white unless 4 channels are asked for; 16 bits are rounded to 8; of animations the first
    frame counts; colour profiles are ignored. Files that cannot be read are skipped and listed in
    `skipped`; a DataWarning says so, and another how many images had to be enlarged.

    Raises DataError: nothing usable in the source, an unknown argument value, a cache that cannot be written.
    """
    _check_arguments(image_size, channels, crop)
    opened = open_source(source)
    facts = (FORMAT, opened.identity, image_size, channels, crop, Image.MAX_IMAGE_PIXELS)
    key = hashlib.blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    side = stored_side(image_size, crop)

    def build(file: IO[bytes]) -> PreparedImages:
        store = Store(file, side, channels)
        skipped: list[tuple[str, str]] = []
        enlarged = 0
        with _pillow_silenced():
            for done, (item, result) in enumerate(_decoded(opened, side, channels, crop), 1):
                if isinstance(result, str):
                    skipped.append((item.name, result))
                else:
                    pixels, was_small = result
                    store.add(pixels, item.label)
                    enlarged += was_small
                if progress and (done % 64 == 0 or done == len(opened)):
                    progress(done, len(opened))
        if len(skipped) == len(opened):
            raise DataError(f"none of the {len(opened)} images in {opened.name} can be read; {_examples(skipped)}")
        images, labels, fingerprint = store.finish()
        return PreparedImages(
            images=images,
            labels=labels,
            classes=opened.classes if labels is not None else [],
            source=opened.name,
            image_size=image_size,
            crop=crop,
            fingerprint=fingerprint,
            skipped=skipped,
            ignored=opened.ignored,
            enlarged=enlarged,
        )

    prepared = cached(key, cache_dir, len(opened) * side * side * (channels or 1), build)
    if prepared.skipped:
        warnings.warn(
            f"{len(prepared.skipped)} of {len(opened)} images in {prepared.source} cannot be read and "
            f"are left out; {_examples(prepared.skipped)}",
            DataWarning,
            stacklevel=2,
        )
    if prepared.enlarged:
        warnings.warn(
            f"{prepared.enlarged} of {len(prepared)} images in {prepared.source} are smaller than "
            f"{side} x {side} pixels and were enlarged; a smaller image size shows them as they are",
            DataWarning,
            stacklevel=2,
        )
    return prepared


def open_source(source: str | os.PathLike | None) -> Source:
    """Recognise a source and read its listing or header. Raises DataError naming it."""
    if source is None or source == "digits":
        return idx_source(_DIGITS / "t10k-images-idx3-ubyte.gz", name="10,000 MNIST digits (bundled)")
    if isinstance(source, str) and source.startswith(PREFIX):
        return TorchvisionSource(source)
    path = Path(source).expanduser()
    kinds = "a folder or .zip of images, an IDX file, .npy, .npz, torchvision:NAME, or digits (bundled)"
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise DataError(f"there is no {path}; expected {kinds}")
    match path.suffix.lower():
        case ".zip":
            return ZipSource(path)
        case ".npy":
            return npy_source(path)
        case ".npz":
            return npz_source(path)
    try:
        return idx_source(path)
    except DataError as error:
        raise DataError(f"{error}; expected {kinds}") from error


def _check_arguments(image_size: int, channels: int | None, crop: str) -> None:
    if not isinstance(image_size, int) or isinstance(image_size, bool) or not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise DataError(f"image_size: expected a whole number of pixels from 1 to {MAX_IMAGE_SIZE}, got {image_size!r}")
    if channels not in (None, 1, 3, 4):
        raise DataError(f"channels: expected 1, 3, 4 or None (decided from the images), got {channels!r}")
    if crop not in CROPS:
        raise DataError(f"crop: expected one of {', '.join(CROPS)}, got {crop!r}")


Decoded = tuple[np.ndarray, bool] | str
"""Pixels and whether they were enlarged, or the reason why there are none."""


def _decoded(source: Source, side: int, channels: int | None, crop: str) -> Iterator[tuple[Item, Decoded]]:
    """All items in order, decoded by threads (Pillow releases the GIL) that run a bounded distance ahead."""
    workers = min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        _MAX_WORKERS,
    )
    step = max(1, min(64, _BLOCK_BYTES // (side * side * 4)))
    items = iter(source)
    pool = ThreadPoolExecutor(workers, "fastgan-decode")
    pending: deque[tuple[list[Item], Future[list[Decoded]]]] = deque()
    try:
        while True:
            while len(pending) < 3 * workers and (block := list(islice(items, step))):
                pending.append((block, pool.submit(_decode, block, side, channels, crop)))
            if not pending:
                return
            block, future = pending.popleft()
            yield from zip(block, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(items: list[Item], side: int, channels: int | None, crop: str) -> list[Decoded]:
    results: list[Decoded] = []
    for item in items:
        try:
            results.append(square(item.open(), side, channels, crop))
        except MemoryError:  # says nothing about the file
            raise
        except UnidentifiedImageError:
            results.append("not an image in a known format")
        except Exception as error:  # decoders meet damaged files with exceptions of every kind
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            results.append(reason or type(error).__name__)
    return results


@contextmanager
def _pillow_silenced() -> Iterator[None]:
    # Pillow warns of large images and of broken metadata without naming the file; what matters of it is an
    # error here, reported with the name. Filters belong to the process: set once, not in the threads.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _examples(skipped: list[tuple[str, str]]) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    return shown if len(skipped) <= 3 else f"{shown}; and {len(skipped) - 3} more"
