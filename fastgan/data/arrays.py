"""Images that are stored as one array: IDX (the MNIST family), .npy and .npz."""

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from fastgan.data.sources import Item, Listing
from fastgan.errors import DataError

_BLOCK_BYTES = 4 * 2**20
_IMAGE_KEYS = ("images", "x", "x_train", "data", "arr_0")
_LABEL_KEYS = ("labels", "label", "y", "y_train", "arr_1")

MNIST_SHAPE = (28, 28)
MNIST_MARGIN = 2


class Stored(NamedTuple):
    """An array inside a file: what its header says, and the stream that its values follow in."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stream: IO[bytes]


class ArraySource:
    """uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] with 1, 3 or 4 channels, read as a stream.

    `margin` rows and columns of zeros are put around each image.
    """

    ignored = 0

    def __init__(
        self,
        name: str,
        files: list[Path],
        open_array: Callable[[], Stored],
        labels: np.ndarray | None = None,
        margin: int = 0,
    ) -> None:
        self.name = name
        self._open = open_array
        self._margin = margin
        with _explained(name):
            stored = open_array()
            stored.stream.close()
        self._shape, self._channels_first = _layout(name, stored)
        listing = Listing()
        for file in files:
            stat = os.stat(file)
            listing.add(os.path.realpath(file), stat.st_size, stat.st_mtime_ns)
        self.identity = f"array {listing.hexdigest()} margin {margin}"
        self.classes, self._labels = _classes(name, labels, len(self))

    def __len__(self) -> int:
        return self._shape[0]

    def __iter__(self) -> Iterator[Item]:
        image_bytes = math.prod(self._shape[1:])
        step = max(1, _BLOCK_BYTES // image_bytes)
        with _explained(self.name):
            stream = self._open().stream
        with stream:
            for start in range(0, len(self), step):
                count = min(step, len(self) - start)
                with _explained(self.name):
                    values = stream.read(count * image_bytes)
                if len(values) < count * image_bytes:
                    raise DataError(
                        f"{self.name} is cut short: its header promises {len(self)} images of {image_bytes} "
                        f"bytes, it ends inside image {start + len(values) // image_bytes}"
                    )
                block = np.frombuffer(values, np.uint8).reshape(count, *self._shape[1:])
                if self._channels_first:
                    block = block.transpose(0, 2, 3, 1)
                for index, image in enumerate(pad(block, self._margin), start):
                    label = -1 if self._labels is None else int(self._labels[index])
                    yield Item(f"{self.name}[{index}]", label, partial(np.ascontiguousarray, image))


def pad(images: np.ndarray, margin: int) -> np.ndarray:
    """[N, H, W] or [N, H, W, C] with a margin of zeros around each image, as [N, H, W, C]."""
    images = images if images.ndim == 4 else images[..., None]
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0))) if margin else images


def idx_source(path: Path, labels: Path | None = None, name: str | None = None) -> ArraySource:
    """IDX images, gzipped or not; labels are looked for beside them (...images-idx3... -> ...labels-idx1...).

    Images of 28 x 28, the size of the whole MNIST family, are padded to 32 x 32 with their background value
    0: every pixel stays as it was drawn, where resizing by 8/7 would blur each stroke.
    """
    labels = labels or _idx_labels_beside(path)
    values = None
    if labels is not None:
        with _explained(str(labels)):
            stored = open_idx(labels)
            with stored.stream as stream:
                data = stream.read()
        if len(data) != math.prod(stored.shape):
            raise DataError(f"{labels} is cut short: its header promises {stored.shape} labels, {len(data)} follow")
        values = np.frombuffer(data, np.uint8).reshape(stored.shape)
    with _explained(str(path)):
        stored = open_idx(path)
        stored.stream.close()
    margin = MNIST_MARGIN if stored.shape[1:] == MNIST_SHAPE else 0
    files = [path] if labels is None else [path, labels]
    return ArraySource(name or str(path), files, partial(open_idx, path), values, margin)


def open_idx(path: Path) -> Stored:
    """Read the header of an IDX file: 0, 0, type, dimensions, then each dimension as a big-endian int32."""
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    stream = cast(IO[bytes], (gzip.open if gzipped else open)(path, "rb"))
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or not 1 <= head[3] <= 4:
        stream.close()
        raise ValueError(f"it does not begin like an IDX file (0, 0, type, dimensions) but with {list(head)}")
    sizes = stream.read(4 * head[3])
    if head[2] != 8 or len(sizes) < 4 * head[3]:
        stream.close()
        raise ValueError("only unsigned bytes (type 8) are read" if head[2] != 8 else "it ends inside its header")
    return Stored(tuple(np.frombuffer(sizes, ">i4").tolist()), np.dtype(np.uint8), stream)


def npy_source(path: Path) -> ArraySource:
    """A .npy file, as np.save writes it. It has no labels."""
    return ArraySource(str(path), [path], lambda: _open_npy(open(path, "rb")))


def npz_source(path: Path) -> ArraySource:
    """A .npz file: images under one of the names in `_IMAGE_KEYS`, labels, if any, of `_LABEL_KEYS`."""
    with _explained(str(path)), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        images = next((key for key in _IMAGE_KEYS if key in names), None)
        if images is None:
            raise DataError(
                f"{path}: expected images under one of the names {', '.join(_IMAGE_KEYS)}, found {', '.join(names)}"
            )
        labels = None
        key = next((key for key in _LABEL_KEYS if key in names), None)
        if key is not None:
            with np.load(path, allow_pickle=False) as arrays:
                labels = arrays[key]

    def open_images() -> Stored:
        # The member keeps the archive's file open after the archive itself is closed.
        with zipfile.ZipFile(path) as archive:
            return _open_npy(archive.open(f"{images}.npy"))

    return ArraySource(str(path), [path], open_images, labels)


def _open_npy(stream: IO[bytes]) -> Stored:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"the .npy format {version[0]}.{version[1]} is not read")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(stream)
    if fortran_order and len(shape) > 1:
        raise ValueError("it is stored in Fortran order; save np.ascontiguousarray(images)")
    return Stored(shape, dtype, stream)


def _layout(name: str, stored: Stored) -> tuple[tuple[int, ...], bool]:
    """Shape of the stored images, and whether channels come before rows."""
    shape = stored.shape
    hint = ""
    if stored.dtype.kind == "f":
        hint = "; from images in [0, 1] make (images * 255).round().astype(np.uint8)"
    if stored.dtype != np.uint8:
        raise DataError(f"{name}: expected images of dtype uint8, got {stored.dtype}{hint}")
    channels_last = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4))
    channels_first = not channels_last and len(shape) == 4 and shape[1] in (1, 3, 4)
    if not (channels_last or channels_first) or min(shape) < 1:
        raise DataError(
            f"{name}: expected at least one image as [N, H, W], [N, H, W, C] or [N, C, H, W] with 1, 3 or 4 "
            f"channels, got the shape {list(shape)}"
        )
    return shape, channels_first


def _classes(name: str, labels: np.ndarray | None, count: int) -> tuple[list[str], np.ndarray | None]:
    if labels is None:
        return [], None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"{name}: expected labels as integers or names of shape [{count}], one for each image, "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    values, indices = np.unique(labels, return_inverse=True)
    return [str(value) for value in values], indices


def _idx_labels_beside(images: Path) -> Path | None:
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    if name == images.name:
        return None
    plain = name.removesuffix(".gz")
    return next(
        (p for p in (images.with_name(name), images.with_name(plain), images.with_name(plain + ".gz")) if p.is_file()),
        None,
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        zipfile.BadZipFile,
        NotImplementedError,
        KeyError,
    ) as error:
        raise DataError(f"{name} cannot be read: {error}") from error
