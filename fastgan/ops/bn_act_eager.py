"""bn_act's eager backend: the split operations in plain PyTorch, any dtype, differentiable any number of
times.

Every kernel is compared with these functions in fp64. The letters are those of `fastgan/ops/bn_act.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.backends import define
from fastgan.first_use import Comparison


def activation(v: Tensor, slope: float) -> Tensor:
    """LeakyReLU of a tensor that nobody else reads; slope 0 is ReLU, so that -inf gives 0, and slope 1 the
    identity."""
    if slope == 1:
        return v
    if slope == 0:
        return F.relu(v, inplace=True)
    return F.leaky_relu(v, slope, inplace=slope > 0)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels-last, else its one copy to channels-last (4-D) or
    contiguous."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` in the memory format of the dense tensor `model`, and in its dtype."""
    if tensor.dtype != model.dtype:
        tensor = tensor.to(model.dtype)
    if model.is_contiguous():
        return tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last)


def stat_dtype(tensor: Tensor) -> torch.dtype:
    """What sums and statistics of `tensor` are held in: fp32, or fp64 for fp64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# --- the eager split operations: the definition, written out --------------------------------------


def _per_channel(value: Tensor, y: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (y.dim() - 2))


def _others(y: Tensor) -> list[int]:
    return [d for d in range(y.dim()) if d != 1]


def _centred(y: Tensor, mean: Tensor) -> Tensor:
    return y.to(stat_dtype(y)) - _per_channel(mean, y)


def _preactivation(y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _per_channel(weight * invstd, y) * _centred(y, mean) + _per_channel(bias, y)


def _through_activation(dz: Tensor, y, mean, invstd, weight, bias, slope: float) -> Tensor:
    dz = dz.to(stat_dtype(dz))
    below = torch.zeros_like(dz) if slope == 0 else slope * dz
    return torch.where(_preactivation(y, mean, invstd, weight, bias) > 0, dz, below)


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    mean = y.to(stat_dtype(y)).mean(_others(y))
    return mean, _centred(y, mean).square().sum(_others(y))


def apply(y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
    return activation(_preactivation(y, mean, invstd, weight, bias), slope).to(y.dtype)


def reduce(dz: Tensor, y: Tensor, mean, invstd, weight, bias, slope: float) -> tuple[Tensor, Tensor]:
    g = _through_activation(dz, y, mean, invstd, weight, bias, slope)
    return invstd * (g * _centred(y, mean)).sum(_others(y)), g.sum(_others(y))


def backward(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: float,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    n: int,
) -> Tensor:
    s = weight * invstd
    dy = _per_channel(s, y) * _through_activation(dz, y, mean, invstd, weight, bias, slope)
    if grad_weight is not None and grad_bias is not None:
        dy = dy - _per_channel(s * invstd * grad_weight / n, y) * _centred(y, mean)
        dy = dy - _per_channel(s * grad_bias / n, y)
    return dy.to(y.dtype)


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, n: int, momentum: float
) -> None:
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var, alpha=momentum * n / (n - 1))


def settle(name: str, args: tuple) -> tuple:
    """Arguments whose dz is 0 where rounding decides the sign of v: there either branch's gradient is
    right."""
    if name not in ("bn_act_reduce", "bn_act_backward"):
        return args
    dz, y, mean, invstd, weight, bias, *rest = args
    s = _per_channel(weight * invstd, y).abs().double()
    v = _preactivation(*(a.double() for a in (y, mean, invstd, weight, bias)))
    size = s * (y.double().abs() + _per_channel(mean, y).abs()) + _per_channel(bias, y).abs()
    clear = v.abs() > 8 * torch.finfo(stat_dtype(y)).eps * size
    return (torch.where(clear, dz, torch.zeros_like(dz)), y, mean, invstd, weight, bias, *rest)


def noise(name: str, args: tuple) -> list[float]:
    """For each output, an error that rounding the terms of its sum explains, where the sum itself may cancel to 0."""
    if name == "bn_stats":
        (y,) = args
        return [4 * torch.finfo(stat_dtype(y)).eps * y.abs().max().item(), 0.0]
    if name == "bn_act_reduce":
        dz, y, mean, invstd, *_ = args
        terms = torch.finfo(stat_dtype(y)).eps * (y.numel() / y.shape[1]) ** 0.5 * dz.abs().max().item()
        return [4 * terms * (_centred(y, mean).abs().max() * invstd.max()).item(), 4 * terms]
    return []


define(
    "bn_act",
    {
        "bn_stats": stats,
        "bn_act": apply,
        "bn_act_reduce": reduce,
        "bn_act_backward": backward,
        "update_running_stats": update_running_stats,
    },
    Comparison(settle, noise),
    whole=("bn_act_train", "bn_act_eval", "bn_act_grad"),
)
