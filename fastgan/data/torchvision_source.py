"""Data sets that torchvision knows: `torchvision:CIFAR10`."""

import inspect
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastgan.data.arrays import MNIST_MARGIN, MNIST_SHAPE, pad
from fastgan.data.sources import Item
from fastgan.errors import DataError

PREFIX = "torchvision:"


class TorchvisionSource:
    """The training part of a torchvision data set, downloaded when it is not there.

    It lives in $FASTGAN_DATASETS, or in `datasets` beside torch.hub's folder.
    """

    ignored = 0

    def __init__(self, name: str) -> None:
        self.name = name
        kind = _data_set_class(name.removeprefix(PREFIX))
        root = _root()
        self.identity = f"{name} in {root.resolve()}"
        self._data = _construct(name, kind, root)
        if not len(self):
            raise DataError(f"{name} in {root} is empty")
        self.classes = [str(c) for c in getattr(self._data, "classes", [])]

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Item]:
        for index in range(len(self)):
            # Fetched here, in one thread: data sets may share a file handle or a database cursor.
            name = f"{self.name}[{index}]"
            sample = self._data[index]
            image, label = sample if isinstance(sample, tuple) and len(sample) == 2 else (sample, -1)
            if not isinstance(image, Image.Image):
                raise DataError(f"{name}: expected a PIL image, got {type(image).__name__}; it is no image data set")
            known = isinstance(label, int) and 0 <= label < len(self.classes)
            yield Item(name, label if known else -1, partial(_padded, image))


def _padded(image: Image.Image) -> Image.Image | np.ndarray:
    """Members of the MNIST family get the same margin as from their IDX files."""
    if image.mode == "L" and image.size == MNIST_SHAPE:
        return pad(np.asarray(image)[None], MNIST_MARGIN)[0]
    return image


def _data_set_class(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{PREFIX}{name} needs torchvision ({error}); pip install 'fastgan[torchvision]'") from error
    known = [n for n in datasets.__all__ if not n.endswith("Folder") and n != "VisionDataset"]
    if name not in known:
        raise DataError(f"torchvision has no data set {name!r}; it has {', '.join(sorted(known))}")
    return getattr(datasets, name)


def _root() -> Path:
    if given := os.environ.get("FASTGAN_DATASETS"):
        return Path(given).expanduser()
    from torch import hub

    return Path(hub.get_dir()).parent / "datasets"


def _construct(name: str, kind: Any, root: Path) -> Any:
    accepted = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"root": str(root)} if "root" in accepted else {}
    if "train" in accepted:
        arguments["train"] = True
    try:
        return kind(**arguments)
    except Exception as missing:  # each data set has its own way to say that its files are not there
        if "download" not in accepted:
            raise DataError(f"{name} cannot be opened in {root}: {missing}") from missing
    try:
        root.mkdir(parents=True, exist_ok=True)
        return kind(**arguments, download=True)
    except Exception as error:  # no network, a moved server, a bad checksum, a full disk
        raise DataError(
            f"{name} is not in {root} and could not be downloaded ({error}); put its files there, "
            "or name their folder in FASTGAN_DATASETS"
        ) from error
