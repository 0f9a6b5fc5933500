"""ConvStack: a `nn.Sequential` of convolution, BatchNorm and activation that runs as one differentiable unit where a
backend can, with the activation deferred into the next convolution and one tensor kept per block.
"""

from importlib import import_module
from itertools import groupby

import torch
from torch import Tensor, nn

from fastgan import backends
from fastgan.nn.blocks import Block, parts, run_block
from fastgan.nn.unit import run_blocks


class ConvStack(nn.Sequential):
    """`nn.Sequential(Conv2d | ConvTranspose2d, [BatchNorm2d], [LeakyReLU | ReLU], ...)`, faster.

    Construction, `state_dict`, indexing and results are those of `nn.Sequential`; running statistics are updated once
    per forward. On CPU (float32, processors with AVX2) and by Triton on CUDA each run of blocks is one differentiable
    unit of fastgan's kernels: BatchNorm and activation are applied while the next convolution reads its input. Any
    other module, and a block whose modules have hooks, parametrisations or a type of their own, runs as it is; on other
    devices and dtypes, under autocast on CPU and in compiled code each block runs as `conv_bn_act` or
    `conv_transpose_bn_act`.

    Differentiable any number of times: a gradient of the gradient is taken through the definition.
    `fastgan.use_backend("eager")` turns the kernels off.

    `recompute_first = True` (an attribute, False by default) saves memory for a little time where the stack runs as one
    unit: the first convolution's output, in a discriminator the largest tensor kept, is computed again for the backward
    pass instead of being kept for it.
    """

    recompute_first = False

    def forward(self, input: Tensor) -> Tensor:
        fused = why_unfused(input) is None
        for index, (_, part) in enumerate(parts(self)):
            if isinstance(part, nn.Module):
                input = part(input)
            elif fused:
                input = _run_as_units(part, input, self.recompute_first and index == 0)
            else:
                input = _run_by_operations(part, input)
        return input


def _run_by_operations(blocks: list[Block], input: Tensor) -> Tensor:
    for block in blocks:
        input = run_block(block, input)
    return input


def _run_as_units(blocks: list[Block], input: Tensor, recompute_first: bool) -> Tensor:
    """Every stretch of blocks that the kernels know as one unit, the blocks between by operations."""
    kernels = import_module(f"fastgan.nn.stack_{_backend_of(input)}")
    marked = [(block, kernels.why_not_block(block, input) is None) for block in blocks]
    for known, pairs in groupby(marked, lambda pair: pair[1]):
        stretch = [block for block, _ in pairs]
        if known:
            input = run_blocks(kernels, stretch, input, recompute_first and stretch[0] is blocks[0])
        else:
            input = _run_by_operations(stretch, input)
    return input


def _backend_of(input: Tensor) -> str:
    """The backend whose kernels the input's device, or a request, asks for."""
    return backends.requested(None) or {"cpu": "cpu", "cuda": "triton"}.get(input.device.type, "eager")


def why_unfused(input: Tensor) -> str | None:
    """Why the blocks of a stack run one by one on `input`; None: they run on a backend's kernels as one unit."""
    if torch.compiler.is_compiling():
        return "compiled code takes the modules as they are"
    backend = _backend_of(input)
    if backend not in ("cpu", "triton"):
        return f"backend {backend!r} has no fused stack"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if input.dim() != 4 or input.numel() == 0:
        return "the input is not a batch of images"
    if input.dtype == torch.float64 and backends.requested(None) is None:
        return f"float64 takes the kernels only where backend {backend!r} is asked for"
    return _why_not_cpu(input) if backend == "cpu" else _why_not_triton(input)


def _why_not_cpu(input: Tensor) -> str | None:
    if input.device.type != "cpu" or type(input) not in (Tensor, nn.Parameter):
        return "the input is not a plain CPU tensor"
    if input.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "the kernels compute in float32 without autocast"
    from fastgan.nn.stack_cpu import why_not

    return why_not()


def _why_not_triton(input: Tensor) -> str | None:
    from torch._subclasses.fake_tensor import FakeTensor

    if type(input) not in (Tensor, nn.Parameter, FakeTensor):
        return "the input is a tensor of another class"
    return backends.why_not("triton", "conv_bn_act", input.device.type, input.dtype)
