"""Triton kernel of gan_bce: both losses, both means and both gradients in one launch of one program.
 A batch of logits is a few thousand numbers at most, so one program walks all of them: the order of its
additions is fixed, and nothing waits for a second launch. The contract stands in `fastgan/backends.py`.
"""

import torch
import triton
import triton.language as tl
from fastgan.kernels.launch import launch
from torch import Tensor

MAX_BLOCK = 4096


@triton.jit
def _half(logits, grad, n, TARGET: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Mean loss and mean sigmoid of n logits; stores the gradients."""
    losses = tl.zeros((BLOCK,), ACC)
    means = tl.zeros((BLOCK,), ACC)
    for block in range(0, (n - 1) // BLOCK + 1):  # by elements, a count of 32 bits would pass 2^31 where n nearly does
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        x = tl.load(logits + at, inside, 0.0).to(ACC)
        e = tl.exp(-tl.abs(x))
        one = 1.0 + e
        # log(1 + e) to full relative accuracy, without libdevice: where 1 + e rounds to 1 it is e itself.
        log1p = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
        near, far = 1.0 / one, e / one
        p = tl.where(x < 0, far, near)
        q = tl.where(x < 0, near, far)
        loss = (1.0 - TARGET) * tl.maximum(x, 0.0) + TARGET * tl.maximum(-x, 0.0) + log1p
        # (1-t)*p - t*(1-p), not p - t: nothing cancels where D is sure and right.
        tl.store(grad + at, ((1.0 - TARGET) * p - TARGET * q) / n, inside)
        losses += tl.where(inside, tl.where(x == x, loss, x), 0.0)
        means += tl.where(inside, tl.where(x == x, p, x), 0.0)
    return tl.sum(losses, 0) / n, tl.sum(means, 0) / n


@triton.jit
def _gan_bce_kernel(
    stats, grad_real, grad_fake, real, fake, n_real, n_fake,
    REAL_TARGET: tl.constexpr, FAKE_TARGET: tl.constexpr, REAL: tl.constexpr, FAKE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    zero = tl.sum(tl.zeros((BLOCK,), ACC), 0)
    loss_real, mean_real = zero, zero
    loss_fake, mean_fake = zero, zero
    if REAL:
        loss_real, mean_real = _half(real, grad_real, n_real, REAL_TARGET, ACC, BLOCK)
    if FAKE:
        loss_fake, mean_fake = _half(fake, grad_fake, n_fake, FAKE_TARGET, ACC, BLOCK)
    tl.store(stats, loss_real)
    tl.store(stats + 1, loss_fake)
    tl.store(stats + 2, mean_real)
    tl.store(stats + 3, mean_fake)


def gan_bce(
    real: Tensor | None, fake: Tensor | None, real_target: float, fake_target: float
) -> tuple[Tensor, Tensor, Tensor]:
    some = real if real is not None else fake
    assert some is not None
    dtype = torch.float64 if some.dtype == torch.float64 else torch.float32
    stats = some.new_empty(4, dtype=dtype)
    grads = [some.new_empty(0 if x is None else x.shape, dtype=dtype) for x in (real, fake)]
    sizes = [0 if x is None else x.numel() for x in (real, fake)]
    launch(
        _gan_bce_kernel, (1,), some, stats, *grads, *(some if x is None else x for x in (real, fake)), *sizes,
        REAL_TARGET=float(real_target), FAKE_TARGET=float(fake_target),
        REAL=real is not None, FAKE=fake is not None,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        BLOCK=min(triton.next_power_of_2(max(sizes)), MAX_BLOCK), num_warps=4,
    )  # fmt: skip
    return stats, grads[0], grads[1]
