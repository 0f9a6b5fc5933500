"""Triton kernel of conv_bn_act and conv_transpose_bn_act: convolution by implicit GEMM that takes the work between two
convolutions into its loads and stores. The contract stands in `fastgan/ops/conv_bn_act_eager.py`.

One kernel computes every activation and every gradient of one. What it multiplies is the *operand* (see `_operand`), a
stored tensor mapped while it is loaded. Its rows are output pixels, its columns output channels, and its reduction runs
over the kernel's positions and the operand's channels, in blocks of one position each or, where the channels are few,
over both folded into one axis. From the large side of a strided convolution to the small one every position counts for
every pixel; to the large side (a transposed convolution, or the gradient of a plain one) the output falls into
stride^2 sub-pixel phases, each with positions of its own (`conv_transpose_bn_act.py`), and a program belongs to one.

Every tensor is channels-last. What the epilogue sums leaves the kernel per tile; `conv_bn_act_constants.py` combines
the tiles in a fixed order. Offsets are 64-bit at the start of a row and at most an image's within it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastgan.kernels.bn_act import _preactivation, _through_activation
from fastgan.kernels.conv_bn_act_constants import block_constants, block_gradient_constants
from fastgan.kernels.conv_bn_act_operand import _operand, _pixels, accumulator, kind_of, precision_of
from fastgan.kernels.conv_bn_act_tiles import tile_of
from fastgan.kernels.conv_bn_act_wgrad import weight_gradient
from fastgan.kernels.conv_transpose_bn_act import _phase_taps, lone_pixel_stride, spacing
from fastgan.kernels.launch import launch
from torch import Tensor

__all__ = ["block_constants", "block_gradient_constants", "convolve", "weight_gradient"]

# --- the convolution ------------------------------------------------------------------------------


@triton.jit
def _convolve_kernel(
    y, parts, value, second, constants, weight, bias, out_y, out_constants,
    images, height, width, channels, out_height, out_width, out_channels,
    per_channel, per_row, per_column, per_out_channel,
    TO_LARGE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    STEP: tl.constexpr, OPERAND: tl.constexpr, SLOPE: tl.constexpr, EPILOGUE: tl.constexpr, OUT_SLOPE: tl.constexpr,
    BIAS: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(out_channels, BN)
    tile = tl.program_id(0) // column_tiles
    n = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    real = n < out_channels

    # Which pixels the tile's rows are, which kernel positions count for them, and which input pixels those meet.
    if TO_LARGE:
        down, right = tl.program_id(1) // STRIDE[1], tl.program_id(1) % STRIDE[1]
        rows, columns = tl.cdiv(out_height - down, STRIDE[0]), tl.cdiv(out_width - right, STRIDE[1])
        some = tl.where(rows * columns > 0, images, 0)  # a phase beyond a small image has no pixel
        image, i, j, exists = _pixels(tile, BM, some, tl.maximum(rows, 1), tl.maximum(columns, 1))
        r0, r_taps, top = _phase_taps(down, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], STEP[0])
        s0, s_taps, left = _phase_taps(right, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], STEP[1])
        top, left = i + top, j + left
        i, j = i * STRIDE[0] + down, j * STRIDE[1] + right
        move_r: tl.constexpr = -STEP[0] * DILATION[0] // STRIDE[0]
        move_s: tl.constexpr = -STEP[1] * DILATION[1] // STRIDE[1]
    else:
        image, i, j, exists = _pixels(tile, BM, images, out_height, out_width)
        r0, s0, r_taps, s_taps = 0, 0, KERNEL[0], KERNEL[1]
        top, left = i * STRIDE[0] - PADDING[0], j * STRIDE[1] - PADDING[1]
        move_r: tl.constexpr = DILATION[0]
        move_s: tl.constexpr = DILATION[1]
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
        of_weight = c * per_channel + (r0 + r * STEP[0]) * per_row + (s0 + s * STEP[1]) * per_column
        matrix = tl.load(
            weight + of_weight[:, None] + (n * per_out_channel)[None, :], known[:, None] & real[None, :], 0.0
        )
        acc = tl.dot(a, matrix, acc, input_precision=PRECISION, out_dtype=ACC)

    if BIAS:
        acc += tl.load(bias + n, real, 0.0).to(ACC)[None, :]
    filled = exists[:, None] & real[None, :]
    at = ((image * out_height + i) * out_width + j)[:, None] * out_channels + n[None, :]
    part = (tl.program_id(1) * tl.cdiv(tl.num_programs(0), column_tiles) + tile) * out_channels + n
    every = tl.num_programs(1).to(tl.int64) * tl.cdiv(tl.num_programs(0), column_tiles) * out_channels
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


# --- the host's part ------------------------------------------------------------------------------


def convolve(
    value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float,
    weight: Tensor, bias: Tensor | None, geometry: Any, to_large: bool, size: tuple[int, int],
    statistics: bool, out_y: Tensor | None, out_constants: Tensor | None, out_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    step = tuple(spacing(*axis) for axis in zip(stride, dilation, strict=True)) if to_large else (1, 1)
    epilogue = "statistics" if statistics else "store"
    if out_y is not None:
        epilogue = "leaky backward" if out_constants is None else "backward"
    acc, sums = accumulator(value)
    precision = precision_of(value)
    positions = triton.cdiv(kernel[0], step[0]) * triton.cdiv(kernel[1], step[1])
    tile = tile_of(value, precision, images * pixels, out_channels, positions * channels, phases)
    fold = channels < tile.depth
    tiles = triton.cdiv(images * pixels, tile.rows)
    shape = (images, out_channels, *size)
    y = torch.empty(shape, dtype=value.dtype, device=value.device, memory_format=torch.channels_last)
    rows = {"store": 0, "statistics": 4}.get(epilogue, 2)
    parts = y.new_empty((rows, phases * tiles, out_channels), dtype=sums)
    if y.numel() == 0:
        return y, parts
    matrix = weight.contiguous(memory_format=torch.channels_last)
    strides = matrix.stride()
    launch(
        _convolve_kernel, (tiles * triton.cdiv(out_channels, tile.columns), phases), value,
        y, parts, value, second, constants, matrix, bias, out_y, out_constants,
        images, height, width, channels, *size, out_channels,
        strides[of_channel], strides[2], strides[3], strides[of_out],
        TO_LARGE=to_large, KERNEL=tuple(kernel), STRIDE=tuple(stride), PADDING=tuple(padding), DILATION=tuple(dilation),
        STEP=step, OPERAND=kind_of(second, constants, slope), SLOPE=float(slope), EPILOGUE=epilogue,
        OUT_SLOPE=float(out_slope), BIAS=bias is not None, FOLD=fold, PRECISION=precision, ACC=acc,
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, parts
