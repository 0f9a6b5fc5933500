"""The sub-pixel phases of a transposed convolution, which is also the gradient of a strided one by its input.

Output pixel i takes kernel position r where i + padding - r*dilation is a multiple of the stride. All pixels of one
phase, i % stride, therefore share their kernel positions, and those of a phase lie evenly spaced: within a phase the
transposed convolution is a plain one with fewer taps, and nothing is multiplied that does not count. The kernel that
runs them is `conv_bn_act.py`'s.

Where the output has few channels, phases are merged: kernel position r = f + t*stride leads from input pixel b - t to
output pixel b*stride + f - padding, so the pixels b - t of one b, its *meeting*, are all that stride^2 outputs need,
each by positions of its own phase f. Those outputs are columns of one product.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from fastgan.kernels.conv_bn_act_tiles import LEAST


@triton.jit
def _phase_taps(phase, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
                STEP: tl.constexpr):  # fmt: skip
    """Along one axis: first kernel position of the phase, number of positions (STEP apart), and the input pixel that
    the first one meets at the phase's first output pixel."""
    first = phase * 0 + KERNEL
    for r in tl.static_range(min(STEP, KERNEL)):
        first = tl.where((phase + PADDING - r * DILATION) % STRIDE == 0, r, first)
    taps = tl.cdiv(KERNEL - first, STEP)
    return first, taps, (phase + PADDING - first * DILATION) // STRIDE


@triton.jit
def _meetings(size, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """Along one axis with an output of `size`: how many b there are, from padding // stride on."""
    return (size - 1 + PADDING) // STRIDE - PADDING // STRIDE + 1


def spacing(stride: int, dilation: int) -> int:
    """Kernel positions from one tap of a phase to the next."""
    return stride // math.gcd(stride, dilation)


def lone_pixel_stride(size: int, kernel: int, stride: int, dilation: int) -> int:
    """The stride with which an axis is best computed: where the input has one pixel any stride gives the same result,
    and the largest gives each output pixel a phase, and so one tap, of its own."""
    return max(stride, (kernel - 1) * dilation + 1) if size == 1 else stride


def meetings(size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> int:
    """Of an output image of `size`."""
    return math.prod((n - 1 + pad) // by - pad // by + 1 for n, by, pad in zip(size, stride, padding, strict=True))


def merges(
    size: Sequence[int], channels: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:  # fmt: skip
    """Whether merged phases multiply less for an output of `size` and `channels`, what fills up tiles included."""
    phases, taps = math.prod(stride), math.prod(map(triton.cdiv, kernel, stride))
    merged = meetings(size, stride, padding) * taps * _filled(phases * channels)
    apart = math.prod(map(triton.cdiv, size, stride)) * math.prod(kernel) * _filled(channels)
    return math.prod(dilation) == 1 and merged < apart


def _filled(columns: int) -> int:
    return max(LEAST, triton.next_power_of_2(columns))
