"""Triton kernels of the O(C) work between two convolutions: from a convolution's sums, tile by tile, to the constants
of the next operand. The contract stands in `fastgan/ops/conv_bn_act_eager.py`.

The last program of a convolution does it (`_finish`); the two kernels here do it where sums come from elsewhere, or
none are taken (frozen statistics).
"""

import triton
import triton.language as tl
from fastgan.kernels.conv_bn_act_arrivals import _comes_last
from fastgan.kernels.conv_bn_act_operand import accumulator
from fastgan.kernels.launch import launch
from torch import Tensor

CHANNELS, TILES = 8, 128  # 32 bytes of a row, one sector; programs enough for a few channels


@triton.jit
def _tiles_of(parts, every, start, stop, channels, c, known, BT: tl.constexpr):
    """Where `parts`, rows of `every` elements, has the tiles `start` and on, before `stop`, of the channels c."""
    t = start + tl.arange(0, BT)
    return parts + t[:, None] * channels + c[None, :], (t < stop)[:, None] & known[None, :]


@triton.jit
def _statistics(parts, every, start, stop, channels, c, known, ACC: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):
    """Count, mean, what rounding took from the mean, and m2 of the tiles `start` to `stop`, by Chan's rule over all at
    once: as deviations from a first estimate of the mean, for far from 0 a mean has few digits left."""
    counts, total = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    for at in range(start, stop, BT):
        part, inside = _tiles_of(parts, every, at, stop, channels, c, known, BT)
        n = tl.load(part, inside, 0.0, cache_modifier=".cg")
        counts += tl.sum(n, 0)
        total += tl.sum(n * tl.load(part + every, inside, 0.0, cache_modifier=".cg"), 0)
    estimate = total / tl.maximum(counts, 1.0)
    shifted, m2 = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    for at in range(start, stop, BT):
        part, inside = _tiles_of(parts, every, at, stop, channels, c, known, BT)
        n = tl.load(part, inside, 0.0, cache_modifier=".cg")
        mean = tl.load(part + every, inside, 0.0, cache_modifier=".cg")
        apart = mean - estimate[None, :] + tl.load(part + 3 * every, inside, 0.0, cache_modifier=".cg")
        shifted += tl.sum(n * apart, 0)
        m2 += tl.sum(tl.load(part + 2 * every, inside, 0.0, cache_modifier=".cg") + n * apart * apart, 0)
    shift = shifted / tl.maximum(counts, 1.0)
    mean = estimate + shift
    moved = mean - estimate
    rest = (estimate - (mean - moved)) + (shift - moved)
    return counts, mean, rest, m2 - shifted * shift


@triton.jit
def _sums(parts, every, start, stop, channels, c, known, ACC: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):
    """The two sums of the gradient over the tiles `start` to `stop`."""
    sums, products = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    for at in range(start, stop, BT):
        part, inside = _tiles_of(parts, every, at, stop, channels, c, known, BT)
        sums += tl.sum(tl.load(part, inside, 0.0, cache_modifier=".cg"), 0)
        products += tl.sum(tl.load(part + every, inside, 0.0, cache_modifier=".cg"), 0)
    return sums, products


@triton.jit
def _forward_constants(out, mean, var, weight, bias, channels, c, known, eps, ACC: tl.constexpr, BC: tl.constexpr):
    """[mu, s, beta, 1/std]."""
    invstd = 1.0 / tl.sqrt(var + tl.full((BC,), eps, ACC))
    scale, shift = invstd, tl.zeros((BC,), ACC)
    if weight is not None:
        scale *= tl.load(weight + c, known, 0.0).to(ACC)
    if bias is not None:
        shift = tl.load(bias + c, known, 0.0).to(ACC)
    tl.store(out + c, mean, known)
    tl.store(out + channels + c, scale, known)
    tl.store(out + 2 * channels + c, shift, known)
    tl.store(out + 3 * channels + c, invstd, known)


@triton.jit
def _update(running_mean, running_var, counts, mean, m2, c, known, momentum, ACC: tl.constexpr, BC: tl.constexpr):
    m = tl.full((BC,), momentum, ACC)
    unbiased = m2 / tl.maximum(counts - 1.0, 1.0)
    old_mean, old_var = tl.load(running_mean + c, known, 0.0), tl.load(running_var + c, known, 0.0)
    new_mean, new_var = old_mean.to(ACC) * (1 - m) + mean * m, old_var.to(ACC) * (1 - m) + unbiased * m
    tl.store(running_mean + c, new_mean.to(old_mean.dtype), known)
    tl.store(running_var + c, new_var.to(old_var.dtype), known)


