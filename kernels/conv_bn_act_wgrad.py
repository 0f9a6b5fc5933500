"""Triton kernel of the weight gradient of conv_bn_act and conv_transpose_bn_act, an implicit GEMM with a prologue on
both operands. The contract stands in `fastgan/ops/conv_bn_act_eager.py`.

Either convolution joins a large and a small side, and its weight [F, G, R, S] one channel of each: F of the small side
and G of the large one for a plain convolution, and for a transposed one too. The gradient's rows are the F channels,
its columns the kernel's positions and G channels folded into one axis, and its reduction runs over the small side's
pixels. That axis is long and the gradient small, so it is split among programs; the last of those that share a tile
adds up their partial results in a fixed order, and writes the gradient to wherever the weight's layout has it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastgan.kernels.conv_bn_act_arrivals import _comes_last, counters, group_of
from fastgan.kernels.conv_bn_act_operand import _operand, _pixels, accumulator, kind_of, precision_of
from fastgan.kernels.conv_bn_act_tiles import multiprocessors, tile_of
from fastgan.kernels.launch import launch
from torch import Tensor

MAX_SPLITS = 64


@triton.jit
def _add_up(
    out, per_f, beside, parts, every, start, stop, f, small_channels, column, all_columns,
    BM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one tile, some rows at a time, the partial results `start` to `stop`, GROUP at most, in order. Unrolled: the
    loads of all of them are in flight together."""
    real, number = (column < all_columns)[None, :], tl.full((ROWS, 1), stop - start, tl.int32)
    for row in range(0, BM, ROWS):
        rows = f + row + tl.arange(0, ROWS)
        inside = (rows < small_channels)[:, None] & real
        part = parts + start * every + rows[:, None] * all_columns + column[None, :]
        total = tl.zeros((ROWS, BN), ACC)
        for index in tl.static_range(GROUP):
            total += tl.load(part + index * every, inside & (index < number), 0.0, cache_modifier=".cg")
        tl.store(out + (rows * per_f)[:, None] + beside[None, :], total.to(out.dtype.element_ty), inside)


