"""What the convolution kernels share: how an operand is made from what is stored, where a tile's pixels lie."""

from typing import Any

import torch
import triton
import triton.language as tl
from fastgan.kernels.bn_act import _activate, _preactivation
from torch import Tensor


@triton.jit
def _operand(value, second, constants, channel, known, channels, inside, KIND: tl.constexpr, SLOPE: tl.constexpr,
             ACC: tl.constexpr):  # fmt: skip
    """What a convolution multiplies, from what is stored; `channel` and `known` run along the channels' axis.

    plain: a. activation: phi(s*(a - mu) + beta). leaky: phi(a). gradient: A*a + B*(b - mu) + C. The zeros of the
    padding come after it.
    """
    if KIND == "plain":
        return value
    elif KIND == "leaky":
        return _activate(value.to(ACC), SLOPE).to(value.dtype)
    else:
        first = tl.load(constants + channel, known, 0.0)
        scale = tl.load(constants + channels + channel, known, 0.0)
        shift = tl.load(constants + 2 * channels + channel, known, 0.0)
        if KIND == "activation":
            mapped = _activate(_preactivation(value.to(first.dtype), first, scale, shift), SLOPE)
        else:
            mean = tl.load(constants + 3 * channels + channel, known, 0.0)
            along = tl.fma(scale + tl.zeros_like(mean), second.to(mean.dtype) - mean, shift + tl.zeros_like(mean))
            mapped = first * value.to(mean.dtype) + along
        return tl.where(inside, mapped, 0.0).to(value.dtype)


@triton.jit
def _pixels(tile, BLOCK: tl.constexpr, images, height, width):
    """The pixels `tile`*BLOCK and on of [images, height, width]: image (64-bit), row, column, and whether they exist.
    The division is 32-bit, for a start within the first image."""
    area = height * width
    start = tile * tl.full((), BLOCK, tl.int64)
    first = start // area
    local = (start - first * area).to(tl.int32) + tl.arange(0, BLOCK)
    image = first + local // area
    local = local % area
    return image, local // width, local % width, image < images


def precision_of(value: Tensor) -> str:
    """How fp32 operands are multiplied: by torch's own switch for convolutions on the tensor's kind of device."""
    backend: Any = torch.backends.mkldnn if value.device.type == "cpu" else torch.backends.cudnn
    return "tf32" if backend.conv.fp32_precision == "tf32" else "ieee"


def kind_of(second: Tensor | None, constants: Tensor | None, slope: float) -> str:
    """Which operand the tensors make."""
    if second is not None:
        return "gradient"
    return ("plain" if slope == 1.0 else "leaky") if constants is None else "activation"


def accumulator(value: Tensor) -> tuple[tl.dtype, torch.dtype]:
    """What products and sums are held in, for Triton and for torch."""
    wide = value.dtype == torch.float64
    return (tl.float64, torch.float64) if wide else (tl.float32, torch.float32)