@triton.jit
def _backward_constants(
    out, grads, sums, products, constants, count, channels, c, known, ACC: tl.constexpr, BC: tl.constexpr
):
    """[A, B, C, mu], and the gradients of the BatchNorm's weight and bias."""
    mean = tl.load(constants + c, known, 0.0)
    scale = tl.load(constants + channels + c, known, 0.0)
    invstd = tl.load(constants + 3 * channels + c, known, 0.0)
    grad_weight = invstd * products
    # A count of 0 means that the statistics are frozen.
    share = tl.where(count > 0, 1.0 / tl.full((BC,), tl.maximum(count, 1.0), ACC), 0.0)
    along, constant = -scale * invstd * grad_weight * share, -scale * sums * share
    tl.store(grads + c, grad_weight, known)
    tl.store(grads + channels + c, sums, known)
    tl.store(out + c, scale, known)
    tl.store(out + channels + c, along, known)
    tl.store(out + 2 * channels + c, constant, known)
    tl.store(out + 3 * channels + c, mean, known)


@triton.jit
def _finish(
    out, grads, parts, counters, weight, bias, running_mean, running_var, constants, eps, momentum, count,
    tile, tiles, column_tile, channels, c, known, FORWARD: tl.constexpr,
    GROUP: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """At the end of each program of a convolution, the tile `tile` of `tiles` that share the channels c: the last of a
    group combines its tiles, behind all tiles in `parts`, and the last of the groups these."""
    groups = tl.cdiv(tiles, GROUP)
    every = (tiles + groups).to(tl.int64) * channels
    group = tile // GROUP
    start = group * GROUP
    stop = tl.minimum(start + GROUP, tiles)
    counter = counters + column_tile * (groups + 1)
    if _comes_last(counter + group, stop - start):
        combined = parts + (tiles + group) * channels + c
        if FORWARD:
            n, mean, rest, m2 = _statistics(parts, every, start, stop, channels, c, known, ACC, BC, BT)
            tl.store(combined, n, known)
            tl.store(combined + every, mean, known)
            tl.store(combined + 2 * every, m2, known)
            tl.store(combined + 3 * every, rest, known)
        else:
            sums, products = _sums(parts, every, start, stop, channels, c, known, ACC, BC, BT)
            tl.store(combined, sums, known)
            tl.store(combined + every, products, known)
        if _comes_last(counter + groups, groups):
            start, stop = tiles, tiles + groups
            if FORWARD:
                n, mean, _, m2 = _statistics(parts, every, start, stop, channels, c, known, ACC, BC, BT)
                var = m2 / tl.maximum(n, 1.0)
                _forward_constants(out, mean, var, weight, bias, channels, c, known, eps, ACC, BC)
                if running_mean is not None:
                    _update(running_mean, running_var, n, mean, m2, c, known, momentum, ACC, BC)
            else:
                sums, products = _sums(parts, every, start, stop, channels, c, known, ACC, BC, BT)
                _backward_constants(out, grads, sums, products, constants, count, channels, c, known, ACC, BC)


# --- where no convolution does it -----------------------------------------------------------------


@triton.jit
def _forward_kernel(
    out, parts, weight, bias, running_mean, running_var, tiles, channels, eps: tl.float64, momentum: tl.float64,
    FROZEN: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    known = c < channels
    if FROZEN:
        mean = tl.load(running_mean + c, known, 0.0).to(ACC)
        var = tl.load(running_var + c, known, 0.0).to(ACC)
    else:
        n, mean, _, m2 = _statistics(parts, tiles * channels, 0, tiles, channels, c, known, ACC, BC, BT)
        var = m2 / tl.maximum(n, 1.0)
        if running_mean is not None:
            _update(running_mean, running_var, n, mean, m2, c, known, momentum, ACC, BC)
    _forward_constants(out, mean, var, weight, bias, channels, c, known, eps, ACC, BC)


@triton.jit
def _backward_kernel(
    out, grads, parts, constants, count: tl.float64, tiles, channels,
    ACC: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    known = c < channels
    sums, products = _sums(parts, tiles * channels, 0, tiles, channels, c, known, ACC, BC, BT)
    _backward_constants(out, grads, sums, products, constants, count, channels, c, known, ACC, BC)


def block_constants(
    y: Tensor, parts: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, eps: float, momentum: float,
) -> Tensor:  # fmt: skip
    channels = y.shape[1]
    out = rows_of(4, channels, y)
    launch(
        _forward_kernel, (triton.cdiv(channels, CHANNELS),), out,
        out, parts, weight, bias, running_mean, running_var, 0 if parts is None else parts.shape[1], channels,
        float(eps), float(momentum), FROZEN=parts is None, ACC=accumulator(y)[0], BC=CHANNELS, BT=TILES, num_warps=4,
    )  # fmt: skip
    return out


def block_gradient_constants(parts: Tensor, constants: Tensor, count: int) -> tuple[Tensor, Tensor]:
    channels = constants.shape[1]
    out, grads = rows_of(4, channels, constants), rows_of(2, channels, constants)
    launch(
        _backward_kernel, (triton.cdiv(channels, CHANNELS),), out, out, grads, parts, constants, float(count),
        parts.shape[1], channels, ACC=accumulator(constants)[0], BC=CHANNELS, BT=TILES, num_warps=4,
    )  # fmt: skip
    return out, grads


def rows_of(rows: int, channels: int, like: Tensor) -> Tensor:
    """Room for rows of one value per channel, in what statistics of `like` are held in."""
    return like.new_empty((rows, channels), dtype=accumulator(like)[1])
