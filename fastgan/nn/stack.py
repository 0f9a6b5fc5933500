"""ConvStack: a `nn.Sequential` of convolution, BatchNorm and activation that runs as one differentiable unit where a
backend can, with the activation deferred into the next convolution and one tensor kept per block.
"""

import torch
from torch import Tensor, nn

from fastgan import backends
from fastgan.nn.blocks import Block, parts, run_block


class ConvStack(nn.Sequential):
    """`nn.Sequential(Conv2d | ConvTranspose2d, [BatchNorm2d], [LeakyReLU | ReLU], ...)`, faster.

    Construction, `state_dict`, indexing and results are those of `nn.Sequential`; running statistics are updated once
    per forward. On CPU (float32, processors with AVX2) each run of blocks is one differentiable unit of
    fastgan's kernels: BatchNorm and activation are applied while the next convolution reads its input. Any other
    module, and a block whose modules have hooks, parametrisations or a type of their own, runs as it is; on other
    devices and dtypes and in compiled code each block runs as `conv_bn_act` or `conv_transpose_bn_act`.

    Under autocast to bfloat16, on processors where the library only emulates that type, the kernels compute in float32
    and the result is rounded: more precise and faster than eager there, with float32 kept for backward.

    Differentiable any number of times: a gradient of the gradient is taken through the definition.
    `fastgan.use_backend("eager")` turns the kernels off.
    """

    def forward(self, input: Tensor) -> Tensor:
        run = _run_by_operations if why_unfused(input) is not None else _run_as_one_unit
        for _, part in parts(self):
            input = part(input) if isinstance(part, nn.Module) else run(part, input)
        return input


def _run_by_operations(blocks: list[Block], input: Tensor) -> Tensor:
    for block in blocks:
        input = run_block(block, input)
    return input


def _run_as_one_unit(blocks: list[Block], input: Tensor) -> Tensor:
    from fastgan.nn.stack_cpu import run_blocks

    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.float32 if autocast else input.dtype
    if any(block.conv.weight.dtype != dtype for block in blocks):
        return _run_by_operations(blocks, input)
    for block in blocks:
        backends.enter_layer(block.name)
        operation = "conv_bn_act" if isinstance(block.conv, nn.Conv2d) else "conv_transpose_bn_act"
        backends.note(operation, input, backends.Decision("cpu", f"one unit from layer {blocks[0].name} on"))
    if not autocast:
        return run_blocks(blocks, input)
    with torch.autocast("cpu", enabled=False):
        return run_blocks(blocks, input.float()).to(torch.get_autocast_dtype("cpu"))


def why_unfused(input: Tensor) -> str | None:
    """Why the blocks of a stack run one by one on `input`; None: they run on the CPU kernels as one unit."""
    if torch.compiler.is_compiling():
        return "compiled code takes the modules as they are"
    backend = backends.requested(None)
    if backend not in (None, "cpu"):
        return f"backend {backend!r} has no fused stack"
    if input.device.type != "cpu" or type(input) not in (Tensor, nn.Parameter):
        return "the input is not a plain CPU tensor"
    autocast = torch.is_autocast_enabled("cpu")
    if autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast to another dtype than bfloat16"
    if autocast and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "the library computes in bfloat16 here, the kernels in float32"
    if input.dtype not in (torch.float32, torch.float64) and not (autocast and input.dtype == torch.bfloat16):
        return "the kernels compute in float32"
    if input.dtype == torch.float64 and backend is None:
        return "float64 takes the kernels only where backend 'cpu' is asked for"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if input.dim() != 4 or input.numel() == 0:
        return "the input is not a batch of images"
    from fastgan.nn.stack_cpu import why_not

    return why_not()