@triton.jit
def _weight_gradient_kernel(
    gradient, parts, counts, large, large_second, large_constants, small, small_second, small_constants,
    images, height, width, small_height, small_width, large_channels, small_channels, steps, per_split, splits,
    per_f, per_tap, per_g,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    LARGE: tl.constexpr, LARGE_SLOPE: tl.constexpr, SMALL: tl.constexpr, SMALL_SLOPE: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    all_columns = KERNEL[0] * KERNEL[1] * large_channels
    column_tiles = tl.cdiv(all_columns, BN)
    f = tl.program_id(0) // column_tiles * BM + tl.arange(0, BM)
    column = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    tap, g = column // large_channels, column % large_channels
    r, s = tap // KERNEL[1] * DILATION[0] - PADDING[0], tap % KERNEL[1] * DILATION[1] - PADDING[1]
    real_f, real_g = (f < small_channels)[None, :], (column < all_columns)[None, :]
    beside = ((r * width + s) * large_channels + g)[None, :]

    acc = tl.zeros((BM, BN), ACC)
    first = tl.program_id(1) * per_split
    for step in range(first, tl.minimum(first + per_split, steps)):
        image, i, j, exists = _pixels(step, BK, images, small_height, small_width)
        inside = exists[:, None] & real_f
        at = ((image * small_height + i) * small_width + j)[:, None] * small_channels + f[None, :]
        a = tl.load(small + at, inside, 0.0)
        b = tl.load(small_second + at, inside, 0.0) if SMALL == "gradient" else a
        a = _operand(a, b, small_constants, f[None, :], real_f, small_channels, inside, SMALL, SMALL_SLOPE, ACC)

        i, j = i * STRIDE[0], j * STRIDE[1]
        h, w = i[:, None] + r[None, :], j[:, None] + s[None, :]
        inside = exists[:, None] & real_g & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = (((image * height + i) * width + j) * large_channels)[:, None] + beside
        c = tl.load(large + at, inside, 0.0)
        d = tl.load(large_second + at, inside, 0.0) if LARGE == "gradient" else c
        c = _operand(c, d, large_constants, g[None, :], real_g, large_channels, inside, LARGE, LARGE_SLOPE, ACC)
        acc = tl.dot(tl.trans(a), c, acc, input_precision=PRECISION, out_dtype=ACC)

    inside = (f < small_channels)[:, None] & real_g
    beside = tap * per_tap + g * per_g
    if GROUP == 0:  # not split
        tl.store(gradient + (f * per_f)[:, None] + beside[None, :], acc.to(gradient.dtype.element_ty), inside)
    else:
        every = (all_columns * small_channels).to(tl.int64)
        tl.store(parts + tl.program_id(1) * every + f[:, None] * all_columns + column[None, :], acc, inside)
        ROWS: tl.constexpr = min(BM, 32)
        groups = tl.cdiv(splits, GROUP)
        group = tl.program_id(1) // GROUP
        start = group * GROUP
        stop = tl.minimum(start + GROUP, splits)
        counter = counts + tl.program_id(0) * (groups + 1)
        first_f = tl.program_id(0) // column_tiles * BM
        if _comes_last(counter + group, stop - start):
            combined = parts + (splits + group) * every
            _add_up(
                combined,
                all_columns,
                column,
                parts,
                every,
                start,
                stop,
                first_f,
                small_channels,
                column,
                all_columns,
                BM,
                ROWS,
                BN,
                GROUP,
                ACC,
            )
            if _comes_last(counter + groups, groups):
                _add_up(
                    gradient,
                    per_f,
                    beside,
                    parts,
                    every,
                    splits,
                    splits + groups,
                    first_f,
                    small_channels,
                    column,
                    all_columns,
                    BM,
                    ROWS,
                    BN,
                    GROUP,
                    ACC,
                )


def weight_gradient(
    large: Tensor, large_second: Tensor | None, large_constants: Tensor | None, large_slope: float,
    small: Tensor, small_second: Tensor | None, small_constants: Tensor | None, small_slope: float,
    weight: Tensor, geometry: Any,
) -> Tensor:  # fmt: skip
    images, large_channels, height, width = large.shape
    small_channels, small_height, small_width = small.shape[1:]
    kernel, stride, padding, dilation = (tuple(of) for of in geometry)
    columns, pixels = kernel[0] * kernel[1] * large_channels, images * small_height * small_width
    gradient = torch.empty_like(weight)
    if gradient.numel() == 0 or pixels == 0:
        return gradient.zero_()
    acc, sums = accumulator(large)
    precision = precision_of(large)
    tile = tile_of(large, precision, small_channels, columns, pixels, MAX_SPLITS)
    tiles = triton.cdiv(small_channels, tile.rows) * triton.cdiv(columns, tile.columns)
    steps = triton.cdiv(pixels, tile.depth)
    programs = multiprocessors(large) * (8 // tile.warps)  # one wave: two programs of 8 warps lack shared memory
    per_split = triton.cdiv(steps, min(MAX_SPLITS, max(1, programs // tiles)))
    splits = triton.cdiv(steps, per_split)
    group = group_of(splits) if splits > 1 else 0
    groups = triton.cdiv(splits, group) if group else 0
    parts = large.new_empty((splits + groups if group else 0, small_channels, columns), dtype=sums)
    counts = counters(large, tiles * (groups + 1)) if group else None
    if not _dense(gradient):
        gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    per_f, per_g, _, per_tap = gradient.stride()
    launch(
        _weight_gradient_kernel, (tiles, splits), large,
        gradient, parts, counts, large, large_second, large_constants, small, small_second, small_constants,
        images, height, width, small_height, small_width, large_channels, small_channels, steps, per_split,
        splits, per_f, per_tap, per_g,
        KERNEL=kernel, STRIDE=stride, PADDING=padding, DILATION=dilation,
        LARGE=kind_of(large_second, large_constants, large_slope), LARGE_SLOPE=float(large_slope),
        SMALL=kind_of(small_second, small_constants, small_slope), SMALL_SLOPE=float(small_slope),
        GROUP=group, PRECISION=precision, ACC=acc, BM=tile.rows, BN=tile.columns, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return gradient


def _dense(weight: Tensor) -> bool:
    """Whether rows follow one another without a gap, so that one stride leads through the kernel's positions."""
    return weight.stride(2) == weight.stride(3) * weight.shape[3]
