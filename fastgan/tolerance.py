"""The one tolerance rule, for the tests and for the comparison at a kernel's first use.

Against the fp64 definition on the upcast inputs, both the RMS and the maximum error of a kernel are at most
twice those of PyTorch's own implementation with the same dtype, device and TF32 setting. One ulp of the
output's largest element is granted to the maximum only. In fp64, where PyTorch's own result is the truth, its
error is taken as 4096 ulps.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0


class Errors(NamedTuple):
    """RMS and maximum of |got - truth| over the elements where the truth is finite."""

    rms: float
    max: float


def errors(got: Tensor, truth: Tensor, where: Tensor | None = None) -> Errors:
    """The errors of `got` against `truth` (fp64, same shape), over the elements `where` (default: all)."""
    difference = (got.detach().double() - truth.detach().double()).abs()
    if where is not None:
        difference = difference[where]
    if difference.numel() == 0:
        return Errors(0.0, 0.0)
    largest = difference.max()
    if largest == 0 or not torch.isfinite(largest):
        return Errors(largest.item(), largest.item())
    return Errors((largest * (difference / largest).square().mean().sqrt()).item(), largest.item())


def ulp(largest: float, dtype: torch.dtype) -> float:
    """The spacing of `dtype`'s numbers at `largest`."""
    information = torch.finfo(dtype)
    if largest < information.tiny:
        return information.tiny * information.eps
    return 2.0 ** math.floor(math.log2(largest)) * information.eps


def misses(
    got: Tensor | Sequence[Tensor],
    own: Tensor | Sequence[Tensor],
    truth: Tensor | Sequence[Tensor],
    factor: float = FACTOR,
    floor: Sequence[float] = (),
) -> str | None:
    """None if `got` is as right as the rule asks, else why not.

    Args:
        got: a kernel's output, or a tuple of them.
        own: PyTorch's own result for the same input, dtype and device.
        truth: the definition in fp64.
        factor: 2; only a documented algorithm with a stated larger error takes another.
        floor: for each output, an error that is let pass in any case; the tests give none.
    """
    if not isinstance(got, Tensor):
        assert not isinstance(own, Tensor)
        assert not isinstance(truth, Tensor)
        floors = floor or [0.0] * len(got)
        for index, (*one, least) in enumerate(zip(got, own, truth, floors, strict=True)):
            reason = misses(one[0], one[1], one[2], factor, [least])
            if reason is not None:
                return f"output {index}: {reason}"
        return None
    assert isinstance(own, Tensor)
    assert isinstance(truth, Tensor)
    if got.shape != truth.shape or got.dtype != own.dtype:
        return f"expected {tuple(truth.shape)} {own.dtype}, got {tuple(got.shape)} {got.dtype}"
    finite = torch.isfinite(truth) & torch.isfinite(own)
    same = (got == own) | (got.isnan() & own.isnan())
    if not bool((finite | same).all()):
        where = (~(finite | same)).nonzero()[0].tolist()
        return f"at {where} PyTorch has {own[tuple(where)].item()}, the kernel {got[tuple(where)].item()}"
    if not bool(finite.any()):
        return None
    mine, theirs = errors(got, truth, finite), errors(own, truth, finite)
    grant = ulp(truth[finite].abs().max().item(), got.dtype)
    if got.dtype == torch.float64:
        grant *= 4096
        theirs = Errors(max(theirs.rms, grant), max(theirs.max, grant))
    limit = Errors(factor * theirs.rms, factor * theirs.max + grant)
    least = floor[0] if floor else 0.0
    limit = Errors(max(limit.rms, least), max(limit.max, least))
    if not (mine.rms <= limit.rms and mine.max <= limit.max):
        return (
            f"error RMS {mine.rms:.3g}, max {mine.max:.3g}; allowed {limit.rms:.3g}, {limit.max:.3g} "
            f"({factor:g} times PyTorch's own {theirs.rms:.3g}, {theirs.max:.3g}; "
            f"one ulp, {grant:.3g}, more for the maximum)"
        )
    return None
