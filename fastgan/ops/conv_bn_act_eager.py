"""The split operations that a run of blocks is made of, in plain PyTorch: the definition of every fused convolution.

Between two convolutions only raw outputs y are stored, with per-channel constants (the letters are those of the design:
z = phi(s*(y - mu) + beta), dy = A*g + B*(y - mu) + C). A convolution takes an *operand*, four arguments that say how a
stored tensor is mapped while it is read:

    value, None, None, 1.0                   the tensor itself
    value, None, None, slope                 phi(value)
    value, None, [mu, s, beta, 1/std], slope phi(s*(value - mu) + beta)
    value, second, [A, B, C, mu], 1.0        A*value + B*(second - mu) + C

and its zero padding comes after that. **The contract** of a kernel (`fastgan/backends.py` tells how one plugs in):

    convolve(operand..., Tensor weight, Tensor? bias, geometry, bool to_large, (int, int) size,
        bool statistics, Tensor? out_y, Tensor? out_constants, float out_slope) -> (Tensor y, Tensor parts)
    weight_gradient(large operand..., small operand..., Tensor weight, geometry) -> Tensor
    block_constants(Tensor y, Tensor? parts, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,
        float eps, float momentum) -> Tensor [mu, s, beta, 1/std]
    block_gradient_constants(Tensor parts, Tensor constants, int count) -> (Tensor [A, B, C, mu], Tensor [2, C])
    convolve_block_constants(convolve's up to size, block_constants' from weight on) -> (Tensor y, Tensor [4, C])
    convolve_block_gradient_constants(convolve's up to size without bias, out_y, out_constants, out_slope, int count)
        -> (Tensor y, Tensor [4, C], Tensor [2, C])

`geometry` is (kernel, stride, padding, dilation), pairs of ints, of a convolution from its large side to its small one
of `size`; with `to_large` the same convolution is transposed, which is also its gradient. The weight is [F, G, R, S], F
channels on the small side and G on the large one. `parts` holds what is summed over `convolve`'s result in any number P
of parts: with `statistics` (count, mean, m2, what rounding took from the mean) as [4, P, C]; with `out_y`, the raw
tensor whose gradient the result is, the result is multiplied by phi'(v(out_y)) and `parts` is (sum, sum of its product
with out_y - mu) as [2, P, C]; else it is [0, P, C]. `block_constants` combines the parts and updates the running
statistics in the same pass (all None: no statistics are kept); without parts it takes the running ones.
`block_gradient_constants` returns dgamma and dbeta beside the constants; count 0 means frozen statistics (B = C = 0),
else it is the number of values per channel. The last two are a convolution and what makes constants of its sums in one;
apart they are what a combination over processes comes between.

What the caller guarantees: one device; activations channels-last and of one dtype, weight and bias of the same;
constants and parts in the stat dtype (fp32, or fp64 where the tensors are fp64); groups = 1. What the kernel
guarantees: y is channels-last in the operand's dtype, the weight's gradient is laid out as the weight is and has its
dtype; no synchronisation; the same bits every time; statistics are those of y as it is stored.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.backends import define
from fastgan.first_use import Comparison
from fastgan.ops.bn_act_eager import stat_dtype


class Geometry(NamedTuple):
    """Of a convolution from its large side to its small one, as (rows, columns)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def _activation(v: Tensor, slope: float) -> Tensor:
    if slope == 1.0:
        return v
    return F.relu(v) if slope == 0.0 else F.leaky_relu(v, slope)


def operand(value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float) -> Tensor:
    """The tensor that a convolution multiplies."""
    if constants is None:
        return _activation(value, slope)
    first, scale, shift, last = constants[:, :, None, None]
    wide = value.to(constants.dtype)
    if second is not None:
        return (first * wide + (scale * (second.to(constants.dtype) - last) + shift)).to(value.dtype)
    return _activation(scale * (wide - first) + shift, slope).to(value.dtype)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _lengthening(size: tuple[int, int], small: torch.Size, geometry: Geometry) -> list[int]:
    """The output padding with which the small side's transposed convolution has `size`."""
    axes = zip(size, small, *geometry, strict=True)
    return [n - ((m - 1) * stride - 2 * pad + (k - 1) * dil + 1) for n, m, k, stride, pad, dil in axes]


