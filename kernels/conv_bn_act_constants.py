"""Triton kernels of the O(C) work between two convolutions: from a convolution's sums, tile by tile, to the constants
of the next operand, one launch per block and direction. The contract stands in `fastgan/ops/conv_bn_act_eager.py`.
"""

import torch
import triton
import triton.language as tl
from fastgan.kernels.launch import launch
from torch import Tensor

CHANNELS, TILES = 8, 128  # 32 bytes of a row, one sector; programs enough for a few channels


@triton.jit
def _some_tiles(parts, pivot, start, tiles, channels, c, known, BT: tl.constexpr):
    """Of BT tiles: counts, means as deviations from the pivot, and m2."""
    t = start + tl.arange(0, BT)
    inside = (t < tiles)[:, None] & known[None, :]
    at = t[:, None] * channels + c[None, :]
    n = tl.load(parts + at, inside, 0.0)
    mean = tl.load(parts + tiles * channels + at, inside, 0.0)
    rest = tl.load(parts + 3 * tiles * channels + at, inside, 0.0)
    return n, mean - pivot[None, :] + rest, tl.load(parts + 2 * tiles * channels + at, inside, 0.0)


@triton.jit
def _forward_kernel(
    out, parts, weight, bias, running_mean, running_var, tiles, channels, eps: tl.float64, momentum: tl.float64,
    FROZEN: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RUNNING: tl.constexpr, ACC: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    known = c < channels
    if FROZEN:
        mean = tl.load(running_mean + c, known, 0.0).to(ACC)
        var = tl.load(running_var + c, known, 0.0).to(ACC)
    else:
        # Chan's rule over all tiles at once, as deviations from the first tile's mean, which has a value.
        pivot = tl.load(parts + tiles * channels + c, known, 0.0)
        counts = tl.zeros((BC,), ACC)
        shifted = tl.zeros((BC,), ACC)
        for start in range(0, tiles, BT):
            n, deviation, _ = _some_tiles(parts, pivot, start, tiles, channels, c, known, BT)
            counts += tl.sum(n, 0)
            shifted += tl.sum(n * deviation, 0)
        shift = shifted / tl.maximum(counts, 1.0)
        mean = pivot + shift
        m2 = tl.zeros((BC,), ACC)
        for start in range(0, tiles, BT):
            n, deviation, spread = _some_tiles(parts, pivot, start, tiles, channels, c, known, BT)
            apart = deviation - shift[None, :]
            m2 += tl.sum(spread + n * apart * apart, 0)
        var = m2 / tl.maximum(counts, 1.0)
        if RUNNING:
            m = tl.full((BC,), momentum, ACC)
            unbiased = m2 / tl.maximum(counts - 1.0, 1.0)
            old_mean, old_var = tl.load(running_mean + c, known, 0.0), tl.load(running_var + c, known, 0.0)
            new_mean, new_var = old_mean.to(ACC) * (1 - m) + mean * m, old_var.to(ACC) * (1 - m) + unbiased * m
            tl.store(running_mean + c, new_mean.to(old_mean.dtype), known)
            tl.store(running_var + c, new_var.to(old_var.dtype), known)
    invstd = 1.0 / tl.sqrt(var + tl.full((BC,), eps, ACC))
    scale, shift = invstd, tl.zeros((BC,), ACC)
    if WEIGHT:
        scale *= tl.load(weight + c, known, 0.0).to(ACC)
    if BIAS:
        shift = tl.load(bias + c, known, 0.0).to(ACC)
    tl.store(out + c, mean, known)
    tl.store(out + channels + c, scale, known)
    tl.store(out + 2 * channels + c, shift, known)
    tl.store(out + 3 * channels + c, invstd, known)


@triton.jit
def _backward_kernel(
    out, grads, parts, constants, count: tl.float64, tiles, channels,
    FROZEN: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    known = c < channels
    sums, products = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        inside = (t < tiles)[:, None] & known[None, :]
        at = t[:, None] * channels + c[None, :]
        sums += tl.sum(tl.load(parts + at, inside, 0.0), 0)
        products += tl.sum(tl.load(parts + tiles * channels + at, inside, 0.0), 0)
    mean = tl.load(constants + c, known, 0.0)
    scale = tl.load(constants + channels + c, known, 0.0)
    invstd = tl.load(constants + 3 * channels + c, known, 0.0)
    grad_weight = invstd * products
    along, constant = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    if not FROZEN:
        n = tl.full((BC,), count, ACC)
        along, constant = -scale * invstd * grad_weight / n, -scale * sums / n
    tl.store(grads + c, grad_weight, known)
    tl.store(grads + channels + c, sums, known)
    tl.store(out + c, scale, known)
    tl.store(out + channels + c, along, known)
    tl.store(out + 2 * channels + c, constant, known)
    tl.store(out + 3 * channels + c, mean, known)


def block_constants(
    y: Tensor, parts: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, eps: float, momentum: float,
) -> Tensor:  # fmt: skip
    channels = y.shape[1]
    out, acc = _rows(4, y)
    launch(
        _forward_kernel, (triton.cdiv(channels, CHANNELS),), out,
        out, parts, weight, bias, running_mean, running_var, 0 if parts is None else parts.shape[1], channels,
        float(eps), float(momentum), FROZEN=parts is None, WEIGHT=weight is not None, BIAS=bias is not None,
        RUNNING=running_mean is not None, ACC=acc, BC=CHANNELS, BT=TILES, num_warps=4,
    )  # fmt: skip
    return out


def block_gradient_constants(parts: Tensor, constants: Tensor, count: int) -> tuple[Tensor, Tensor]:
    channels = constants.shape[1]
    (out, acc), (grads, _) = _rows(4, constants), _rows(2, constants)
    launch(
        _backward_kernel, (triton.cdiv(channels, CHANNELS),), out, out, grads, parts, constants, float(count),
        parts.shape[1], channels, FROZEN=count == 0, ACC=acc, BC=CHANNELS, BT=TILES, num_warps=4,
    )  # fmt: skip
    return out, grads


def _rows(rows: int, like: Tensor) -> tuple[Tensor, tl.dtype]:
    """Rows of one value per channel, in what statistics of `like` are held in."""
    wide = like.dtype == torch.float64
    out = like.new_empty((rows, like.shape[1]), dtype=torch.float64 if wide else torch.float32)
    return out, tl.float64 if wide else tl.float32
