"""The CPU kernels' side of `ConvStack`: a run of blocks as one `torch.autograd.Function`.

Between blocks only raw convolution outputs y exist, with the per-channel constants [mu, s, beta, 1/std] and the slope
of the activation that is still to be applied, z = phi(s*(y - mu) + beta); backward, the gradient of y is kept as g with
constants [A, B, C, mu], dy = A*g + B*(y - mu) + C. The kernels for 4x4 stride-2 convolutions apply either as they read.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import library
from fastgan.backends import count
from fastgan.errors import BackendError
from fastgan.nn.blocks import Block, batch_norm_arguments

_PARAMETERS = 4  # of a block: weight, bias, BatchNorm's weight and bias


@cache
def why_not() -> str | None:
    """Why the kernels are not used on this machine; None: they are."""
    try:
        library.load("cpu")
    except BackendError as error:
        return str(error)
    return "this processor has no AVX2" if torch.ops.fastgan_cpu.instruction_set() == "plain" else None


class Norm(NamedTuple):
    """How a block normalises: by the batch's statistics or by frozen ones, and which running ones it updates."""

    by_batch: bool
    eps: float
    momentum: float
    running_mean: Any
    running_var: Any


class Step(NamedTuple):
    """A block without its parameters. `halves`: a 4x4 stride-2 padding-1 convolution, which the kernels know."""

    transposed: bool
    halves: bool
    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    norm: Norm | None
    slope: float


class Operand(NamedTuple):
    """A tensor to be mapped: not at all, by an activation (constants, slope), or as a gradient (second, constants)."""

    value: Tensor
    second: Tensor | None = None
    constants: Tensor | None = None
    slope: float = 1.0


def run_blocks(blocks: list[Block], input: Tensor) -> Tensor:
    """The blocks one after the other, as `nn.Sequential` would run them."""
    parameters: list[Tensor | None] = []
    for block in blocks:
        parameters += [block.conv.weight, block.conv.bias]
        parameters += [None, None] if block.norm is None else [block.norm.weight, block.norm.bias]
    return _Blocks.apply([_step(block) for block in blocks], input, *parameters)


def _step(block: Block) -> Step:
    conv = block.conv
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.output_padding)
    halves = geometry == ((4, 4), (2, 2), (1, 1), (1, 1), (0, 0)) and conv.groups == 1 and conv.bias is None
    return Step(
        isinstance(conv, nn.ConvTranspose2d), halves, conv.stride, conv.padding, conv.output_padding, conv.dilation,
        conv.groups, None if block.norm is None else _norm(block.norm), block.slope,
    )  # fmt: skip


def _norm(norm: nn.BatchNorm2d) -> Norm:
    by = batch_norm_arguments(norm)
    return Norm(by["training"], by["eps"], by["momentum"], by["running_mean"], by["running_var"])


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, steps: list[Step], input: Tensor, *parameters: Tensor | None) -> Tensor:
        operand = Operand(_channels_last(input.detach()))
        raw, constants = [], []
        for index, step in enumerate(steps):
            weight, bias, gamma, beta = parameters[_PARAMETERS * index : _PARAMETERS * (index + 1)]
            y, sums = _convolve(step, operand, weight, bias)
            operand = Operand(y, None, _constants(step, y, sums, gamma, beta), step.slope)
            raw.append(y if operand.constants is not None or index + 1 < len(steps) else None)  # the last: only if used
            constants.append(operand.constants)
        ctx.steps = steps
        ctx.save_for_backward(input, *parameters, *raw, *constants)
        return _applied(operand)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        # The forward ran without autocast, and so must this, whatever surrounds the call of backward().
        with torch.autocast("cpu", enabled=False):
            return _Blocks._backward(ctx, grad_output)

    @staticmethod
    def _backward(ctx, grad_output: Tensor):
        steps, saved = ctx.steps, ctx.saved_tensors
        input, parameters = saved[0], saved[1 : 1 + _PARAMETERS * len(steps)]
        if torch.is_grad_enabled():
            return None, *_definition_gradient(steps, input, parameters, grad_output, ctx.needs_input_grad[1:])
        raw, constants = saved[-2 * len(steps) : -len(steps)], saved[-len(steps) :]
        inputs = [Operand(_channels_last(input))]
        inputs += [Operand(y, None, k, s.slope) for y, k, s in zip(raw, constants, steps, strict=True)]
        return None, *_gradient(steps, inputs, parameters, grad_output, ctx.needs_input_grad[1:])


def _gradient(steps, inputs, parameters, grad_output, needed) -> list[Tensor | None]:
    """Gradients of the input and of each parameter that `needed` asks for, last block first."""
    grads: list[Tensor | None] = [None] * len(needed)
    gradient, affine = _through_activation(steps[-1], _channels_last(grad_output), inputs[-1])
    for index in reversed(range(len(steps))):
        step, operand = steps[index], inputs[index]
        first = 1 + _PARAMETERS * index
        weight = parameters[first - 1]
        if affine is not None:
            grads[first + 2], grads[first + 3] = (
                g if need else None for g, need in zip(affine, needed[first + 2 : first + 4], strict=True)
            )
        below = any(needed[:first])
        grads[first : first + 2] = _weight_gradient(step, operand, gradient, weight, needed[first : first + 2])
        if not below:
            break
        if index == 0:
            grads[0] = _input_gradient(step, operand, gradient, weight)
        else:
            gradient, affine = _block_gradient(step, steps[index - 1], operand, gradient, weight)
    return grads


