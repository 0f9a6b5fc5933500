"""How fast images are drawn, and decoded the first time. Training must never wait: drawing has to be at least ten
times as fast as it.

pytest benchmarks/bench_data.py --benchmark-only
"""

import numpy as np
import pytest
from PIL import Image

from fastgan.data import Batches, PreparedImages, prepare

BATCHES = 100
BATCH_SIZE = 64


def images(count: int, side: int, channels: int, image_size: int | None = None) -> PreparedImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)
    crop = "center" if image_size is None else "random"
    return PreparedImages(pixels, None, [], "noise", image_size or side, crop, "noise")


def note_rate(benchmark, count: int) -> None:
    if benchmark.enabled:
        benchmark.extra_info["images/s"] = round(count / benchmark.stats.stats.median)


DRAWN = {
    "32x32x1": (lambda: images(10_000, 32, 1), {}),
    "32x32x3": (lambda: images(50_000, 32, 3), {}),
    "32x32x3 flip": (lambda: images(50_000, 32, 3), {"flip": True}),
    "32x32x3 flip random crop": (lambda: images(50_000, 36, 3, 32), {"flip": True}),
    "64x64x3 flip": (lambda: images(10_000, 64, 3), {"flip": True}),
    "128x128x3 flip": (lambda: images(2_500, 128, 3), {"flip": True}),
}


@pytest.mark.benchmark(group="draw batches")
@pytest.mark.parametrize("case", DRAWN)
def test_draw(benchmark, case):
    make, options = DRAWN[case]
    with Batches(make(), BATCH_SIZE, **options) as batches:

        def draw() -> None:
            for _ in range(BATCHES):
                next(batches)

        benchmark.pedantic(draw, rounds=7, warmup_rounds=1)
    note_rate(benchmark, BATCHES * BATCH_SIZE)


DECODED = {
    "png 32x32x1 to 32": ("png", (32, 32), 32, 1000),
    "jpeg 178x218 to 64": ("jpg", (178, 218), 64, 500),
    "jpeg 1024x768 to 256": ("jpg", (1024, 768), 256, 50),
}


@pytest.mark.benchmark(group="decode once")
@pytest.mark.parametrize("case", DECODED)
def test_decode(benchmark, case, tmp_path):
    ending, (width, height), side, count = DECODED[case]
    y, x = np.mgrid[0:height, 0:width]
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(count):
        wave = 127 + 60 * np.sin(x / (7 + i % 5)) + 60 * np.cos(y / (11 + i % 7))
        colours = wave if ending == "png" else np.stack([wave, wave.T[:1].mean() + 0 * wave, 255 - wave], axis=2)
        Image.fromarray(colours.astype(np.uint8)).save(folder / f"{i}.{ending}")
    rounds = iter(range(100))
    benchmark.pedantic(lambda: prepare(folder, side, cache_dir=tmp_path / f"cache{next(rounds)}"), rounds=5)
    note_rate(benchmark, count)


@pytest.mark.benchmark(group="open a prepared data set")
def test_open(benchmark, tmp_path):
    prepare("digits", 32, cache_dir=tmp_path)
    benchmark(prepare, "digits", 32, cache_dir=tmp_path)
