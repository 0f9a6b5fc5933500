"""ConvStack: a `nn.Sequential` of convolution, BatchNorm and activation that runs as one differentiable unit where a
backend can, with the activation deferred into the next convolution and one tensor kept per block.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgan.backends import requested
from fastgan.errors import BackendError


class Block(NamedTuple):
    """A convolution, the BatchNorm after it or None, and the slope of the LeakyReLU after that (1: none)."""

    conv: nn.Conv2d | nn.ConvTranspose2d
    norm: nn.BatchNorm2d | None
    slope: float


class ConvStack(nn.Sequential):
    """`nn.Sequential(Conv2d | ConvTranspose2d, [BatchNorm2d], [LeakyReLU | ReLU], ...)`, faster.

    Construction, `state_dict`, indexing and results are those of `nn.Sequential`; running statistics are updated once
    per forward. On CPU (float32, processors with AVX2) each run of blocks is one differentiable unit of
    fastgan's kernels: BatchNorm and activation are applied while the next convolution reads its input. Any other
    module, and a block whose modules have hooks, parametrisations or a type of their own, runs as it is, and so does the
    whole stack on other devices, dtypes, under autocast and in compiled code.

    Differentiable any number of times: a gradient of the gradient is taken through the definition.
    `fastgan.use_backend("eager")` turns the kernels off; "cpu" raises `BackendError` where they cannot run.
    """

    def forward(self, input: Tensor) -> Tensor:
        if why_unfused(input) is not None:
            return super().forward(input)
        from fastgan.nn.stack_cpu import run_blocks

        for part in parts(self):
            input = run_blocks(part, input) if isinstance(part, list) else part(input)
        return input


def why_unfused(input: Tensor) -> str | None:
    """Why a stack runs module by module on `input`; None: it runs fused. BackendError if "cpu" is forced and cannot."""
    if torch.compiler.is_compiling():
        return "compiled code takes the modules as they are"
    backend = requested(None)
    if backend not in (None, "cpu"):
        return f"backend {backend!r} has no fused stack"
    reason = _unable(input)
    if reason is not None and backend == "cpu":
        raise BackendError(f"ConvStack: backend 'cpu' was asked for, but {reason}")
    return reason


def _unable(input: Tensor) -> str | None:
    if input.device.type != "cpu" or type(input) not in (Tensor, nn.Parameter):
        return "the input is not a plain CPU tensor"
    if input.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "the kernels compute in float32 without autocast"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if input.dim() != 4 or input.numel() == 0:
        return "the input is not a batch of images"
    from fastgan.nn.stack_cpu import why_not

    return why_not(requested(None) == "cpu" or input.dtype == torch.float32)


def parts(modules: nn.Sequential) -> list[list[Block] | nn.Module]:
    """The sequence cut into runs of blocks that can be fused and modules that run as they are."""
    result: list[list[Block] | nn.Module] = []
    rest = list(modules)
    while rest:
        block = _block(rest)
        if block is None:
            result.append(rest.pop(0))
            continue
        if not (result and isinstance(result[-1], list)):
            result.append([])
        result[-1].append(block)  # type: ignore[union-attr]
        del rest[: 1 + (block.norm is not None) + _is_activation(rest[1 + (block.norm is not None) :])]
    return result


def _block(rest: list[nn.Module]) -> Block | None:
    conv = rest[0]
    if (
        not _is_plain(conv, nn.Conv2d, nn.ConvTranspose2d)
        or isinstance(conv.padding, str)
        or conv.padding_mode != "zeros"
    ):
        return None
    after = rest[1:]
    norm = after[0] if after and _is_plain(after[0], nn.BatchNorm2d) else None
    if after and isinstance(after[0], nn.modules.batchnorm._BatchNorm) and norm is None:
        return None
    after = after[norm is not None :]
    slope = 1.0
    if _is_activation(after):
        slope = 0.0 if isinstance(after[0], nn.ReLU) else after[0].negative_slope
    return Block(conv, norm, slope)


def _is_activation(rest: list[nn.Module]) -> bool:
    return bool(rest) and _is_plain(rest[0], nn.LeakyReLU, nn.ReLU)


def _is_plain(module: nn.Module, *types: type) -> bool:
    """Exactly one of `types` (a parametrised module has a type of its own) and without hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in types and not hooks
