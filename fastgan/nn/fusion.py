"""`fuse`: one call that lets the networks a user already has run on fastgan's operations."""

from torch import nn

from fastgan.errors import FastganError
from fastgan.nn.blocks import parts
from fastgan.nn.stack import ConvStack


def fuse(module: nn.Module) -> nn.Module:
    """Let every plain `nn.Sequential` in `module` run its blocks as fused operations; returns `module`.

    A block is a convolution with its BatchNorm and LeakyReLU or ReLU, one after the other (see `ConvStack`).
    Parameters, `state_dict`, hooks, optimisers that hold the parameters and results stay; subclasses of
    `nn.Sequential` and modules with a `forward` of their own are left alone. `fastgan.explain(module, input)` shows
    what runs where.

    Raises:
        FastganError: there is nothing to fuse.
    """
    found = [m for m in module.modules() if type(m) is nn.Sequential and _has_blocks(m)]
    if not found and not any(isinstance(m, ConvStack) for m in module.modules()):
        raise FastganError(
            f"fuse: {type(module).__name__} has no nn.Sequential in which an nn.Conv2d or nn.ConvTranspose2d is "
            "followed by an nn.BatchNorm2d, nn.LeakyReLU or nn.ReLU; call fastgan.ops.conv_bn_act in its forward"
        )
    for sequential in found:
        # ConvStack adds a forward and no state: changing the class keeps the object that others refer to.
        sequential.__class__ = ConvStack
    return module


def _has_blocks(sequential: nn.Sequential) -> bool:
    return any(block.length > 1 for _, part in parts(sequential) if isinstance(part, list) for block in part)
