"""Blocks in a `nn.Sequential`: finding them, and running one as one operation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from fastgan import backends
from fastgan.ops import bn_act, conv_bn_act, conv_transpose_bn_act
from fastgan.ops.bn_act import check_images

KINDS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LeakyReLU, nn.ReLU)


class Block(NamedTuple):
    """`length` modules from `name` on: a convolution, the BatchNorm after it or None, and the slope of the LeakyReLU
    after that (1: none)."""

    name: str
    length: int
    conv: nn.Conv2d | nn.ConvTranspose2d
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | None
    slope: float


def parts(sequence: nn.Sequential) -> list[tuple[str, list[Block] | nn.Module]]:
    """The sequence cut into runs of blocks that can be fused and modules that run as they are, by their first names.

    A block is an `nn.Conv2d` or `nn.ConvTranspose2d` (zero padding), then perhaps an `nn.BatchNorm2d` or
    `nn.SyncBatchNorm`, then perhaps an `nn.LeakyReLU` or `nn.ReLU`. A module with hooks, parametrisations or a type of
    its own is in none.
    """
    result: list[tuple[str, list[Block] | nn.Module]] = []
    rest = list(sequence._modules.items())
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
        not is_plain_module(conv, nn.Conv2d, nn.ConvTranspose2d)
        or isinstance(conv.padding, str)
        or conv.padding_mode != "zeros"
    ):
        return None
    after: list[Any] = modules[1:]
    norm: Any = after.pop(0) if after and is_plain_module(after[0], nn.BatchNorm2d, nn.SyncBatchNorm) else None
    slope, length = 1.0, 1 + (norm is not None)
    if _is_activation(after):
        slope, length = 0.0 if isinstance(after[0], nn.ReLU) else after[0].negative_slope, length + 1
    return Block(name, length, conv, norm, slope)


def _is_activation(rest: list[nn.Module]) -> bool:
    return bool(rest) and is_plain_module(rest[0], nn.LeakyReLU, nn.ReLU)


def is_plain_module(module: nn.Module, *types: type) -> bool:
    """Exactly one of `types` (a parametrised module has a type of its own) and without hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in types and not hooks


def why_apart(module: nn.Module) -> str | None:
    """Why a module of a kind that blocks are made of is in none; None: it is of no such kind."""
    if not isinstance(module, KINDS):
        return None
    if _has_any_global_hook():
        return "there is a hook on all modules"
    if is_parametrized(module):
        return "it is parametrised"
    if type(module) not in KINDS:
        return f"{type(module).__name__} may have a forward of its own"
    if not is_plain_module(module, *KINDS):
        return "it has hooks"
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return "its padding is not a number of zeros"
    return "it follows no convolution of a block"


def run_norm(norm: nn.SyncBatchNorm, input: Tensor) -> Tensor:
    """A synchronised BatchNorm that is in no block, on any device: its own forward refuses the CPU."""
    by = batch_norm_arguments(norm)
    return bn_act(input, weight=by.pop("bn_weight"), bias=by.pop("bn_bias"), negative_slope=1.0, **by)


def run_block(block: Block, input: Tensor) -> Tensor:
    """One block by `conv_bn_act` or `conv_transpose_bn_act`, whatever backend they choose."""
    backends.enter_layer(block.name)
    conv: Any = block.conv
    arguments: dict[str, Any] = {
        "bias": conv.bias,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "negative_slope": block.slope,
    }
    if block.norm is None:
        arguments |= {"batch_norm": False, "training": False}
    else:
        check_images(f"ConvStack, layer {block.name}", input)  # before the batch is counted
        arguments |= batch_norm_arguments(block.norm)
    if isinstance(conv, nn.ConvTranspose2d):
        return conv_transpose_bn_act(input, conv.weight, output_padding=conv.output_padding, **arguments)
    return conv_bn_act(input, conv.weight, **arguments)


def batch_norm_arguments(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> dict[str, Any]:
    """What `norm.forward` would pass to `F.batch_norm`, under the names of `conv_bn_act`; counts the batch as
    it does."""
    count_batches([norm])
    return counted_arguments(norm)


def counted_arguments(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> dict[str, Any]:
    """`batch_norm_arguments` of a batch that is counted already."""
    keeps = not norm.training or norm.track_running_stats
    return {
        "running_mean": norm.running_mean if keeps else None,
        "running_var": norm.running_var if keeps else None,
        "bn_weight": norm.weight,
        "bn_bias": norm.bias,
        "training": norm.training or (norm.running_mean is None and norm.running_var is None),
        "momentum": momentum_of(norm),
        "eps": norm.eps,
        "process_group": _process_group(norm),
    }


def count_batches(norms: Sequence[nn.BatchNorm2d | nn.SyncBatchNorm], batches: int = 1) -> None:
    """Count that many batches in every norm that counts them, all in one launch."""
    counters: list[Any] = [norm.num_batches_tracked for norm in norms if _counts(norm)]
    if counters:
        torch._foreach_add_(counters, batches)


def momentum_of(norm: nn.BatchNorm2d | nn.SyncBatchNorm, later: int = 0) -> float:
    """The weight of the batch after which `later` others are counted already.

    With `momentum=None` the running statistics are plain averages; their weight is read from a counter on the
    device, which makes the host wait, as in PyTorch.
    """
    if norm.momentum is not None:
        return norm.momentum
    return 1.0 / (float(norm.num_batches_tracked) - later) if _counts(norm) else 0.0  # type: ignore[arg-type]


def _counts(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> bool:
    return norm.training and norm.track_running_stats and norm.num_batches_tracked is not None


def _process_group(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The processes whose images `norm` normalises together with its own, as `nn.SyncBatchNorm` has it; None: none."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
