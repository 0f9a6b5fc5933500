"""The CPU kernels of a run of blocks (`unit.py`).

The kernels for 4x4 stride-2 convolutions apply activations and gradients as they read; other convolutions are the
library's, after a pass that does.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgan import library
from fastgan.backends import count, instruction_set
from fastgan.errors import BackendError
from fastgan.nn.blocks import Block
from fastgan.nn.unit import Norm, Operand, Step, channels_last, convolution_arguments, running_statistics

BACKEND = "cpu"
_ROWS = 4  # of a set of constants; a tensor of them holds one set for all images or one for each batch among them


@cache
def why_not() -> str | None:
    """Why the kernels are not used on this machine; None: they are."""
    try:
        library.load("cpu")
    except BackendError as error:
        return str(error)
    lacks = instruction_set(torch.float32) == "plain"
    return "the convolutions need AVX2, which this processor, build or FASTGAN_CPU lacks" if lacks else None


@cache
def library_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the library computes on images of `dtype`: without AMX its products in bfloat16 are no faster than in
    float32, and 50 times slower where it emulates them."""
    return torch.float32 if dtype == torch.bfloat16 and instruction_set(dtype) != "amx" else dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of parameters, constants and sums beside images of `dtype`."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def why_not_block(block: Block, input: Tensor) -> str | None:
    """Why a block cannot be in a unit; None: it can, by the library's convolution if need be."""
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else input.dtype
    named = {"weight": block.conv.weight, "BatchNorm's weight": None if block.norm is None else block.norm.weight}
    wrong = (
        f"the {name} is {p.dtype}, the kernels take {dtype}"
        for name, p in named.items()
        if p is not None and p.dtype != dtype
    )
    return next(wrong, None)


# --- one block ----------------------------------------------------------------------------------------------------


def forward(
    step: Step, operand: Operand, weight: Any, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Step, Tensor, Tensor | None]:
    y, sums = _convolve(step, operand, weight, bias)
    if step.norm is not None and sums is not None:
        values = y.numel() // y.shape[1] // step.batches
        if step.norm.group is not None:
            sums, values = _shared(sums, values, step.norm.group)
        step = step._replace(norm=step.norm._replace(values=values))
    return step, y, _constants(step, y, sums, gamma, beta)


def convolve(step: Step, operand: Operand, weight: Any, bias: Tensor | None) -> Tensor:
    return _convolve(step, operand, weight, bias)[0]


def convolution_by(step: Step, operand: Operand, weight: Any) -> str:
    if not (_halves(step) and _own(step.transposed, operand.value, weight)):
        return "the library"
    dtype = operand.value.dtype
    thin = dtype == torch.float32 and weight.shape[1] <= _THIN
    return f"{instruction_set('thin convolution' if thin else dtype)} kernels"


