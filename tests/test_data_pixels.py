"""Bytes to [-1, 1] and back."""

import numpy as np
import torch

from fastgan.data import to_uint8
from fastgan.data.pixels import normalise, normalise_on_device

EVERY_BYTE = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


def test_all_bytes_go_there_and_back():
    values = normalise(EVERY_BYTE)
    assert values.dtype == np.float32
    assert values.min() == -1
    assert values.max() == 1
    assert np.array_equal(to_uint8(torch.from_numpy(values).permute(0, 3, 1, 2)), EVERY_BYTE)


def test_on_a_device_the_values_are_the_same():
    assert np.array_equal(normalise_on_device(torch.from_numpy(EVERY_BYTE)).numpy(), normalise(EVERY_BYTE))


def test_values_are_rounded_clipped_and_laid_out_channels_last():
    images = torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0, float("inf"), float("nan")]).reshape(1, 2, 1, 4)
    pixels = to_uint8(images.requires_grad_().to(torch.float64))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 1, 4, 2)
    assert pixels.flags.c_contiguous
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255]
    assert pixels[0, 0, :, 1].tolist() == [255, 255, 255, 0]