def convolve(
    value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float,
    weight: Tensor, bias: Tensor | None, geometry: Geometry, to_large: bool, size: tuple[int, int],
    statistics: bool, out_y: Tensor | None, out_constants: Tensor | None, out_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = operand(value, second, constants, slope)
    _, stride, padding, dilation = geometry
    more = _lengthening(size, value.shape[2:], geometry) if to_large else [0, 0]
    y = _channels_last(torch.convolution(x, weight, bias, stride, padding, dilation, to_large, more, 1))
    count = y.numel() // y.shape[1]
    wide = y.to(stat_dtype(y))
    if out_y is not None:
        v = operand(out_y.to(wide.dtype), None, out_constants, 1.0)
        y = torch.where(v > 0, wide, out_slope * wide if out_slope else torch.zeros_like(wide)).to(y.dtype)
        g = y.to(wide.dtype)
        deviation = out_y.to(wide.dtype)
        if out_constants is not None:
            deviation = deviation - out_constants[0][:, None, None]
        return y, torch.stack([g.sum((0, 2, 3)), (g * deviation).sum((0, 2, 3))])[:, None]
    if not statistics:
        return y, wide.new_empty(0, 1, y.shape[1])
    mean = wide.mean((0, 2, 3))
    m2 = (wide - mean[:, None, None]).square().sum((0, 2, 3))
    return y, torch.stack([torch.full_like(mean, count), mean, m2, torch.zeros_like(mean)])[:, None]


def weight_gradient(
    large: Tensor, large_second: Tensor | None, large_constants: Tensor | None, large_slope: float,
    small: Tensor, small_second: Tensor | None, small_constants: Tensor | None, small_slope: float,
    weight: Tensor, geometry: Geometry,
) -> Tensor:  # fmt: skip
    x = operand(large, large_second, large_constants, large_slope)
    dy = operand(small, small_second, small_constants, small_slope)
    _, stride, padding, dilation = geometry
    same = weight.detach().to(x.dtype)
    dw = torch.ops.aten.convolution_backward(
        dy, x, same, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False]
    )[1]
    return torch.empty_like(weight).copy_(dw)


def block_constants(
    y: Tensor, parts: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, eps: float, momentum: float,
) -> Tensor:  # fmt: skip
    dtype = stat_dtype(y)
    if parts is None:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(dtype), running_var.to(dtype)
    else:
        count, mean, m2 = combined(parts, parts.dtype)
        var = m2 / count
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((m2 / (count - 1)).to(running_var.dtype), momentum)
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else weight.to(dtype) * invstd
    return torch.stack([mean, scale, torch.zeros_like(mean) if bias is None else bias.to(dtype), invstd])


def block_gradient_constants(parts: Tensor, constants: Tensor, count: int) -> tuple[Tensor, Tensor]:
    grad_bias, products = parts.sum(1)
    mean, scale, _, invstd = constants
    grad_weight = invstd * products
    along, constant = torch.zeros_like(mean), torch.zeros_like(mean)
    if count:
        along, constant = -scale * invstd * grad_weight / count, -scale * grad_bias / count
    return torch.stack([scale, along, constant, mean]), torch.stack([grad_weight, grad_bias])


