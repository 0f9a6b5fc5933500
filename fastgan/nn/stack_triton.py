"""The Triton kernels of a run of blocks (`unit.py`): every convolution applies its operand's activation or gradient as
it reads, and gathers the sums that the next constants need as it writes.

Each kernel runs through `backends.run`: counted, and on a card compared with the definition at its first use.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import backends
from fastgan.nn.blocks import Block
from fastgan.nn.unit import Operand, Step, autocasts, running_statistics
from fastgan.ops.bn_act_eager import stat_dtype
from fastgan.ops.conv_bn_act_eager import Geometry

BACKEND = "triton"


def library_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the library computes on images of `dtype`."""
    return dtype


def why_not_block(block: Block, input: Tensor) -> str | None:
    """Why the kernels do not run a block on `input`; None: they do."""
    if isinstance(block.norm, nn.SyncBatchNorm):
        return "BatchNorm over several processes has a collective between a convolution's sums and what is made of them"
    if block.conv.groups != 1:
        return f"{block.conv.groups} groups: the kernels know convolutions of one"
    weight = block.conv.weight
    if weight.dtype != input.dtype and not autocasts(input.device.type):
        return f"the weight is {weight.dtype}, the input {input.dtype}"
    return None if weight.device == input.device else f"the weight is on {weight.device}, the input on {input.device}"


def forward(
    step: Step, operand: Operand, weight: Any, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Step, Tensor, Tensor | None]:
    norm = step.norm
    if norm is None:
        return step, convolve(step, operand, weight, bias), None
    if not norm.by_batch:
        y = convolve(step, operand, weight, bias)
        return (
            step,
            y,
            _run("block_constants", y, None, gamma, beta, norm.running_mean, norm.running_var, norm.eps, 0.0),
        )
    size, images = _size(step, operand.value), len(operand.value)
    norm = norm._replace(values=images * size[0] * size[1])
    running = running_statistics(norm, (images, weight.shape[1 if step.transposed else 0], *size))
    how = _how(step, operand, weight, bias, step.transposed, size)
    y, by = _run("convolve_block_constants", *how, gamma, beta, *running, norm.eps, *norm.momenta)
    return step._replace(norm=norm), y, by


def convolve(step: Step, operand: Operand, weight: Any, bias: Tensor | None) -> Tensor:
    return _convolution(step, operand, weight, bias, step.transposed, _size(step, operand.value))[0]


def convolution_by(step: Step, operand: Operand, weight: Any) -> str:
    return "Triton kernels"


def applied(operand: Operand) -> Tensor:
    if operand.constants is None and operand.slope == 1.0:
        return operand.value
    return _run("bn_act", operand.value, *_as_bn_act(operand), operand.slope)


def through_activation(step: Step, dz: Tensor, output: Operand) -> tuple[Operand, Tensor | None]:
    by = _as_bn_act(output)
    if step.norm is None:
        return Operand(_run("bn_act_backward", dz, output.value, *by, output.slope, None, None, 0)), None
    affine = _run("bn_act_reduce", dz, output.value, *by, output.slope)
    count = _values(step)
    sums = affine if count else (None, None)
    dy = _run("bn_act_backward", dz, output.value, *by, output.slope, *sums, count)
    return Operand(dy, total=_total(step, output, affine[1])), torch.stack(affine)


def block_gradient(
    step: Step, before: Step, operand: Operand, gradient: Operand, weight: Tensor
) -> tuple[Operand, Tensor | None]:
    to_large, size = not step.transposed, operand.value.shape[2:]
    if before.norm is None:
        g, parts = _convolution(step, gradient, weight, None, to_large, size, operand)
        return Operand(g, total=parts[0].sum(0) if before.bias and len(parts) else None), None
    *how, _, geometry, _, _ = _how(step, gradient, weight, None, to_large, size)
    out = (operand.value, operand.constants, operand.slope)
    g, by, affine = _run(
        "convolve_block_gradient_constants", *how, geometry, to_large, tuple(size), *out, _values(before)
    )
    return Operand(g, operand.value, by, total=_total(before, operand, affine[1])), affine


def input_gradient(step: Step, operand: Operand, gradient: Operand, weight: Tensor) -> Tensor:
    return _convolution(step, gradient, weight, None, not step.transposed, operand.value.shape[2:])[0]


def weight_gradient(step: Step, operand: Operand, gradient: Operand, weight: Tensor, needed) -> list[Tensor | None]:
    dw, db = None, None
    if needed[0]:
        large, small = (gradient, operand) if step.transposed else (operand, gradient)
        dw = _run("weight_gradient", *large[:4], *small[:4], weight, _geometry(step))
    if needed[1]:
        db = gradient.total
        if db is None:
            db = gradient.value.sum((0, 2, 3), dtype=stat_dtype(gradient.value))
    return [dw, db]


# --- from blocks to the split operations ----------------------------------------------------------------------------


def _values(step: Step) -> int:
    return 0 if step.norm is None else step.norm.values


def _run(name: str, *args: Any) -> Any:
    first = next(arg for arg in args if isinstance(arg, Tensor))
    return backends.runner_of("triton", first, forced=backends.requested(None) is not None)(name, *args)


def _how(step: Step, operand: Operand, weight: Tensor, bias: Tensor | None, to_large: bool, size: Any) -> tuple:
    """What every convolution begins with."""
    same = partial(torch.Tensor.to, dtype=operand.value.dtype)
    bias = None if bias is None else same(bias)
    return *operand[:4], same(weight), bias, _geometry(step), to_large, tuple(size)


def _convolution(
    step: Step, operand: Operand, weight: Tensor, bias: Tensor | None, to_large: bool, size: Any,
    output: Operand | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Without statistics; with `output` the gradient of its activation on top, and the sums of that."""
    out: tuple = (None, None, 1.0)
    if output is not None and output.slope != 1.0:
        out = (output.value, None, output.slope)
    return _run("convolve", *_how(step, operand, weight, bias, to_large, size), False, *out)


def _geometry(step: Step) -> Geometry:
    return Geometry(step.kernel, step.stride, step.padding, step.dilation)


def _size(step: Step, input: Tensor) -> tuple[int, ...]:
    axes = zip(input.shape[2:], *_geometry(step), step.output_padding, strict=True)
    if step.transposed:
        return tuple((n - 1) * stride - 2 * pad + (k - 1) * dil + 1 + more for n, k, stride, pad, dil, more in axes)
    return tuple((n + 2 * pad - (k - 1) * dil - 1) // stride + 1 for n, k, stride, pad, dil, _ in axes)


def _as_bn_act(operand: Operand) -> tuple[Tensor, ...]:
    """(mean, invstd, weight, bias) with which `bn_act` applies the operand's activation: weight * invstd is s."""
    y, by = operand.value, operand.constants
    if by is None:
        ones = y.new_ones(y.shape[1], dtype=stat_dtype(y))
        return torch.zeros_like(ones), ones, ones, torch.zeros_like(ones)
    mean, scale, shift, invstd = by
    return mean, invstd, scale / invstd, shift


def _total(step: Step, output: Operand, grad_bias: Tensor) -> Tensor | None:
    """The bias' gradient, the sum of dy per channel: that of A*g where statistics are frozen, else nothing is left."""
    if not step.bias or output.constants is None:
        return None
    return torch.zeros_like(grad_bias) if _values(step) else output.constants[1] * grad_bias
