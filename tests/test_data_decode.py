"""One image at a time: modes, orientation, crops, and files that only pretend to be images."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fastgan.data.decode import open_image, square


def encoded(image: Image.Image, format: str = "PNG", **options) -> BytesIO:
    file = BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def decode(image: Image.Image, side: int, channels: int | None = None, crop: str = "center", **save) -> np.ndarray:
    return square(open_image(encoded(image, **save)), side, channels, crop)[0]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_the_right_size_are_kept_exactly(channels):
    pixels = noise(16, 16, channels)
    image = Image.fromarray(pixels.squeeze())
    assert np.array_equal(decode(image, 16), pixels)


def test_grayscale_is_what_has_no_colour_whatever_its_mode():
    grey = Image.fromarray(noise(8, 8))
    for image in (grey, grey.convert("RGB"), grey.convert("P"), grey.convert("LA"), grey.convert("1")):
        assert decode(image, 8).shape == (8, 8, 1)
    one_coloured_pixel = grey.convert("RGB")
    one_coloured_pixel.putpixel((3, 4), (10, 10, 11))
    assert decode(one_coloured_pixel, 8).shape == (8, 8, 3)


def test_palette_images_show_their_colours():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert (decode(image, 8) == [200, 100, 50]).all()


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = decode(image, 8, 3)
    assert (pixels[:, :4] == [0, 0, 255]).all()
    assert (pixels[:, 4:] == 255).all()
    assert (decode(image, 8, 4)[:, 4:, 3] == 0).all()
    assert (decode(image, 8, 1)[:, 4:] == 255).all()


def test_the_colour_of_transparent_pixels_does_not_bleed_when_shrinking():
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 24, 64))
    half_covered = decode(image, 4, 4)[:, 1]
    assert np.abs(half_covered[:, 3].astype(int) - 128).max() < 30
    assert half_covered[:, 0].max() <= 8, "red from invisible pixels"


def test_palette_transparency_counts():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert (decode(image, 8, 3, transparency=1) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        pixels = decode(Image.fromarray(ramp), 16, format=format)
        assert np.array_equal(pixels.ravel(), np.arange(256))
    between = np.array([[257 * 10 + 128, 257 * 10 + 129], [0, 65535]], np.uint16)
    assert decode(Image.fromarray(between), 2).ravel().tolist() == [10, 11, 0, 255], "rounded, not cut off"


def test_cmyk_and_one_bit_images_are_read():
    assert decode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), 8, format="TIFF").shape == (8, 8, 3)
    assert (decode(Image.new("1", (8, 8), 1), 8) == 255).all()


def test_floating_point_pixels_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="no known range"):
        decode(Image.new("F", (8, 8), 0.5), 8, format="TIFF")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from fastgan.data.decode import _UPRIGHT

    upright = Image.fromarray(noise(12, 20, 3))
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    lying = upright if orientation == 1 else upright.transpose(_UPRIGHT[undo])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(lying, 12, 3, exif=exif), decode(upright, 12, 3))


def test_orientation_six_stands_for_a_quarter_turn_clockwise():
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode(image, 8, exif=exif)
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] == 0).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_image():
    image = Image.fromarray(noise(8, 8, 3))
    broken = b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f"
    assert np.array_equal(decode(image, 8, 3, exif=broken), np.asarray(image))


def test_center_crop_takes_the_middle_and_none_takes_all():
    image = Image.new("L", (48, 16), 0)
    image.paste(255, (16, 0, 32, 16))
    assert (decode(image, 16) == 255).all()
    squeezed = decode(image, 16, crop="none")[8, :, 0]
    assert squeezed[0] == 0
    assert squeezed[8] > 240
    assert squeezed[15] == 0


def test_small_images_are_enlarged_and_say_so():
    for size, expected in (((8, 8), True), ((40, 8), True), ((16, 16), False), ((40, 16), False)):
        pixels, enlarged = square(Image.new("L", size, 77), 16, None, "center")
        assert enlarged is expected
        assert (pixels == 77).all()


@pytest.mark.parametrize(("height", "side", "period"), [(1200, 32, 200), (192, 64, 2)])
def test_a_jpeg_decoded_at_reduced_scale_looks_like_the_full_one(height, side, period):
    y, x = np.mgrid[0:height, 0 : height * 4 // 3] / period
    image = Image.fromarray((127 + 120 * np.sin(x) * np.cos(y)).astype(np.uint8))
    fast = decode(image, side, format="JPEG", quality=95).astype(float)
    left = height // 6
    full = image.crop((left, 0, left + height, height)).resize((side, side), Image.Resampling.LANCZOS)
    assert np.asarray(full).std() > 30
    assert np.abs(fast[..., 0] - np.asarray(full)).max() < 12


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("L", (8, 8), value) for value in (50, 200)]
    assert (decode(frames[0], 8, format="GIF", save_all=True, append_images=frames[1:]) == 50).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"11 x 10 pixels, the limit is 100"):
        open_image(encoded(Image.new("L", (11, 10))))
    assert open_image(encoded(Image.new("L", (10, 10)))).size == (10, 10)


def test_formats_that_start_other_programs_are_not_opened():
    with pytest.raises(OSError, match="cannot identify"):
        open_image(BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"))
