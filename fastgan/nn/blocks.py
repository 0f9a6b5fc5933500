"""`Blocks`: an `nn.Sequential` that runs convolution, BatchNorm and LeakyReLU as one operation each."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastgan import backends
from fastgan.ops import conv_bn_act, conv_transpose_bn_act


class Blocks(nn.Sequential):
    """A plain `nn.Sequential`, same modules and same `state_dict`, whose blocks run as fused operations.

    A block is an `nn.Conv2d` or `nn.ConvTranspose2d` (zero padding), an optional `nn.BatchNorm2d`, and an
    `nn.LeakyReLU` or `nn.ReLU`, one after the other. Anything else, and a block of which a module has hooks,
    runs module by module. Parametrised weights (spectral normalisation) work as usual.
    """

    def forward(self, input: Tensor) -> Tensor:
        for name, modules in self._parts():
            backends.enter_layer(name)
            input = modules[0](input) if len(modules) == 1 else _run_block(modules, input)
        return input

    def _parts(self) -> Iterator[tuple[str, list[nn.Module]]]:
        """The blocks, and the single modules between them, by the name of their first module."""
        items = list(self._modules.items())
        at = 0
        while at < len(items):
            name, module = items[at]
            length = _block_length([m for _, m in items[at : at + 3]]) if _is_convolution(module) else 1
            yield name, [m for _, m in items[at : at + length] if m is not None]
            at += length


def _is_convolution(module: nn.Module | None) -> bool:
    return (
        isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _block_length(modules: list[nn.Module | None]) -> int:
    """3 or 2 where the modules begin with a block with or without BatchNorm that may be fused, else 1."""
    with_norm = len(modules) > 2 and type(modules[1]) is nn.BatchNorm2d
    length = 3 if with_norm else 2
    if len(modules) < length or type(modules[length - 1]) not in (nn.LeakyReLU, nn.ReLU):
        return 1
    return 1 if _has_any_global_hook() or any(map(_has_hooks, modules[:length])) else length


def _has_hooks(module: nn.Module | None) -> bool:
    return module is not None and bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _run_block(modules: list[nn.Module], input: Tensor) -> Tensor:
    convolution, activation = modules[0], modules[-1]
    weight: Any = convolution.weight
    slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
    norm = modules[1] if len(modules) == 3 else None
    arguments: dict[str, Any] = {
        "bias": convolution.bias,
        "stride": convolution.stride,
        "padding": convolution.padding,
        "dilation": convolution.dilation,
        "groups": convolution.groups,
        "negative_slope": slope,
        "batch_norm": norm is not None,
    }
    if isinstance(norm, nn.BatchNorm2d):
        arguments |= batch_norm_arguments(norm)
    else:
        arguments["training"] = False
    if isinstance(convolution, nn.ConvTranspose2d):
        return conv_transpose_bn_act(input, weight, output_padding=convolution.output_padding, **arguments)
    return conv_bn_act(input, weight, **arguments)


def batch_norm_arguments(norm: nn.BatchNorm2d) -> dict[str, Any]:
    """What `norm.forward` would pass to `F.batch_norm`, under the names of `conv_bn_act`; counts the batch as
    it does.

    With `momentum=None` the running statistics are plain averages; their weight is read from a counter on the
    device, which makes the host wait, as in PyTorch.
    """
    updates = norm.training and norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if updates and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    keeps = not norm.training or norm.track_running_stats
    return {
        "running_mean": norm.running_mean if keeps else None,
        "running_var": norm.running_var if keeps else None,
        "bn_weight": norm.weight,
        "bn_bias": norm.bias,
        "training": norm.training or (norm.running_mean is None and norm.running_var is None),
        "momentum": momentum,
        "eps": norm.eps,
    }