def _convolve(step: Step, operand: Operand, weight: Any, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The raw output, and sums of its channels where the block normalises by them."""
    by_batch = step.norm is not None and step.norm.by_batch
    if _halves(step) and _own(step.transposed, operand.value, weight):
        size = [2 * n if step.transposed else n // 2 for n in operand.value.shape[2:]]
        y, sums = _own_convolution(operand, weight, step.transposed, size, statistics=step.batches if by_batch else 0)
        return y, sums if by_batch else None
    y = _library_convolution(step, applied(operand), weight, bias)
    if not by_batch:
        return y, None
    count("cpu", "bn_stats")
    return y, torch.cat([torch.stack(torch.ops.fastgan_cpu.bn_stats(batch)) for batch in y.chunk(step.batches)])


def _shared(sums: Tensor, count: int, group: Any) -> tuple[Tensor, int]:
    from fastgan.ops.bn_act_sync import combine  # imports torch._dynamo, a second

    mean, m2, total_count = combine(sums[0], sums[1], count, group)
    return torch.stack([mean, m2]), int(total_count)


def _constants(step: Step, y: Tensor, sums: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Tensor | None:
    norm = step.norm
    if norm is None:
        return None if step.slope == 1.0 else _identity(y.shape[1], _wide(y.dtype))
    if not norm.by_batch:
        count = y.numel() // y.shape[1]
        frozen = torch.stack([norm.running_mean, norm.running_var * count]).to(_wide(y.dtype))
        return torch.ops.fastgan_cpu.block_constants(frozen, count, gamma, beta, norm.eps, None, None, (0.0,))
    assert sums is not None
    running = running_statistics(norm, y.shape)
    return torch.ops.fastgan_cpu.block_constants(sums, norm.values, gamma, beta, norm.eps, *running, norm.momenta)


@cache
def _identity(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=dtype).repeat(1, channels)


def applied(operand: Operand) -> Tensor:
    if operand.constants is None:
        return operand.value
    count("cpu", "block_apply")
    return _by_sets(torch.ops.fastgan_cpu.block_apply, operand.value, operand.constants, operand.slope)


def through_activation(step: Step, dz: Tensor, output: Operand) -> tuple[Operand, Tensor | None]:
    y, constants = output.value, output.constants
    if constants is None:
        return Operand(dz), None
    count("cpu", "block_backward")
    if step.norm is None:
        return Operand(torch.ops.fastgan_cpu.block_backward(dz, y, constants, None, step.slope)), None
    sums = _by_sets(torch.ops.fastgan_cpu.block_reduce, dz, y, constants, step.slope)
    by, affine = _gradient_constants(step.norm, sums, constants)
    return Operand(_by_sets(torch.ops.fastgan_cpu.block_backward, dz, y, constants, by, step.slope)), affine


def block_gradient(
    step: Step, before: Step, operand: Operand, gradient: Operand, weight: Tensor
) -> tuple[Operand, Tensor | None]:
    if operand.constants is None or not (_halves(step) and _own(not step.transposed, gradient.value, weight)):
        return through_activation(before, input_gradient(step, operand, gradient, weight), operand)
    g, sums = _own_convolution(gradient, weight, not step.transposed, operand.value.shape[2:], output=operand)
    if before.norm is None:
        return Operand(g), None
    by, affine = _gradient_constants(before.norm, sums, operand.constants)
    return Operand(g, operand.value, by), affine


def _by_sets(run: Any, *arguments: Any) -> Tensor:
    """`run(*arguments)`, on each part of the batch that has a set of constants of its own."""
    sets = max(len(a) // _ROWS for a in arguments if isinstance(a, Tensor) and a.dim() == 2)
    if sets == 1:
        return run(*arguments)
    parts = [a.chunk(sets) if isinstance(a, Tensor) else (a,) * sets for a in arguments]
    return torch.cat([run(*part) for part in zip(*parts, strict=True)])


def input_gradient(step: Step, operand: Operand, gradient: Operand, weight: Tensor) -> Tensor:
    if _halves(step) and _own(not step.transposed, gradient.value, weight):
        return _own_convolution(gradient, weight, not step.transposed, operand.value.shape[2:])[0]
    dx = _library_backward(step, operand.value, gradient, weight, (True, False, False))[0]
    assert dx is not None
    return dx


def weight_gradient(step: Step, operand: Operand, gradient: Operand, weight: Tensor, needed) -> list[Tensor | None]:
    if _halves(step):
        large, small = (gradient, operand) if step.transposed else (operand, gradient)
        count("cpu", "weight_gradient")
        layout = _is_channels_last(weight)
        return [torch.ops.fastgan_cpu.weight_gradient(*large[:4], *small[:4], layout, _AUTOMATIC), None]
    return _library_backward(step, applied(operand), gradient, weight, (False, *needed))[1:]


def _gradient_constants(norm: Norm, sums: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """[A, B, C, mu] of each set from the sums over all processes, and this process's part of the affine gradient, which
    all sets share."""
    by, affine = torch.ops.fastgan_cpu.block_gradient_constants(sums, constants, norm.values)
    if norm.group is not None:
        from fastgan.ops.bn_act_sync import total

        everywhere = total(sums, norm.group)
        by, _ = torch.ops.fastgan_cpu.block_gradient_constants(everywhere, constants, norm.values)
    return by, affine


def _halves(step: Step) -> bool:
    """Whether it is a 4x4 stride-2 padding-1 convolution, which the kernels know."""
    geometry = (step.kernel, step.stride, step.padding, step.dilation, step.output_padding)
    return geometry == ((4, 4), (2, 2), (1, 1), (1, 1), (0, 0)) and step.groups == 1 and not step.bias


# --- convolutions -------------------------------------------------------------------------------------------------

_AUTOMATIC = 0  # tiles, Winograd or the direct product, as the kernel sees fit

_THIN = 4  # channels of the large side that AMX leaves to AVX-512 in float32: csrc/cpu/convolution.h


# A large weight is transformed for each call, and for few pixels of the small side that takes longer than the library
# needs for all: 256 <-> 512 channels run at 0.3 (4 pixels) to 0.85 (16) times its speed, from 64 pixels on faster.
_LARGE_WEIGHT = 64 * 128
_FEW_PIXELS = 64


def _own(to_large: bool, value: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is taken, or the library."""
    height, width = (n if to_large else n // 2 for n in value.shape[2:])
    few = value.shape[0] * height * width < _FEW_PIXELS
    return min(height, width) >= 1 and not (few and weight.shape[0] * weight.shape[1] >= _LARGE_WEIGHT)


def _own_convolution(
    operand: Operand, weight: Tensor, to_large: bool, size, statistics: int = 0, output: Operand | None = None
) -> tuple[Tensor, Tensor]:
    count("cpu", "convolve")
    y, constants, slope = (None, None, 1.0) if output is None else (output.value, output.constants, output.slope)
    value, second, by, operand_slope = operand[:4]
    return torch.ops.fastgan_cpu.convolve(
        value, second, by, operand_slope, _dense(weight), to_large, size[0], size[1], statistics,
        y, constants, slope, _AUTOMATIC, output is not None,
    )  # fmt: skip


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
    stored, dtype = input.dtype, library_dtype(input.dtype)
    input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if bias is None and _is_product(step, input, weight):
        matrix = _matrix(weight)
        y = _images(_matrix(input) @ (matrix if step.transposed else matrix.t()), weight, step.transposed)
    else:
        y = torch.convolution(input, weight, bias, *convolution_arguments(step))
    return channels_last(y).to(stored)


def _library_backward(step: Step, input: Tensor, gradient: Operand, weight: Tensor, mask) -> list[Tensor | None]:
    """Gradients of input (channels-last), weight and bias by the library; `input` matters only for the weight's."""
    dy, stored = gradient.value, input.dtype
    if gradient.constants is not None:
        count("cpu", "block_backward")
        dy = _by_sets(torch.ops.fastgan_cpu.block_backward, dy, gradient.second, None, gradient.constants, 1.0)
    dtype = library_dtype(stored)
    dy, weight = dy.to(dtype), weight.to(dtype)
    input = input.to(dtype) if mask[1] else torch.empty_like(input, dtype=dtype)
    if not mask[2] and _is_product(step, input, weight):
        rows, flat, matrix = _matrix(input), _matrix(dy), _matrix(weight)
        left, right = (rows, flat) if step.transposed else (flat, rows)
        dx = (
            _images(flat @ (matrix.t() if step.transposed else matrix), weight, not step.transposed)
            if mask[0]
            else None
        )
        dw, db = _images(left.t() @ right, weight, True) if mask[1] else None, None
    else:
        bias_size = [dy.shape[1]] if mask[2] else None
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy, input, weight, bias_size, *convolution_arguments(step), mask
        )
    return [None if dx is None else channels_last(dx).to(stored), dw, db]


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _dense(weight: Tensor) -> Tensor:
    """The weight as the kernels read it: channels-last or contiguous."""
    return weight if _is_channels_last(weight) else weight.contiguous()
