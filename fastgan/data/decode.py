"""From an encoded file, or raw pixels, to one square uint8 image."""

from typing import BinaryIO

import numpy as np
from PIL import Image

CROPS = ("center", "random", "none")
"""center: the largest centred square. random: the same, kept 1/8 larger, and cut at a random place each time
the image is shown. none: the whole image, its aspect ratio ignored."""

# fmt: off
SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga",
))
# fmt: on

# Only these decoders are tried, whatever a file calls itself: Pillow knows others that start outside
# programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "TGA")

_TRANSPOSE = Image.Transpose
_UPRIGHT = {
    2: _TRANSPOSE.FLIP_LEFT_RIGHT,
    3: _TRANSPOSE.ROTATE_180,
    4: _TRANSPOSE.FLIP_TOP_BOTTOM,
    5: _TRANSPOSE.TRANSPOSE,
    6: _TRANSPOSE.ROTATE_270,
    7: _TRANSPOSE.TRANSVERSE,
    8: _TRANSPOSE.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


def stored_side(image_size: int, crop: str) -> int:
    """Side of the images kept in the cache; a random crop needs room to move in."""
    return image_size + image_size // 8 if crop == "random" else image_size


def open_image(file: str | BinaryIO) -> Image.Image:
    """Open an image file with the known decoders and refuse decompression bombs; pixels are read later."""
    Image.init()
    image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        image.close()
        raise ValueError(
            f"decompression bomb? {width} x {height} pixels, the limit is {limit}; make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    return image


def square(pixels: Image.Image | np.ndarray, side: int, channels: int | None, crop: str) -> tuple[np.ndarray, bool]:
    """Cut and resize one image to uint8 [side, side, C]; also says whether it had to be enlarged.

    C is `channels`, or with `channels=None` 1 for an image without colour and 3 otherwise. Transparent parts
    are laid over white unless 4 channels are asked for. Resampling is Lanczos when shrinking, bicubic when
    enlarging.
    """
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with pixels as image:
        width, height = image.size
        orientation = _orientation(image)
        # A JPEG can be decoded at 1/2, 1/4 or 1/8; from three times the target size on, nothing of it shows.
        image.draft(None, (3 * side, 3 * side))
        plain = _plain(image, channels)
    enlarged = min(width, height) < side
    plain = plain.resize(
        (side, side),
        Image.Resampling.BICUBIC if enlarged else Image.Resampling.LANCZOS,
        box=None if crop == "none" else _centred(*plain.size),
        reducing_gap=3.0,
    )
    if orientation in _UPRIGHT:
        plain = plain.transpose(_UPRIGHT[orientation])
    if plain.mode == "RGBA" and channels != 4:
        backdrop = Image.new("RGBA", plain.size, "white")
        plain = Image.alpha_composite(backdrop, plain).convert("L" if channels == 1 else "RGB")
    array = np.asarray(plain)
    if array.ndim == 2:
        array = array[:, :, None]
    elif channels is None and (array == array[:, :, :1]).all():
        array = array[:, :, :1]
    return array, enlarged


def _centred(width: int, height: int) -> tuple[int, int, int, int]:
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    return left, top, left + edge, top + edge


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a camera's broken EXIF block says nothing about the pixels
        return 1


def _plain(image: Image.Image, channels: int | None) -> Image.Image:
    """The image as 8-bit L, RGB or RGBA: modes in which resampling and blending mean something."""
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if channels == 4 or image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return image.convert("RGBA")
    if channels == 1 or (channels is None and image.mode in ("1", "L")):
        return image.convert("L")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, which turns nearly every 16-bit image white.
    wide = np.asarray(image)
    if wide.size and (int(wide.min()) < 0 or int(wide.max()) > 65535):
        raise ValueError(f"grey values {wide.min()} to {wide.max()} do not fit into 16 bits")
    return Image.fromarray(((wide.astype(np.uint32) + 128) // 257).astype(np.uint8))
