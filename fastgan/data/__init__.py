"""Real images for training: any source, decoded once, drawn in a reproducible order.

prepared = prepare("photos/", image_size=64)
batches = Batches(prepared, 32, seed=0, flip=True)
real = next(batches)  # [32, 3, 64, 64] in [-1, 1]
"""

from fastgan.data.batches import Batches
from fastgan.data.cache import DataWarning, PreparedImages
from fastgan.data.decode import CROPS
from fastgan.data.pixels import to_uint8
from fastgan.data.preparation import prepare

__all__ = ["CROPS", "Batches", "DataWarning", "PreparedImages", "prepare", "to_uint8"]
