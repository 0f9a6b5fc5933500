"""A run of blocks as one `torch.autograd.Function`, for any backend that has kernels for it.

Between blocks only raw convolution outputs y exist, with the per-channel constants [mu, s, beta, 1/std] and the slope
of the activation that is still to be applied, z = phi(s*(y - mu) + beta); backward, the gradient of y is kept as g with
constants [A, B, C, mu], dy = A*g + B*(y - mu) + C. Kernels that can apply either as they read.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import backends
from fastgan.nn.blocks import Block, count_batches, counted_arguments, momentum_of

_PARAMETERS = 4  # of a block: weight, bias, BatchNorm's weight and bias


class Norm(NamedTuple):
    """How a block normalises: by the batch's statistics, over the processes of `group` if any, or by frozen ones;
    which running ones it updates; of how many values per channel the statistics are, once that is known (frozen: 0)."""

    by_batch: bool
    eps: float
    momenta: tuple[float, ...]  # of each batch that the input holds: without a momentum they fall from one to the next
    running_mean: Any
    running_var: Any
    group: Any
    values: int = 0


class Step(NamedTuple):
    """A block without its parameters."""

    name: str
    transposed: bool
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    bias: bool
    norm: Norm | None
    slope: float
    batches: int  # that the input holds one after the other, each with statistics of its own


class Operand(NamedTuple):
    """A tensor to be mapped: not at all, by an activation (constants, slope), or as a gradient (second, constants).

    `total` is the sum of a gradient over everything but its channels, where it is known.
    """

    value: Tensor
    second: Tensor | None = None
    constants: Tensor | None = None
    slope: float = 1.0
    total: Tensor | None = None


class Kernels(Protocol):
    """What a backend supplies: a module with its name and these functions."""

    BACKEND: str

    def why_not_block(self, block: Block, input: Tensor) -> str | None:
        """Why a block cannot be in a unit that takes `input`; None: it can."""

    def forward(
        self, step: Step, operand: Operand, weight: Any, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None
    ) -> tuple[Step, Tensor, Tensor | None]:
        """The step that knows how many values its statistics have, the raw output, channels-last, and [mu, s, beta,
        1/std] of the activation after it, if it takes any; updates the running statistics."""

    def convolve(self, step: Step, operand: Operand, weight: Any, bias: Tensor | None) -> Tensor:
        """The raw output again."""

    def convolution_by(self, step: Step, operand: Operand, weight: Any) -> str:
        """Whose convolution `forward` runs, for `explain`."""

    def applied(self, operand: Operand) -> Tensor:
        """The operand with its activation applied."""

    def through_activation(self, step: Step, dz: Tensor, output: Operand) -> tuple[Operand, Tensor | None]:
        """From the gradient of z to that of y = `output`, applied, and the (weight, bias) gradient of the BatchNorm."""

    def block_gradient(
        self, step: Step, before: Step, operand: Operand, gradient: Operand, weight: Tensor
    ) -> tuple[Operand, Tensor | None]:
        """From the gradient of a block's y to that of the y before it, and the (weight, bias) gradient of the
        BatchNorm between."""

    def input_gradient(self, step: Step, operand: Operand, gradient: Operand, weight: Tensor) -> Tensor:
        """From the gradient of the first block's y to that of its input."""

    def weight_gradient(
        self, step: Step, operand: Operand, gradient: Operand, weight: Tensor, needed: Any
    ) -> list[Tensor | None]:
        """Gradients of a block's convolution, by weight and bias, where `needed`."""


class _Run(NamedTuple):
    kernels: Any  # Kernels: a module
    steps: list[Step]
    dtype: torch.dtype  # of the convolutions: the input's, or autocast's
    recompute_first: bool  # the first y is not kept but computed again for the backward pass


