"""The CUDA C++ convolution (csrc/cuda/conv_bn_act.cu) as the split operation `convolve` of its contract, forward only.

It is a candidate beside the library's convolution: `conv_bn_act(..., backend="cuda")` runs it, nothing prefers it
before a card has measured it faster. Weights are packed as [outputs, R, S, inputs] at each call.
"""

import torch
from torch import Tensor

from fastgan import library
from fastgan.backends import runner_of
from fastgan.errors import BackendError
from fastgan.ops._library import register
from fastgan.ops.conv_bn_act_eager import Geometry


def why_not(value: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, to_large: bool) -> str | None:
    """Why the kernel cannot run this convolution."""
    inputs = weight.shape[0 if to_large else 1]
    if value.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != value.dtype:
        return f"takes float16 or bfloat16, input and weight alike, got {value.dtype} and {weight.dtype}"
    if bias is not None:
        return "adds no bias to a convolution; BatchNorm takes its place"
    if value.numel() == 0 or value.shape[1] != inputs:
        return f"takes [N, {inputs}, H, W] that is not empty and groups=1, got {list(value.shape)}"
    if inputs % 8:
        return f"takes channels in multiples of 8, got {inputs}"
    uneven = [name for name in ("stride", "padding", "dilation") if len(set(getattr(geometry, name))) > 1]
    if uneven:
        return f"takes one {uneven[0]} for rows and columns, got {getattr(geometry, uneven[0])}"
    if to_large and geometry.dilation[0] != 1:
        return f"takes transposed convolutions of dilation 1, got {geometry.dilation[0]}"
    return None


def convolve(
    value: Tensor, second: Tensor | None, constants: Tensor | None, slope: float,
    weight: Tensor, bias: Tensor | None, geometry: Geometry, to_large: bool, size: tuple[int, int],
    statistics: bool, out_y: Tensor | None, out_constants: Tensor | None, out_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `fastgan.ops.conv_bn_act_eager.convolve`, without its two backward forms."""
    reason = why_not(value, weight, bias, geometry, to_large)
    if second is not None or out_y is not None:
        reason = "computes no gradients yet"
    if reason is not None:
        raise BackendError(f"kernel convolve of backend 'cuda' {reason}")
    x = value.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    prologue: tuple[Tensor | None, ...] = (None, None, None)
    if constants is not None:
        prologue = constants[0], constants[1], constants[2]
    elif slope != 1.0:
        zero, one = (value.new_full((value.shape[1],), number, dtype=torch.float32) for number in (0.0, 1.0))
        prologue = zero, one, zero
    packed = weight.permute(1, 2, 3, 0) if to_large else weight.permute(0, 2, 3, 1)
    (stride, *_), (padding, *_), (dilation, *_) = geometry[1:]
    third = dilation
    if to_large:
        third = size[0] - ((value.shape[2] - 1) * stride - 2 * padding + geometry.kernel[0])
    name = "conv_transpose_stats" if to_large else "conv_stats"
    y, mean, m2 = launch(name, x, packed.contiguous(), *prologue, slope, stride, padding, third)
    y = y.permute(0, 3, 1, 2)
    if not statistics:
        return y, mean.new_empty(0, 1, len(mean))
    return y, torch.stack([torch.full_like(mean, y.numel() // len(mean)), mean, m2])[:, None]


def launch(name: str, *args) -> tuple[Tensor, Tensor, Tensor]:
    """The library's operator on packed tensors."""
    library.load("cuda")
    return getattr(torch.ops.fastgan_cuda, name).default(*args)


# --- as a differentiable convolution --------------------------------------------------------------------------------


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
    transposed: bool = False,
    output_padding: int | tuple[int, ...] = 0,
) -> Tensor:
    """`conv2d` or `conv_transpose2d` by the kernel, channels-last; its gradients, of any order, are the library's.

    Raises:
        BackendError: with the reason why the kernel cannot run this convolution.
    """
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
    pairs = [_pair(value) for value in (stride, padding, dilation, output_padding)]
    geometry = Geometry(tuple(weight.shape[2:]), *pairs[:3])
    reason = why_not(input, weight, bias, geometry, transposed)
    if groups != 1:
        reason = f"takes groups=1, got {groups}"
    if reason is None and len(set(pairs[3])) > 1:
        reason = f"takes one output_padding for rows and columns, got {pairs[3]}"
    if reason is not None:
        raise BackendError(f"convolution: kernel convolve of backend 'cuda' {reason}")
    with torch.autocast(input.device.type, enabled=False):
        return _Convolution.apply(input, weight, *pairs, transposed)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, *how):
        ctx.save_for_backward(input, weight)
        ctx.how = how
        return torch.ops.fastgan.convolve_forward(input, weight, *how)

    @staticmethod
    def backward(ctx, dy):
        input, weight = ctx.saved_tensors
        stride, padding, dilation, more, transposed = ctx.how
        needed = [*ctx.needs_input_grad[:2], False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, input, weight, None, stride, padding, dilation, transposed, more, 1, needed
        )
        return dx, dw, None, None, None, None, None


def _forward(input, weight, stride, padding, dilation, output_padding, transposed):
    geometry = Geometry(tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    size = _size(input, weight, stride, padding, dilation, output_padding, transposed)
    args = (input, None, None, 1.0, weight, None, geometry, transposed, size, False, None, None, 1.0)
    return runner_of("cuda", input, forced=True)("convolve", *args)[0]


def _size(input, weight, stride, padding, dilation, output_padding, transposed) -> tuple[int, ...]:
    axes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True)
    if transposed:
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + o for n, k, s, p, d, o in axes)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes)


def _forward_fake(input, weight, stride, padding, dilation, output_padding, transposed):
    size = _size(input, weight, stride, padding, dilation, output_padding, transposed)
    channels = weight.shape[1 if transposed else 0]
    return input.new_empty((input.shape[0], channels, *size)).contiguous(memory_format=torch.channels_last)


register(
    "convolve_forward(Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, int[] output_padding, "
    "bool transposed) -> Tensor",
    _forward,
    _forward_fake,
)