# --- one block ----------------------------------------------------------------------------------------------------


def _convolve(step: Step, operand: Operand, weight: Any, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The raw output, channels-last, and (mean, m2) of its channels where the block normalises by them."""
    by_batch = step.norm is not None and step.norm.by_batch
    if step.halves and _own(step.transposed, operand.value, weight):
        size = [2 * n if step.transposed else n // 2 for n in operand.value.shape[2:]]
        y, sums = _own_convolution(operand, weight, step.transposed, size, statistics=by_batch)
        return y, sums if by_batch else None
    y = _library_convolution(step, _applied(operand), weight, bias)
    if not by_batch:
        return y, None
    count("cpu", "bn_stats")
    return y, torch.stack(torch.ops.fastgan_cpu.bn_stats(y))


def _constants(step: Step, y: Tensor, sums: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Tensor | None:
    """[mu, s, beta, 1/std] of the activation after y, or None where there is nothing to apply."""
    norm = step.norm
    if norm is None:
        return None if step.slope == 1.0 else _identity(y.shape[1], y.dtype)
    values = y.numel() // y.shape[1]
    if not norm.by_batch:
        frozen = torch.stack([norm.running_mean, norm.running_var * values]).to(y.dtype)
        return torch.ops.fastgan_cpu.block_constants(frozen, values, gamma, beta, norm.eps, None, None, 0.0)
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(y.shape)}")
    running = (norm.running_mean, norm.running_var)
    if norm.running_mean is not None:
        torch.autograd.graph.increment_version(running)
    return torch.ops.fastgan_cpu.block_constants(sums, values, gamma, beta, norm.eps, *running, norm.momentum)


@cache
def _identity(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=dtype).repeat(1, channels)


def _applied(operand: Operand) -> Tensor:
    """The operand with its activation applied."""
    if operand.constants is None:
        return operand.value
    count("cpu", "block_apply")
    return torch.ops.fastgan_cpu.block_apply(operand.value, operand.constants, operand.slope)


def _through_activation(step: Step, dz: Tensor, output: Operand) -> tuple[Operand, Tensor | None]:
    """From the gradient of z to that of y = `output`, applied, and the (weight, bias) gradient of the BatchNorm."""
    y, constants = output.value, output.constants
    if constants is None:
        return Operand(dz), None
    count("cpu", "block_backward")
    if step.norm is None:
        return Operand(torch.ops.fastgan_cpu.block_backward(dz, y, constants, None, step.slope)), None
    sums = torch.ops.fastgan_cpu.block_reduce(dz, y, constants, step.slope)
    by, affine = torch.ops.fastgan_cpu.block_gradient_constants(sums, constants, _values(step, y))
    return Operand(torch.ops.fastgan_cpu.block_backward(dz, y, constants, by, step.slope)), affine


def _block_gradient(
    step: Step, before: Step, operand: Operand, gradient: Operand, weight: Tensor
) -> tuple[Operand, Tensor | None]:
    """From the gradient of a block's y to that of the y before it, and the affine gradient of the BatchNorm between."""
    if operand.constants is None or not (step.halves and _own(not step.transposed, gradient.value, weight)):
        return _through_activation(before, _input_gradient(step, operand, gradient, weight), operand)
    g, sums = _own_convolution(gradient, weight, not step.transposed, operand.value.shape[2:], output=operand)
    if before.norm is None:
        return Operand(g), None
    values = _values(before, operand.value)
    by, affine = torch.ops.fastgan_cpu.block_gradient_constants(sums, operand.constants, values)
    return Operand(g, operand.value, by), affine


def _input_gradient(step: Step, operand: Operand, gradient: Operand, weight: Tensor) -> Tensor:
    if step.halves and _own(not step.transposed, gradient.value, weight):
        return _own_convolution(gradient, weight, not step.transposed, operand.value.shape[2:])[0]
    dx = _library_backward(step, operand.value, gradient, weight, (True, False, False))[0]
    assert dx is not None
    return dx


def _weight_gradient(step: Step, operand: Operand, gradient: Operand, weight: Tensor, needed) -> list[Tensor | None]:
    if not any(needed):
        return [None, None]
    if step.halves:
        large, small = (gradient, operand) if step.transposed else (operand, gradient)
        count("cpu", "weight_gradient")
        layout = _is_channels_last(weight)
        return [torch.ops.fastgan_cpu.weight_gradient(*large, *small, layout, _AUTOMATIC), None]
    return _library_backward(step, _applied(operand), gradient, weight, (False, *needed))[1:]


def _values(step: Step, y: Tensor) -> int:
    """Values per channel that the statistics depend on; 0 where they are frozen."""
    return y.numel() // y.shape[1] if step.norm is not None and step.norm.by_batch else 0


# --- convolutions -------------------------------------------------------------------------------------------------

_AUTOMATIC = 0  # Winograd or the direct product, as the kernel sees fit


def _own(to_large: bool, value: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is taken, or the library: its thin first convolution is as fast as memory allows."""
    size = value.shape[2:]
    return min(size) >= (1 if to_large else 2)


def _own_convolution(
    operand: Operand, weight: Tensor, to_large: bool, size, statistics: bool = False, output: Operand | None = None
) -> tuple[Tensor, Tensor]:
    count("cpu", "convolve")
    y, constants, slope = (None, None, 1.0) if output is None else (output.value, output.constants, output.slope)
    value, second, by, operand_slope = operand
    return torch.ops.fastgan_cpu.convolve(
        value, second, by, operand_slope, _dense(weight), to_large, size[0], size[1], statistics,
        y, constants, slope, _AUTOMATIC,
    )  # fmt: skip


def _arguments(step: Step) -> tuple:
    return step.stride, step.padding, step.dilation, step.transposed, step.output_padding, step.groups


def _is_product(step: Step, input: Tensor, weight: Tensor) -> bool:
    """A kernel as large as its image: a matrix product, which the library's convolution does not see."""
    plain = step.dilation == (1, 1) and step.padding == step.output_padding == (0, 0) and step.groups == 1
    return plain and tuple(input.shape[2:]) == ((1, 1) if step.transposed else tuple(weight.shape[2:]))


def _matrix(tensor: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H * W * C]: without a copy where it is channels-last, as images and weights mostly are."""
    return tensor.permute(0, 2, 3, 1).flatten(1)


def _images(rows: Tensor, weight: Tensor, large: bool) -> Tensor:
    """Back from `_matrix`: rows of `weight`'s size, or of a single pixel."""
    _, channels, height, width = weight.shape
    return rows.view(-1, height, width, channels).permute(0, 3, 1, 2) if large else rows[:, :, None, None]


def _library_convolution(step: Step, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and _is_product(step, input, weight):
        matrix = _matrix(weight)
        y = _images(_matrix(input) @ (matrix if step.transposed else matrix.t()), weight, step.transposed)
    else:
        y = torch.convolution(input, weight, bias, *_arguments(step))
    return _channels_last(y)


def _library_backward(step: Step, input: Tensor, gradient: Operand, weight: Tensor, mask) -> list[Tensor | None]:
    """Gradients of input (channels-last), weight and bias by the library; `input` matters only for the weight's."""
    dy = gradient.value
    if gradient.constants is not None:
        count("cpu", "block_backward")
        dy = torch.ops.fastgan_cpu.block_backward(dy, gradient.second, None, gradient.constants, 1.0)
    if not mask[2] and _is_product(step, input, weight):
        rows, flat, matrix = _matrix(input), _matrix(dy), _matrix(weight)
        left, right = (rows, flat) if step.transposed else (flat, rows)
        dx = (
            _images(flat @ (matrix.t() if step.transposed else matrix), weight, not step.transposed)
            if mask[0]
            else None
        )
        dw = _images(left.t() @ right, weight, True) if mask[1] else None
        return [None if dx is None else _channels_last(dx), dw, None]
    bias_size = [dy.shape[1]] if mask[2] else None
    dx, dw, db = torch.ops.aten.convolution_backward(dy, input, weight, bias_size, *_arguments(step), mask)
    return [None if dx is None else _channels_last(dx), dw, db]


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _dense(weight: Tensor) -> Tensor:
    """The weight as the kernels read it: channels-last or contiguous."""
    return weight if _is_channels_last(weight) else weight.contiguous()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


# --- the definition, for gradients of gradients -------------------------------------------------------------------


def _definition_gradient(steps, input, parameters, grad_output, needed) -> list[Tensor | None]:
    with torch.enable_grad():
        output = _definition(steps, input, parameters)
    asked = [i for i, need in enumerate(needed) if need]
    tensors = [(input, *parameters)[i] for i in asked]
    grads: list[Tensor | None] = [None] * len(needed)
    for i, grad in zip(asked, torch.autograd.grad(output, tensors, grad_output, create_graph=True), strict=True):
        grads[i] = grad
    return grads


def _definition(steps: list[Step], z: Tensor, parameters) -> Tensor:
    """The blocks in plain PyTorch, statistics recomputed and running ones left alone."""
    for index, step in enumerate(steps):
        weight, bias, gamma, beta = parameters[_PARAMETERS * index : _PARAMETERS * (index + 1)]
        z = torch.convolution(z, weight, bias, *_arguments(step))
        if step.norm is not None:
            norm = step.norm
            mean, var = (None, None) if norm.by_batch else (norm.running_mean, norm.running_var)
            z = F.batch_norm(z, mean, var, gamma, beta, norm.by_batch, 0.0, norm.eps)
        if step.slope != 1.0:
            z = F.leaky_relu(z, step.slope) if step.slope else F.relu(z)
    return z
