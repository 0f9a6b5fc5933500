"""Between bytes and numbers: uint8 0..255 and the [-1, 1] of tanh."""

import numpy as np
import torch
from torch import Tensor

# Exact at both ends and in the middle of the scale: 0 -> -1, 255 -> 1.
_STEP = 127.5


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], as v / 127.5 - 1."""
    values = pixels.astype(np.float32)
    np.divide(values, np.float32(_STEP), out=values)
    return np.subtract(values, np.float32(1), out=values)


def normalise_on_device(pixels: Tensor) -> Tensor:
    """The same for a tensor on any device, computed there."""
    return pixels.to(torch.float32).div_(_STEP).sub_(1)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1], on any device, to uint8 [N, H, W, C].

    Values are rounded, and clipped outside the range; NaN becomes 0. The inverse of `normalise`.
    """
    values = images.detach().to(torch.float32).add(1).mul(_STEP).round().nan_to_num(nan=0.0).clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