def convolve_block_constants(
    value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float,
    weight: Tensor, bias: Tensor | None, geometry: Geometry, to_large: bool, size: tuple[int, int],
    bn_weight: Tensor | None, bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    eps: float, momentum: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = (value, second, constants, slope, weight, bias, geometry, to_large, size, True)
    y, parts = convolve(*how, None, None, 1.0)
    return y, block_constants(y, parts, bn_weight, bn_bias, running_mean, running_var, eps, momentum)


def convolve_block_gradient_constants(
    value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float,
    weight: Tensor, geometry: Geometry, to_large: bool, size: tuple[int, int],
    out_y: Tensor, out_constants: Tensor, out_slope: float, count: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    how = (value, second, constants, slope, weight, None, geometry, to_large, size, False)
    y, parts = convolve(*how, out_y, out_constants, out_slope)
    return y, *block_gradient_constants(parts, out_constants, count)


def combined(parts: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """(count, mean, m2) of all parts by Chan's rule, or the two sums."""
    if parts.shape[0] != 4:
        return tuple(parts.sum(1).unbind())
    count, mean, m2, rest = parts.to(dtype)
    mean = mean + rest
    total = count.sum(0)
    centre = (count * mean).sum(0) / total
    together = (m2 + count * (mean - centre).square()).sum(0)
    return tuple(t.to(parts.dtype) for t in (total, centre, together))


# --- what a comparison of two backends needs ----------------------------------------------------------------------


def _comparable(name: str, result):
    """What of a result is determined: of parts their combination, of constants each row by itself."""
    if name == "convolve":
        y, parts = result
        return (y, *combined(parts)[-2:]) if len(parts) else y
    if name == "convolve_block_constants":
        return result[0], *result[1]
    if name == "convolve_block_gradient_constants":
        return result[0], *result[1][:3], *result[2]
    return result


# Where the split operations have the raw tensor whose gradient the result is, its constants and its slope.
_OUT = {"convolve": slice(10, 13), "convolve_block_gradient_constants": slice(8, 11)}


def settle(name: str, args: tuple) -> tuple:
    """Arguments without a v near 0, where rounding decides on which side of the kink it lies."""
    if name not in _OUT or args[_OUT[name]][0] is None:
        return args
    y, constants, _ = args[_OUT[name]]
    far = y.abs().max() + 1
    if constants is None:
        settled = torch.where(y.abs() < 1e-6 * far, far, y)
    else:
        mean, scale, shift, _ = constants.double()[:, :, None, None]
        size = scale.abs() * (y.double().abs() + mean.abs()) + shift.abs()
        near = operand(y.double(), None, constants.double(), 1.0).abs() < 8 * torch.finfo(constants.dtype).eps * size
        settled = torch.where(near, y + far, y)
    return *args[: _OUT[name].start], settled, *args[_OUT[name].start + 1 :]


_VERIFY_ELEMENTS = 1 << 22


def _few(name: str, args: tuple) -> tuple:
    """The first images only: a comparison in fp64 stays within milliseconds."""
    activations = {
        "convolve": (0, 1, 10),
        "convolve_block_constants": (0, 1),
        "convolve_block_gradient_constants": (0, 1, 8),
        "weight_gradient": (0, 1, 4, 5),
    }.get(name, ())
    if not activations:
        return args
    image = max(args[i][0].numel() for i in activations if args[i] is not None)
    keep = max(1, _VERIFY_ELEMENTS // max(1, image))
    return tuple(a[:keep] if i in activations and a is not None else a for i, a in enumerate(args))


def _noise(name: str, args: tuple) -> list[float]:
    """For each output, an error that rounding the terms of its sum explains, where the sum itself may cancel to 0."""
    if name == "block_gradient_constants":
        parts, constants, _ = args
        largest = parts.abs().max().item() * max(1.0, constants.abs().max().item()) ** 2
        return [4 * torch.finfo(parts.dtype).eps * largest] * 2
    if name == "convolve_block_constants":
        unmoved = (*args[:11], None, None, *args[13:])
        y, _ = convolve_block_constants(*unmoved)
        mean = 4 * torch.finfo(y.dtype).eps * y.abs().max().item()
        return [0.0, mean, 0.0, 0.0, 0.0, *([mean, 0.0] if args[11] is not None else [])]
    if name not in _OUT:
        return []
    y, parts = convolve(*_as_convolve(name, args))
    if not len(parts):
        return [0.0]
    if len(parts) == 4:
        return [0.0, 4 * torch.finfo(y.dtype).eps * y.abs().max().item(), 0.0]
    out_y, constants, _ = args[_OUT[name]]
    values = max(1, y.numel() // y.shape[1])
    far = (out_y.abs().max() + (0 if constants is None else constants[0].abs().max())).item()
    terms = 4 * torch.finfo(y.dtype).eps * values**0.5 * y.abs().max().item()
    if name == "convolve":
        return [0.0, terms, terms * far]
    scale, invstd = constants[1].abs().max().item(), constants[3].abs().max().item()
    weight_terms, count = terms * far * invstd, max(1, args[-1])
    return [0.0, 0.0, scale * invstd * weight_terms / count, scale * terms / count, weight_terms, terms]


def _as_convolve(name: str, args: tuple) -> tuple:
    return args if name == "convolve" else (*args[:5], None, *args[5:8], False, *args[8:11])


define(
    "conv_bn_act",
    {
        "convolve": convolve,
        "weight_gradient": weight_gradient,
        "block_constants": block_constants,
        "block_gradient_constants": block_gradient_constants,
        "convolve_block_constants": convolve_block_constants,
        "convolve_block_gradient_constants": convolve_block_gradient_constants,
    },
    Comparison(settle, _noise, _few, _comparable),
)
