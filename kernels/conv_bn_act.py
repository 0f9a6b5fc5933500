"""Triton kernel of conv_bn_act and conv_transpose_bn_act: convolution by implicit GEMM that takes the work between two
convolutions into its loads and stores. The contract stands in `fastgan/ops/conv_bn_act_eager.py`.

One kernel computes every activation and every gradient of one. What it multiplies is the *operand* (see `_operand`), a
stored tensor mapped while it is loaded. Its rows are output pixels, its columns output channels, and its reduction runs
over the kernel's positions and the operand's channels, in blocks of one position each or, where the channels are few,
over both folded into one axis. From the large side of a strided convolution to the small one every position counts for
every pixel; to the large side (a transposed convolution, or the gradient of a plain one) the output falls into
stride^2 sub-pixel phases, each with positions of its own (`conv_transpose_bn_act.py`). A program belongs to one, and
those that read the same pixels follow one another, so that they find them in the cache; or, for a few output channels,
the columns are the channels of all phases (*merged*), and one program reads for all.

Every tensor is channels-last. What the epilogue sums is stored per tile; where the statistics are of this process
alone, the last program combines the tiles in a fixed order and writes the next operand's constants
(`conv_bn_act_constants.py`). Offsets are 64-bit at the start of a row and at most an image's within it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastgan.kernels.bn_act import _preactivation, _through_activation
from fastgan.kernels.conv_bn_act_arrivals import counters, group_of
from fastgan.kernels.conv_bn_act_constants import _finish, block_constants, block_gradient_constants, rows_of
from fastgan.kernels.conv_bn_act_operand import _operand, _pixels, accumulator, kind_of, precision_of
from fastgan.kernels.conv_bn_act_tiles import LEAST, depth_of_few, tile_of
from fastgan.kernels.conv_bn_act_wgrad import weight_gradient
from fastgan.kernels.conv_transpose_bn_act import _meetings, _phase_taps, lone_pixel_stride, meetings, merges, spacing
from fastgan.kernels.launch import launch
from torch import Tensor

__all__ = [
    "block_constants", "block_gradient_constants", "convolve", "convolve_block_constants",
    "convolve_block_gradient_constants", "weight_gradient",
]  # fmt: skip

# --- the convolution ------------------------------------------------------------------------------


@triton.jit
def _convolve_kernel(
    y, parts, value, second, constants, weight, bias, out_y, out_constants,
    made, grads, counts, bn_weight, bn_bias, running_mean, running_var,
    images, height, width, channels, out_height, out_width, out_channels,
    per_channel, per_row, per_column, per_out_channel, eps: tl.float64, momentum: tl.float64, values: tl.float64,
    TO_LARGE: tl.constexpr, MERGED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr, SLOPE: tl.constexpr, EPILOGUE: tl.constexpr,
    OUT_SLOPE: tl.constexpr, BIAS: tl.constexpr, FOLD: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    PHASES: tl.constexpr = STRIDE[0] * STRIDE[1] if TO_LARGE else 1
    all_columns = out_channels * PHASES if MERGED else out_channels
    column_tiles = tl.cdiv(all_columns, BN)
    tile, tiles = tl.program_id(0) // column_tiles, tl.num_programs(0) // column_tiles
    column = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    real = column < all_columns
    n = column % out_channels if MERGED else column

    # Which pixels the tile's rows are, which kernel positions count for them, and which input pixels those meet.
    if MERGED:
        r0, s0 = (column // out_channels // STRIDE[1])[None, :], (column // out_channels % STRIDE[1])[None, :]
        r_taps, s_taps = tl.cdiv(KERNEL[0], STRIDE[0]), tl.cdiv(KERNEL[1], STRIDE[1])
        rows, columns = _meetings(out_height, STRIDE[0], PADDING[0]), _meetings(out_width, STRIDE[1], PADDING[1])
        image, i, j, exists = _pixels(tile, BM, images, rows, columns)
        top, left = i + PADDING[0] // STRIDE[0], j + PADDING[1] // STRIDE[1]
        i, j = top[:, None] * STRIDE[0] + r0 - PADDING[0], left[:, None] * STRIDE[1] + s0 - PADDING[1]
    elif TO_LARGE:
        down, right = tile % PHASES // STRIDE[1], tile % PHASES % STRIDE[1]
        rows, columns = tl.cdiv(out_height - down, STRIDE[0]), tl.cdiv(out_width - right, STRIDE[1])
        some = tl.where(rows * columns > 0, images, 0)  # a phase beyond a small image has no pixel
        image, i, j, exists = _pixels(tile // PHASES, BM, some, tl.maximum(rows, 1), tl.maximum(columns, 1))
        r0, r_taps, top = _phase_taps(down, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], STEP[0])
        s0, s_taps, left = _phase_taps(right, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], STEP[1])
        top, left = i + top, j + left
        i, j = (i * STRIDE[0] + down)[:, None], (j * STRIDE[1] + right)[:, None]
    else:
        r0, s0, r_taps, s_taps = 0, 0, KERNEL[0], KERNEL[1]
        image, i, j, exists = _pixels(tile, BM, images, out_height, out_width)
        top, left = i * STRIDE[0] - PADDING[0], j * STRIDE[1] - PADDING[1]
        i, j = i[:, None], j[:, None]
    move_r: tl.constexpr = -STEP[0] * DILATION[0] // STRIDE[0] if TO_LARGE else DILATION[0]
    move_s: tl.constexpr = -STEP[1] * DILATION[1] // STRIDE[1] if TO_LARGE else DILATION[1]
    row = ((image * height + top) * width + left) * channels
    taps = r_taps * s_taps

    acc = tl.zeros((BM, BN), ACC)
    blocks = tl.cdiv(channels, BK)
    for step in range(tl.cdiv(taps * channels, BK) if FOLD else taps * blocks):
        k = tl.arange(0, BK)
        if FOLD:
            tap, c = (step * BK + k) // channels, (step * BK + k) % channels
            known = tap < taps
        else:
            tap, c = step // blocks, step % blocks * BK + k
            known = c < channels
        r, s = tap // s_taps, tap % s_taps
        if FOLD:
            h, w = top[:, None] + (r * move_r)[None, :], left[:, None] + (s * move_s)[None, :]
        else:
            h, w = (top + r * move_r)[:, None], (left + s * move_s)[:, None]
        inside = exists[:, None] & (h >= 0) & (h < height) & (w >= 0) & (w < width) & known[None, :]
        at = row[:, None] + ((r * move_r * width + s * move_s) * channels + c)[None, :]
        a = tl.load(value + at, inside, 0.0)
        b = tl.load(second + at, inside, 0.0) if OPERAND == "gradient" else a
        a = _operand(a, b, constants, c[None, :], known[None, :], channels, inside, OPERAND, SLOPE, ACC)
        if FOLD:
            r, s = r[:, None], s[:, None]
        r, s = r0 + r * STEP[0], s0 + s * STEP[1]
        inside = known[:, None] & real[None, :]
        if MERGED:  # one phase may have fewer positions than another
            inside &= (r < KERNEL[0]) & (s < KERNEL[1])
        at = (c * per_channel)[:, None] + r * per_row + s * per_column + (n * per_out_channel)[None, :]
        matrix = tl.load(weight + at, inside, 0.0)
        acc = tl.dot(a, matrix, acc, input_precision=PRECISION, out_dtype=ACC)

    if BIAS:
        acc += tl.load(bias + n, real, 0.0).to(ACC)[None, :]
    filled = exists[:, None] & real[None, :]
    if MERGED:  # at the image's edges some phases lie outside
        filled &= (i >= 0) & (i < out_height) & (j >= 0) & (j < out_width)
    at = ((image[:, None] * out_height + i) * out_width + j) * out_channels + n[None, :]
    part = tile.to(tl.int64) * out_channels + n
    every = (tiles + tl.cdiv(tiles, GROUP) if GROUP else tiles).to(tl.int64) * out_channels
    if EPILOGUE == "backward" or EPILOGUE == "leaky backward":
        raw = tl.load(out_y + at, filled, 0.0).to(ACC)
        v = raw
        if EPILOGUE == "backward":
            m = tl.load(out_constants + n, real, 0.0)[None, :]
            scale = tl.load(out_constants + out_channels + n, real, 0.0)[None, :]
            shift = tl.load(out_constants + 2 * out_channels + n, real, 0.0)[None, :]
            v = _preactivation(raw, m, scale, shift)
            raw = raw - m
        acc = tl.where(filled, _through_activation(acc, v, OUT_SLOPE), 0.0)
        # Of the gradient before it is rounded: the sums are results of their own.
        tl.store(parts + part, tl.sum(acc, 0), real)
        tl.store(parts + every + part, tl.sum(acc * raw, 0), real)
    stored = acc.to(y.dtype.element_ty)
    tl.store(y + at, stored, filled)
    if EPILOGUE == "statistics":
        # Of the output as it is stored. The mean keeps what rounding takes from it: far from 0 that is much.
        result = tl.where(filled, stored.to(ACC), 0.0)
        count = tl.sum(exists.to(ACC), 0)
        mean = tl.sum(result, 0) / tl.maximum(count, 1.0)
        deviation = tl.where(filled, result - mean[None, :], 0.0)
        rest = tl.sum(deviation, 0) / tl.maximum(count, 1.0)
        tl.store(parts + part, count + tl.zeros_like(mean), real)
        tl.store(parts + every + part, mean, real)
        tl.store(parts + 2 * every + part, tl.sum(deviation * deviation, 0) - count * rest * rest, real)
        tl.store(parts + 3 * every + part, rest, real)
    if GROUP:
        _finish(
            made,
            grads,
            parts,
            counts,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            out_constants,
            eps,
            momentum,
            values,
            tile,
            tiles,
            tl.program_id(0) % column_tiles,
            out_channels,
            n,
            real,
            EPILOGUE == "statistics",
            GROUP,
            ACC,
            BN,
            2048 // BN,
        )


# --- the host's part ------------------------------------------------------------------------------


def convolve(
    value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float,
    weight: Tensor, bias: Tensor | None, geometry: Any, to_large: bool, size: tuple[int, int],
    statistics: bool, out_y: Tensor | None, out_constants: Tensor | None, out_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operand = (value, second, constants, slope)
    return _convolve(operand, weight, bias, geometry, to_large, size, statistics, (out_y, out_constants, out_slope))


def convolve_block_constants(
    value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float,
    weight: Tensor, bias: Tensor | None, geometry: Any, to_large: bool, size: tuple[int, int],
    bn_weight: Tensor | None, bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    eps: float, momentum: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    made = rows_of(4, weight.shape[1 if to_large else 0], value)
    norm = (bn_weight, bn_bias, running_mean, running_var, float(eps), float(momentum), 0.0)
    operand = (value, second, constants, slope)
    y, _ = _convolve(operand, weight, bias, geometry, to_large, size, True, (None, None, 1.0), (made, None, *norm))
    return y, made


def convolve_block_gradient_constants(
    value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float,
    weight: Tensor, geometry: Any, to_large: bool, size: tuple[int, int],
    out_y: Tensor, out_constants: Tensor, out_slope: float, count: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made, grads = (rows_of(rows, out_y.shape[1], value) for rows in (4, 2))
    finish = (made, grads, None, None, None, None, 0.0, 0.0, float(count))
    operand, out = (value, second, constants, slope), (out_y, out_constants, out_slope)
    y, _ = _convolve(operand, weight, None, geometry, to_large, size, False, out, finish)
    return y, made, grads


def _convolve(
    operand: tuple, weight: Tensor, bias: Tensor | None, geometry: Any, to_large: bool, size: tuple[int, int],
    statistics: bool, out: tuple, finish: tuple | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The convolution and the sums of its tiles; `finish`: what its last program makes of them, and from what."""
    value, second, constants, slope = operand
    out_y, out_constants, out_slope = out
    images, channels, height, width = value.shape
    of_channel, of_out = (0, 1) if to_large else (1, 0)
    out_channels = weight.shape[of_out]
    kernel, stride, padding, dilation = geometry
    if to_large:
        inner = zip(value.shape[2:], kernel, stride, dilation, strict=True)
        stride = tuple(lone_pixel_stride(*axis) for axis in inner)
        phases, pixels = stride[0] * stride[1], triton.cdiv(size[0], stride[0]) * triton.cdiv(size[1], stride[1])
    else:
        phases, pixels = 1, size[0] * size[1]
    columns = out_channels
    step = tuple(spacing(*axis) for axis in zip(stride, dilation, strict=True)) if to_large else (1, 1)
    epilogue = "statistics" if statistics else "store"
    if out_y is not None:
        epilogue = "leaky backward" if out_constants is None else "backward"
    merged = to_large and epilogue == "store" and merges(size, out_channels, kernel, stride, padding, dilation)
    if merged:
        phases, columns, pixels = 1, phases * out_channels, meetings(size, stride, padding)
    acc, sums = accumulator(value)
    precision = precision_of(value)
    positions = triton.cdiv(kernel[0], step[0]) * triton.cdiv(kernel[1], step[1])
    tile = tile_of(value, precision, images * pixels, columns, positions * channels, phases)
    fold = channels < tile.depth
    if channels < LEAST:
        tile = tile._replace(depth=depth_of_few(positions * channels, tile.depth))
    tiles = phases * triton.cdiv(images * pixels, tile.rows)
    shape = (images, out_channels, *size)
    y = torch.empty(shape, dtype=value.dtype, device=value.device, memory_format=torch.channels_last)
    rows = {"store": 0, "statistics": 4}.get(epilogue, 2)
    column_tiles, group = triton.cdiv(columns, tile.columns), group_of(tiles) if finish else 0
    groups = triton.cdiv(tiles, group) if finish else 0
    parts = y.new_empty((rows, tiles + groups, out_channels), dtype=sums)
    if y.numel() == 0:
        return y, parts
    made, grads, *norm, eps, momentum, values = finish or (None,) * 6 + (0.0,) * 3
    counts = counters(value, column_tiles * (groups + 1)) if finish else None
    matrix = weight.contiguous(memory_format=torch.channels_last)
    strides = matrix.stride()
    launch(
        _convolve_kernel, (tiles * column_tiles,), value,
        y, parts, value, second, constants, matrix, bias, out_y, out_constants, made, grads, counts, *norm,
        images, height, width, channels, *size, out_channels,
        strides[of_channel], strides[2], strides[3], strides[of_out], eps, momentum, values,
        TO_LARGE=to_large, MERGED=merged, KERNEL=tuple(kernel), STRIDE=tuple(stride), PADDING=tuple(padding),
        DILATION=tuple(dilation), STEP=step, OPERAND=kind_of(second, constants, slope), SLOPE=float(slope),
        EPILOGUE=epilogue, OUT_SLOPE=float(out_slope), BIAS=bias is not None, FOLD=fold, GROUP=group,
        PRECISION=precision, ACC=acc, BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return y, parts