def run_blocks(
    kernels: Any, blocks: list[Block], input: Tensor, *, recompute_first: bool = False, batches: int = 1
) -> Tensor:
    """The blocks one after the other, as `nn.Sequential` would run them on each of the `batches` in `input`; see
    `ConvStack.recompute_first`."""
    parameters: list[Tensor | None] = []
    for block in blocks:
        parameters += [block.conv.weight, block.conv.bias]
        parameters += [None, None] if block.norm is None else [block.norm.weight, block.norm.bias]
    device = input.device.type
    lower = autocasts(device) and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if lower else input.dtype
    count_batches([block.norm for block in blocks if block.norm is not None], batches)
    run = _Run(kernels, [_step(block, batches) for block in blocks], dtype, recompute_first)
    return _Blocks.apply(run, input, *parameters)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device (some have none)."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def running_statistics(norm: Norm, shape: Sequence[int]) -> tuple[Any, Any]:
    """The running statistics that a forward with an output of `shape` updates, noted as changed; raises where there is
    nothing to normalise by."""
    if norm.values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")
    running = (norm.running_mean, norm.running_var)
    if norm.running_mean is not None:
        torch.autograd.graph.increment_version(running)
    return running


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _step(block: Block, batches: int) -> Step:
    conv = block.conv
    return Step(
        block.name, isinstance(conv, nn.ConvTranspose2d), conv.kernel_size, conv.stride, conv.padding,
        conv.output_padding, conv.dilation, conv.groups, conv.bias is not None, _norm(block.norm, batches),
        block.slope, batches,
    )  # fmt: skip


def _norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm | None, batches: int) -> Norm | None:
    if norm is None:
        return None
    by = counted_arguments(norm)
    momenta = tuple(momentum_of(norm, batches - 1 - batch) for batch in range(batches))
    return Norm(by["training"], by["eps"], momenta, by["running_mean"], by["running_var"], by["process_group"])


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: _Run, input: Tensor, *parameters: Tensor | None) -> Tensor:
        kernels, steps = run.kernels, run.steps
        operand = Operand(channels_last(input.detach().to(run.dtype)))
        raw, constants = [], []
        for index, step in enumerate(steps):
            weight, bias, gamma, beta = parameters[_PARAMETERS * index : _PARAMETERS * (index + 1)]
            backends.enter_layer(step.name)
            steps[index], y, by = kernels.forward(step, operand, weight, bias, gamma, beta)
            if backends.is_recording():
                _tell(run, step, operand, weight, y)
            operand = Operand(y, None, by, step.slope)
            used = _is_activated(operand) or index + 1 < len(steps)  # the last may not be
            raw.append(y if used and not (run.recompute_first and index == 0) else None)
            constants.append(operand.constants)
        ctx.run = run
        ctx.save_for_backward(input, *parameters, *raw, *constants)
        return kernels.applied(operand)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        # The forward ran without autocast, and so must this, whatever surrounds the call of backward().
        device = grad_output.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return _Blocks._backward(ctx, grad_output)

    @staticmethod
    def _backward(ctx, grad_output: Tensor):
        run, saved = ctx.run, ctx.saved_tensors
        steps = run.steps
        input, parameters = saved[0], saved[1 : 1 + _PARAMETERS * len(steps)]
        if torch.is_grad_enabled():
            return None, *_definition_gradient(run, input, parameters, grad_output, ctx.needs_input_grad[1:])
        raw, constants = saved[-2 * len(steps) : -len(steps)], saved[-len(steps) :]
        inputs = [Operand(channels_last(input.to(run.dtype)))]
        if run.recompute_first:
            raw = (run.kernels.convolve(steps[0], inputs[0], *parameters[:2]), *raw[1:])
        inputs += [Operand(y, None, k, s.slope) for y, k, s in zip(raw, constants, steps, strict=True)]
        grads = _gradient(run, inputs, parameters, grad_output, ctx.needs_input_grad[1:])
        wanted = (input, *parameters)
        return None, *(
            g if g is None or g.dtype == w.dtype else g.to(w.dtype) for g, w in zip(grads, wanted, strict=True)
        )


