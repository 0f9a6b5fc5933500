"""Triton kernels of bn_act: statistics, apply, reduce, backward. The contract stands in
`fastgan/backends.py`.

Both layouts are dense matrices. Channels-last is [N*H*W, C], a channel per column; contiguous is [N*C, H*W],
a channel per row (row % C). The elementwise kernels walk that matrix in tiles. The reductions walk the part
of it that belongs to their channels, a block of columns or every C-th row; each program adds up its tiles
lane by lane, reduces once and stores a partial result, and a second small kernel combines the partial results
in a fixed order. No atomics, so the bits are the same every time. The shape of a reduction's tile decides the
order of its additions and is therefore never tuned; that of an elementwise kernel is (`kernels/tuning.py`).

The slope is a compile-time constant: a network has one or two. Where a tile starts is counted in 64 bits, within it
32 are enough, and save registers: `_shape_of_tile` gives long rows tiles of one row.
"""

import torch
import triton
import triton.language as tl
from fastgan.kernels.launch import launch
from fastgan.kernels.tuning import Configuration, choose
from torch import Tensor

TILE = 4096
LONG_ROW = 1 << 24
MAX_SPLITS = 128
PROGRAMS = 1024
WARPS = 4


# --- device functions shared by forward and backward ----------------------------------------------


@triton.jit
def _preactivation(y, mean, scale, bias):
    """v, by the same instruction in every kernel, so that forward and backward agree on its sign bit for
    bit."""
    return tl.fma(scale + tl.zeros_like(y), y - mean, bias + tl.zeros_like(y))


@triton.jit
def _activate(v, SLOPE: tl.constexpr):
    if SLOPE == 0:
        return tl.where(v <= 0, 0.0, v)
    else:
        return tl.where(v > 0, v, v * SLOPE)


@triton.jit
def _through_activation(dz, v, SLOPE: tl.constexpr):
    if SLOPE == 0:
        return tl.where(v <= 0, 0.0, dz)
    else:
        return tl.where(v > 0, dz, dz * SLOPE)


# --- elementwise over the whole matrix ------------------------------------------------------------


@triton.jit
def _left(size, start, BLOCK: tl.constexpr):
    """How many of a block's lanes lie before `size`, in 32 bits whatever the size."""
    return tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def _blocks(size, BLOCK: tl.constexpr):
    """How many blocks cover `size` > 0. The sum in tl.cdiv passes 2^31 where the size nearly does."""
    return (size - 1) // BLOCK + 1


@triton.jit
def _tile(rows, columns, channels, CHANNELS_LAST: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr):
    """One program's tile: 64-bit start, 32-bit offsets, mask, and the channels along the axis that they vary on."""
    column_tiles = _blocks(columns, BL)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BR
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BL
    start = row * columns + column
    r, c = tl.arange(0, BR), tl.arange(0, BL)
    inside_rows, inside_columns = r < _left(rows, row, BR), c < _left(columns, column, BL)
    inside = inside_rows[:, None] & inside_columns[None, :]
    offsets = r[:, None] * columns + c[None, :]
    if CHANNELS_LAST:
        return start, offsets, inside, (column.to(tl.int32) + c)[None, :], inside_columns[None, :]
    else:
        return start, offsets, inside, (((row % channels).to(tl.int32) + r) % channels)[:, None], inside_rows[:, None]


