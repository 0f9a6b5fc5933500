"""How large the tiles of the convolution kernels are, how many warps share one and how many loads are in flight.

The list is short and argued, and never tuned at run time: the order of additions, and so every bit of the result,
follows from shapes, dtype and device alone. The widest tile that still gives every multiprocessor a program is taken:
wide tiles read the operands fewer times, narrow ones fill the card on the deep layers' small images.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

LEAST = 16  # the smallest extent of a matrix instruction's operand, and of a tile


class Tile(NamedTuple):
    """Rows, columns and depth of one step, its warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Halves: 64 deep is 128 bytes, one line of shared memory; 8 warps are the two warpgroups that wgmma wants on sm_90 and
# keep the accumulator of 128 x 128 within 64 registers a thread. sm_80 has fewer bytes of shared memory for as many.
_HALVES = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 3))
# sm_100 accumulates in tensor memory: half the warps of the narrower tile have the registers that 8 lack there.
_HALVES_SM100 = (_HALVES[0], _HALVES[1]._replace(warps=4), *_HALVES[2:])
_TF32 = (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3))
# Without tensor cores (fp32 in full, fp64 for tests) operands live in registers: small tiles.
_PLAIN = (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2))


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's device; without a device (the interpreter, fake tensors) an H100's."""
    real = tensor.is_cuda and torch.cuda.is_available()
    return _multiprocessors(tensor.device.index or 0) if real else 132


@cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def capability(tensor: Tensor) -> int:
    """The major compute capability of the tensor's device; an H100's without a device."""
    return _capability(tensor.device.index or 0) if tensor.is_cuda and torch.cuda.is_available() else 9


def candidates(dtype: torch.dtype, precision: str, capability: int) -> tuple[Tile, ...]:
    """The list for a dtype and a card, widest first."""
    if dtype in (torch.float16, torch.bfloat16):
        return _HALVES_SM100 if capability >= 10 else _HALVES
    return _TF32 if dtype == torch.float32 and precision == "tf32" else _PLAIN


def tile_of(value: Tensor, precision: str, rows: int, columns: int, depth: int, copies: int = 1) -> Tile:
    """The tile for a product of `rows` x `columns` with `depth` multiplications each, computed `copies` times over."""
    listed = candidates(value.dtype, precision, capability(value))
    # One that would be cut gives way to the one that is as wide as that: its warps were chosen for its width.
    for tile in [t for t in listed if not any(t.rows == o.rows and columns <= o.columns < t.columns for o in listed)]:
        tile = tile._replace(
            rows=_extent(rows, tile.rows), columns=_extent(columns, tile.columns), depth=_extent(depth, tile.depth)
        )
        if copies * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= multiprocessors(value):
            break
    return tile


def depth_of_few(depth: int, widest: int) -> int:
    """The widest step that divides a reduction over a few channels, as far as matrix instructions allow: 3 channels of
    a 4x4 kernel are three steps of 16, and no padding."""
    whole = triton.cdiv(depth, LEAST) * LEAST
    return min(widest, whole & -whole)


def _extent(needed: int, widest: int) -> int:
    return min(widest, max(LEAST, triton.next_power_of_2(needed)))
