"""ConvStack: a `nn.Sequential` of convolution, BatchNorm and activation that runs as one differentiable unit where a
backend can, with the activation deferred into the next convolution and one tensor kept per block.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastgan import backends
from fastgan.nn.blocks import Blocks


class Block(NamedTuple):
    """`length` modules from `name` on: a convolution, the BatchNorm after it or None, and the slope of the LeakyReLU
    after that (1: none)."""

    name: str
    length: int
    conv: nn.Conv2d | nn.ConvTranspose2d
    norm: nn.BatchNorm2d | None
    slope: float


class ConvStack(Blocks):
    """`nn.Sequential(Conv2d | ConvTranspose2d, [BatchNorm2d], [LeakyReLU | ReLU], ...)`, faster.

    Construction, `state_dict`, indexing and results are those of `nn.Sequential`; running statistics are updated once
    per forward. On CPU (float32, processors with AVX2) each run of blocks is one differentiable unit of
    fastgan's kernels: BatchNorm and activation are applied while the next convolution reads its input. Any other
    module, and a block whose modules have hooks, parametrisations or a type of their own, runs as it is; on other
    devices and dtypes, under autocast and in compiled code the whole stack runs as `Blocks`.

    Differentiable any number of times: a gradient of the gradient is taken through the definition.
    `fastgan.use_backend("eager")` turns the kernels off.
    """

    def forward(self, input: Tensor) -> Tensor:
        if why_unfused(input) is not None:
            return super().forward(input)
        from fastgan.nn.stack_cpu import run_blocks

        for name, part in parts(self):
            if isinstance(part, nn.Module):
                input = part(input)
                continue
            for block in part:
                backends.enter_layer(block.name)
                operation = "conv_bn_act" if isinstance(block.conv, nn.Conv2d) else "conv_transpose_bn_act"
                backends.note(operation, input, backends.Decision("cpu", f"one unit from layer {name} on"))
            input = run_blocks(part, input)
        return input


def why_unfused(input: Tensor) -> str | None:
    """Why a stack runs as `Blocks` on `input`; None: it runs on the CPU kernels."""
    if torch.compiler.is_compiling():
        return "compiled code takes the modules as they are"
    backend = backends.requested(None)
    if backend not in (None, "cpu"):
        return f"backend {backend!r} has no fused stack"
    if input.device.type != "cpu" or type(input) not in (Tensor, nn.Parameter):
        return "the input is not a plain CPU tensor"
    if input.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "the kernels compute in float32 without autocast"
    if input.dtype == torch.float64 and backend is None:
        return "float64 takes the kernels only where backend 'cpu' is asked for"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if input.dim() != 4 or input.numel() == 0:
        return "the input is not a batch of images"
    from fastgan.nn.stack_cpu import why_not

    return why_not()


def parts(stack: nn.Sequential) -> list[tuple[str, list[Block] | nn.Module]]:
    """The sequence cut into runs of blocks that can be fused and modules that run as they are, by their first names."""
    result: list[tuple[str, list[Block] | nn.Module]] = []
    rest = list(stack._modules.items())
    run: list[Block] = []
    while rest:
        name, module = rest[0]
        block = _block(name, [m for _, m in rest[:3] if m is not None])
        if block is None:
            run = []
            if module is not None:
                result.append((name, module))
            del rest[0]
            continue
        if not run:
            result.append((name, run))
        run.append(block)
        del rest[: block.length]
    return result


def _block(name: str, modules: list[nn.Module]) -> Block | None:
    """The block that `modules` begin with, or None."""
    if not modules or _has_any_global_hook():
        return None
    conv: Any = modules[0]
    if (
        not _is_plain(conv, nn.Conv2d, nn.ConvTranspose2d)
        or isinstance(conv.padding, str)
        or conv.padding_mode != "zeros"
    ):
        return None
    after: list[Any] = modules[1:]
    norm: Any = after.pop(0) if after and _is_plain(after[0], nn.BatchNorm2d) else None
    slope, length = 1.0, 1 + (norm is not None)
    if _is_activation(after):
        slope, length = 0.0 if isinstance(after[0], nn.ReLU) else after[0].negative_slope, length + 1
    return Block(name, length, conv, norm, slope)


def _is_activation(rest: list[nn.Module]) -> bool:
    return bool(rest) and _is_plain(rest[0], nn.LeakyReLU, nn.ReLU)


def _is_plain(module: nn.Module, *types: type) -> bool:
    """Exactly one of `types` (a parametrised module has a type of its own) and without hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in types and not hooks
