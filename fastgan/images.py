"""Generated images as pictures: grids and files."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from fastgan.files import replacing


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Tile uint8 images [N, H, W, C] row by row into one [rows*H, columns*W, C], nearly square by default.

    Neighbours are `gap` black pixels apart; cells left over are black.
    """
    count, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    out = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), np.uint8)
    if channels == 4:
        out[..., 3] = 255
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        out[top : top + height, left : left + width] = image
    return out


def picture(image: np.ndarray) -> Image.Image:
    """A Pillow image from uint8 [H, W, C] with 1, 3 or 4 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png(image: np.ndarray) -> bytes:
    """`image` [H, W, C] uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(image: np.ndarray, path: Path) -> None:
    """Write `image` [H, W, C] uint8; readers never see half a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(png(image))
