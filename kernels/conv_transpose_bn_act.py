"""The sub-pixel phases of a transposed convolution, which is also the gradient of a strided one by its input.

Output pixel i takes kernel position r where i + padding - r*dilation is a multiple of the stride. All pixels of one
phase, i % stride, therefore share their kernel positions, and those of a phase lie evenly spaced: within a phase the
transposed convolution is a plain one with fewer taps, and nothing is multiplied that does not count. The kernel that
runs them is `conv_bn_act.py`'s.
"""

import math

import triton
import triton.language as tl


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


def spacing(stride: int, dilation: int) -> int:
    """Kernel positions from one tap of a phase to the next."""
    return stride // math.gcd(stride, dilation)


def lone_pixel_stride(size: int, kernel: int, stride: int, dilation: int) -> int:
    """The stride with which an axis is best computed: where the input has one pixel any stride gives the same result,
    and the largest gives each output pixel a phase, and so one tap, of its own."""
    return max(stride, (kernel - 1) * dilation + 1) if size == 1 else stride
