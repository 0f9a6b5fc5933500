"""Optimisers by name, through torch's fused implementations, and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastgan.errors import FastganError

OPTIMIZERS = ("adam", "adamw", "sgd")
DECAYS = ("none", "cosine")


def make_optimizer(
    parameters: Iterable[Tensor],
    name: str = "adam",
    *,
    lr: float,
    betas: tuple[float, float] = (0.5, 0.999),
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """`adam`, `adamw` or `sgd` over `parameters`, one fused kernel for all of them.

    Args:
        lr: step size, above 0.
        betas: of Adam and AdamW. 0.5 is DCGAN's choice; the 0.9 of classifiers lets G and D chase each other.
        momentum: of SGD.
        weight_decay: added to the gradient by `adam` and `sgd`, decoupled in `adamw`.
    """
    if lr <= 0:
        raise FastganError(f"learning rate must be above 0, got {lr}")
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    raise FastganError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")


def lr_scale(kimg: float, *, total_kimg: float, warmup_kimg: float = 0.0, decay: str = "none") -> float:
    """The factor on the learning rate after `kimg` thousand images: linear warm-up, then constant or a half cosine.

    A pure function of the position, so that nothing of it needs saving. In [0, 1]: 0 is the cosine's end, and the
    first step of a warm-up counts as 1e-3 kimg, so that it moves.
    """
    if decay not in DECAYS:
        raise FastganError(f"lr_decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if kimg < warmup_kimg:
        return min(max(kimg, 1e-3) / warmup_kimg, 1.0)
    if decay == "none" or total_kimg <= warmup_kimg:
        return 1.0
    progress = min((kimg - warmup_kimg) / (total_kimg - warmup_kimg), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