@triton.jit
def _apply_kernel(
    z, y, mean, invstd, weight, bias, rows, columns, channels,
    SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    start, offsets, inside, channel, known = _tile(rows, columns, channels, CHANNELS_LAST, BR, BL)
    m = tl.load(mean + channel, known, 0.0)
    s = tl.load(weight + channel, known, 0.0) * tl.load(invstd + channel, known, 0.0)
    b = tl.load(bias + channel, known, 0.0)
    v = _preactivation(tl.load(y + start + offsets, inside, 0.0).to(ACC), m, s, b)
    tl.store(z + start + offsets, _activate(v, SLOPE).to(z.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    dy, dz, y, mean, invstd, weight, bias, grad_weight, grad_bias, n, rows, columns, channels,
    FROZEN: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    start, offsets, inside, channel, known = _tile(rows, columns, channels, CHANNELS_LAST, BR, BL)
    m, r = tl.load(mean + channel, known, 0.0), tl.load(invstd + channel, known, 0.0)
    s = tl.load(weight + channel, known, 0.0) * r
    b = tl.load(bias + channel, known, 0.0)
    value = tl.load(y + start + offsets, inside, 0.0).to(ACC)
    v = _preactivation(value, m, s, b)
    g = _through_activation(tl.load(dz + start + offsets, inside, 0.0).to(ACC), v, SLOPE)
    result = s * g
    if not FROZEN:
        along = -s * r * tl.load(grad_weight + channel, known, 0.0) / n
        constant = -s * tl.load(grad_bias + channel, known, 0.0) / n
        result += along * (value - m) + constant
    tl.store(dy + start + offsets, result.to(dy.dtype.element_ty), inside)


# --- reductions to one value per channel ----------------------------------------------------------


@triton.jit
def _walk(rows, columns, channels, per_split, CHANNELS_LAST: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr):
    """One program's channels and its share of their tiles: channels, mask, row stride, first tile, last,
    tiles a row."""
    if CHANNELS_LAST:
        channel = tl.program_id(0) * BL + tl.arange(0, BL)
        column_tiles = 1
        tiles = _blocks(rows, BR)
    else:
        channel = tl.program_id(0) + tl.arange(0, 1)
        column_tiles = _blocks(columns, BL)
        tiles = _blocks(rows, BR) * column_tiles
    first = tl.program_id(1) * per_split
    return channel, channel < channels, first, tl.minimum(first + per_split, tiles), column_tiles


@triton.jit
def _part(t, rows, columns, channels, column_tiles, CHANNELS_LAST: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr):
    """Tile t of a program's channels: 64-bit start, offsets, mask."""
    row, r, c = t // column_tiles * BR, tl.arange(0, BR), tl.arange(0, BL)
    if CHANNELS_LAST:
        column = tl.program_id(0) * BL
        start = row.to(tl.int64) * channels + column
        inside = (row + r < rows)[:, None] & (column + c < channels)[None, :]
        return start, r[:, None] * channels + c[None, :], inside
    else:
        column = t % column_tiles * BL
        start = (row.to(tl.int64) * channels + tl.program_id(0)) * columns + column
        inside = (row + r < rows)[:, None] & (column + c < columns)[None, :]
        # From one row of a channel to the next lies a whole image.
        return start, r.to(tl.int64)[:, None] * channels * columns + c[None, :], inside


@triton.jit
def _total(lanes, CHANNELS_LAST: tl.constexpr):
    """Sum of a tile over everything but its channels."""
    total = tl.sum(lanes, 0)
    if CHANNELS_LAST:
        return total
    else:
        return tl.sum(total, 0) + tl.zeros((1,), lanes.dtype)


@triton.jit
def _stats_kernel(
    part_n, part_mean, part_m2, y, rows, columns, channels, per_split,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    channel, known, first, last, column_tiles = _walk(rows, columns, channels, per_split, CHANNELS_LAST, BR, BL)
    # Deviations from the mean of the first tile: small numbers, whatever the mean, and no single outlier
    # rules them.
    start, offsets, inside = _part(first, rows, columns, channels, column_tiles, CHANNELS_LAST, BR, BL)
    value = tl.load(y + start + offsets, inside, 0.0).to(ACC)
    pivot = _total(value, CHANNELS_LAST) / tl.maximum(_total(inside.to(ACC), CHANNELS_LAST), 1.0)
    sums = tl.zeros((BR, BL), ACC)
    squares = tl.zeros((BR, BL), ACC)
    counts = tl.zeros((BR, BL), ACC)
    for t in range(first, last):
        start, offsets, inside = _part(t, rows, columns, channels, column_tiles, CHANNELS_LAST, BR, BL)
        value = tl.load(y + start + offsets, inside, 0.0).to(ACC)
        deviation = tl.where(inside, value - pivot[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
        counts += inside.to(ACC)
    n = tl.maximum(_total(counts, CHANNELS_LAST), 1.0)
    shift = _total(sums, CHANNELS_LAST) / n
    lane_mean = sums / tl.maximum(counts, 1.0)
    apart = lane_mean - shift[None, :]
    m2 = _total(squares - sums * lane_mean + counts * apart * apart, CHANNELS_LAST)
    at = tl.program_id(1) * channels + channel
    tl.store(part_n + at, n, known)
    tl.store(part_mean + at, pivot + shift, known)
    tl.store(part_m2 + at, m2, known)


@triton.jit
def _combine_kernel(mean, m2, part_n, part_mean, part_m2, splits, channels, SPLITS: tl.constexpr, BC: tl.constexpr):
    """Chan's rule over all partial statistics at once, as deviations from the first partial mean."""
    channel, split = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, SPLITS)
    known = channel < channels
    at = split[:, None] * channels + channel[None, :]
    inside = (split < splits)[:, None] & known[None, :]
    n = tl.load(part_n + at, inside, 0.0)
    pivot = tl.load(part_mean + channel, known, 0.0)
    deviation = tl.where(inside, tl.load(part_mean + at, inside, 0.0) - pivot[None, :], 0.0)
    shift = tl.sum(n * deviation, 0) / tl.maximum(tl.sum(n, 0), 1.0)
    apart = deviation - shift[None, :]
    total = tl.sum(tl.load(part_m2 + at, inside, 0.0) + n * apart * apart, 0)
    tl.store(mean + channel, pivot + shift, known)
    tl.store(m2 + channel, total, known)


@triton.jit
def _reduce_kernel(
    part_weight, part_bias, dz, y, mean, invstd, weight, bias, rows, columns, channels, per_split,
    SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    channel, known, first, last, column_tiles = _walk(rows, columns, channels, per_split, CHANNELS_LAST, BR, BL)
    m = tl.load(mean + channel, known, 0.0)[None, :]
    s = (tl.load(weight + channel, known, 0.0) * tl.load(invstd + channel, known, 0.0))[None, :]
    b = tl.load(bias + channel, known, 0.0)[None, :]
    sums = tl.zeros((BR, BL), ACC)
    products = tl.zeros((BR, BL), ACC)
    for t in range(first, last):
        start, offsets, inside = _part(t, rows, columns, channels, column_tiles, CHANNELS_LAST, BR, BL)
        value = tl.load(y + start + offsets, inside, 0.0).to(ACC)
        v = _preactivation(value, m, s, b)
        g = _through_activation(tl.load(dz + start + offsets, inside, 0.0).to(ACC), v, SLOPE)
        sums += tl.where(inside, g, 0.0)
        products += tl.where(inside, g * (value - m), 0.0)
    at = tl.program_id(1) * channels + channel
    tl.store(part_weight + at, _total(products, CHANNELS_LAST), known)
    tl.store(part_bias + at, _total(sums, CHANNELS_LAST), known)


@triton.jit
def _sum_kernel(
    grad_weight, grad_bias, part_weight, part_bias, invstd, splits, channels,
    SPLITS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    channel, split = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, SPLITS)
    known = channel < channels
    at = split[:, None] * channels + channel[None, :]
    inside = (split < splits)[:, None] & known[None, :]
    r = tl.load(invstd + channel, known, 0.0)
    tl.store(grad_weight + channel, r * tl.sum(tl.load(part_weight + at, inside, 0.0), 0), known)
    tl.store(grad_bias + channel, tl.sum(tl.load(part_bias + at, inside, 0.0), 0), known)


@triton.jit
def _update_kernel(
    running_mean, running_var, mean, var, momentum: tl.float64, unbias: tl.float64, channels, BC: tl.constexpr
):
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    known = channel < channels
    batch_mean = tl.load(mean + channel, known, 0.0)
    m = tl.full((BC,), momentum, batch_mean.dtype)
    batch_var = tl.load(var + channel, known, 0.0) * tl.full((BC,), unbias, batch_mean.dtype)
    old_mean = tl.load(running_mean + channel, known, 0.0).to(batch_mean.dtype)
    old_var = tl.load(running_var + channel, known, 0.0).to(batch_var.dtype)
    new_mean = old_mean * (1 - m) + batch_mean * m
    new_var = old_var * (1 - m) + batch_var * m
    tl.store(running_mean + channel, new_mean.to(running_mean.dtype.element_ty), known)
    tl.store(running_var + channel, new_var.to(running_var.dtype.element_ty), known)


# --- the host's part ------------------------------------------------------------------------------


def _matrix(y: Tensor) -> tuple[bool, int, int]:
    """(channels-last?, rows, columns) of the dense matrix that y is; for one channel both hold and rows are
    longer."""
    channels = y.shape[1]
    spatial = y.numel() // (y.shape[0] * channels)
    if spatial == 1 or (channels > 1 and not y.is_contiguous()):
        return True, y.shape[0] * spatial, channels
    return False, y.shape[0] * channels, spatial


def _shape_of_tile(columns: int, widest: int, elements: int) -> dict[str, int]:
    width = min(triton.next_power_of_2(columns), widest)
    return {"BR": max(elements // width, 1) if columns < LONG_ROW else 1, "BL": width}


def _acc(y: Tensor) -> tl.dtype:
    return tl.float64 if y.dtype == torch.float64 else tl.float32


def _elementwise(kernel, y: Tensor, *args, **meta) -> None:
    channels_last, rows, columns = _matrix(y)

    def run(by: Configuration) -> None:
        tile = _shape_of_tile(columns, 128 if channels_last else 1024, by.tile)
        grid = (triton.cdiv(rows, tile["BR"]) * triton.cdiv(columns, tile["BL"]),)
        launch(
            kernel, grid, y, *args, rows, columns, y.shape[1],
            CHANNELS_LAST=channels_last, ACC=_acc(y), num_warps=by.warps, **tile, **meta,
        )  # fmt: skip

    run(choose(kernel.fn.__name__, y, run))


def _per_channel(kernel, y: Tensor, outputs: int, *args, **meta) -> tuple[int, list[Tensor]]:
    """Launch a reduction; returns the number of splits and the partial results [splits, C], one tensor per
    output."""
    channels = y.shape[1]
    channels_last, rows, columns = _matrix(y)
    if channels_last:
        tile = _shape_of_tile(columns, 64, TILE)
        blocks, tiles = triton.cdiv(channels, tile["BL"]), triton.cdiv(rows, tile["BR"])
    else:
        rows //= channels
        tile = _shape_of_tile(columns, 1024, TILE)
        blocks, tiles = channels, triton.cdiv(rows, tile["BR"]) * triton.cdiv(columns, tile["BL"])
    per_split = triton.cdiv(tiles, min(MAX_SPLITS, max(1, PROGRAMS // blocks)))
    splits = triton.cdiv(tiles, per_split)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    parts = list(y.new_empty((outputs, splits, channels), dtype=dtype).unbind())
    launch(
        kernel, (blocks, splits), y, *parts, *args, rows, columns, channels, per_split,
        CHANNELS_LAST=channels_last, ACC=_acc(y), num_warps=WARPS, **tile, **meta,
    )  # fmt: skip
    return splits, parts


def _second_stage(kernel, like: Tensor, splits: int, *args) -> tuple[Tensor, Tensor]:
    channels = like.shape[-1]
    first, second = like.new_empty(channels), like.new_empty(channels)
    size = triton.next_power_of_2(splits)
    block = max(TILE // size // 2, 16)
    launch(
        kernel, (triton.cdiv(channels, block),), like, first, second, *args, splits, channels,
        SPLITS=size, BC=block, num_warps=WARPS,
    )  # fmt: skip
    return first, second


def bn_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    splits, parts = _per_channel(_stats_kernel, y, 3, y)
    return _second_stage(_combine_kernel, parts[0], splits, *parts)


def bn_act(y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
    z = torch.empty_like(y)
    _elementwise(_apply_kernel, y, z, y, mean, invstd, weight, bias, SLOPE=float(slope))
    return z


def bn_act_reduce(
    dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    args = (dz, y, mean, invstd, weight, bias)
    splits, parts = _per_channel(_reduce_kernel, y, 2, *args, SLOPE=float(slope))
    return _second_stage(_sum_kernel, parts[0], splits, *parts, invstd)


def bn_act_backward(
    dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor, slope: float,
    grad_weight: Tensor | None, grad_bias: Tensor | None, count: int,
) -> Tensor:  # fmt: skip
    dy = torch.empty_like(y)
    sums = (mean, mean) if grad_weight is None or grad_bias is None else (grad_weight, grad_bias)
    _elementwise(
        _backward_kernel, y, dy, dz, y, mean, invstd, weight, bias, *sums, float(count),
        FROZEN=count == 0, SLOPE=float(slope),
    )  # fmt: skip
    return dy


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    channels = mean.shape[0]
    launch(
        _update_kernel, (triton.cdiv(channels, 256),), mean, running_mean, running_var, mean, var,
        float(momentum), count / (count - 1), channels, BC=256, num_warps=WARPS,
    )  # fmt: skip