def _tell(run: _Run, step: Step, operand: Operand, weight: Any, y: Tensor) -> None:
    """Let `explain` see who runs a block."""
    operation = "conv_transpose_bn_act" if step.transposed else "conv_bn_act"
    by = run.kernels.convolution_by(step, operand, weight)
    reason = f"one unit from layer {run.steps[0].name} on, convolution by {by}"
    backends.note(operation, y, backends.Decision(run.kernels.BACKEND, reason))


def _is_activated(operand: Operand) -> bool:
    return operand.constants is not None or operand.slope != 1.0


def _gradient(run, inputs, parameters, grad_output, needed) -> list[Tensor | None]:
    """Gradients of the input and of each parameter that `needed` asks for, last block first."""
    kernels, steps = run.kernels, run.steps
    grads: list[Tensor | None] = [None] * len(needed)
    gradient, affine = Operand(channels_last(grad_output)), None
    if _is_activated(inputs[-1]):
        gradient, affine = kernels.through_activation(steps[-1], gradient.value, inputs[-1])
    for index in reversed(range(len(steps))):
        step, operand = steps[index], inputs[index]
        first = 1 + _PARAMETERS * index
        weight = parameters[first - 1]
        if affine is not None:
            grads[first + 2], grads[first + 3] = (
                g if need else None for g, need in zip(affine, needed[first + 2 : first + 4], strict=True)
            )
        if any(needed[first : first + 2]):
            grads[first : first + 2] = kernels.weight_gradient(
                step, operand, gradient, weight, needed[first : first + 2]
            )
        if not any(needed[:first]):
            break
        if index == 0:
            grads[0] = kernels.input_gradient(step, operand, gradient, weight)
        else:
            gradient, affine = kernels.block_gradient(step, steps[index - 1], operand, gradient, weight)
    return grads


# --- the definition, for gradients of gradients -------------------------------------------------------------------


def _definition_gradient(run, input, parameters, grad_output, needed) -> list[Tensor | None]:
    with torch.enable_grad():
        output = _definition(run, input, parameters)
    asked = [i for i, need in enumerate(needed) if need]
    tensors = [(input, *parameters)[i] for i in asked]
    grads: list[Tensor | None] = [None] * len(needed)
    for i, grad in zip(asked, torch.autograd.grad(output, tensors, grad_output, create_graph=True), strict=True):
        grads[i] = grad
    return grads


def _definition(run: _Run, z: Tensor, parameters) -> Tensor:
    """The blocks in plain PyTorch, statistics recomputed and running ones left alone."""
    z, dtype = z.to(run.dtype), run.kernels.library_dtype(run.dtype)
    for index, step in enumerate(run.steps):
        weight, bias, gamma, beta = parameters[_PARAMETERS * index : _PARAMETERS * (index + 1)]
        z, weight = z.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        z = torch.convolution(z, weight, bias, *convolution_arguments(step))
        if step.norm is not None:
            norm = step.norm
            mean, var = (None, None) if norm.by_batch else (norm.running_mean, norm.running_var)
            if norm.group is None:
                same = (mean, var, gamma, beta, norm.by_batch, 0.0, norm.eps)
                z = torch.cat([F.batch_norm(batch, *same) for batch in z.chunk(step.batches)])
            else:
                from fastgan.ops.bn_act_sync import definition  # imports torch._dynamo, a second

                z = definition(z, gamma, beta, norm.values, norm.eps, 1.0, norm.group)
        if step.slope != 1.0:
            z = F.leaky_relu(z, step.slope) if step.slope else F.relu(z)
    return z.to(run.dtype)


def convolution_arguments(step: Step) -> tuple:
    """What follows the tensors in `torch.convolution`."""
    return step.stride, step.padding, step.dilation, step.transposed, step.output_padding, step.groups
