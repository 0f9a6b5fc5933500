"""conv_transpose_bn_act: `conv_bn_act` with a transposed convolution."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from fastgan.ops.bn_act import act, bn_act, check_images
from fastgan.ops.conv_bn_act_cuda import convolution

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def conv_transpose_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
    batch_norm: bool = True,
    process_group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """`leaky_relu(batch_norm(conv_transpose2d(input, weight, bias, ...), ...), negative_slope)`.

    Arguments, result, errors, derivatives and what is kept for backward are those of `conv_bn_act`, but for

    Args:
        weight: `[C, K / groups, R, S]`, as in `torch.nn.functional.conv_transpose2d`.
        output_padding: added to one side of the output's size; less than the stride or the dilation.
    """
    if batch_norm:
        check_images("conv_transpose_bn_act", input)
    if backend == "cuda":
        y = convolution(input, weight, bias, stride, padding, dilation, groups, True, output_padding)
    else:
        y = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if not batch_norm:
        return act(y, negative_slope, backend, running_mean, running_var, bn_weight, bn_bias)
    return bn_act(
        y, running_mean, running_var, bn_weight, bn_bias, training=training, momentum=momentum, eps=eps,
        negative_slope=negative_slope, process_group=process_group, backend=backend,
    )  # fmt: skip
