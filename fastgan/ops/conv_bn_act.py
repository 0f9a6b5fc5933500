"""conv_bn_act: a block, a convolution, BatchNorm and LeakyReLU, as one operation.

The convolution is the library's (cuDNN, oneDNN), or, asked for by name, the CUDA backend's; what follows it is `bn_act`
of the chosen backend.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from fastgan.ops.bn_act import act, bn_act, check_images
from fastgan.ops.conv_bn_act_cuda import convolution

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def conv_bn_act(
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
    """`leaky_relu(batch_norm(conv2d(input, weight, bias, ...), ...), negative_slope)`.

    Args:
        input: `[N, C, H, W]`; without BatchNorm also `[C, H, W]`, as in `torch.nn.functional.conv2d`.
        weight: `[K, C / groups, R, S]`, as in `torch.nn.functional.conv2d`, as are stride to groups.
        running_mean, running_var, bn_weight, bn_bias: `[K]`, as in `bn_act`; all None without BatchNorm.
        bias: `[K]`, of the convolution.
        batch_norm: False for a block without BatchNorm, such as a discriminator's first.
        training, momentum, eps, negative_slope, process_group, backend: as in `bn_act`. With "cuda" here (not by
            `use_backend`) the convolution itself is fastgan's, too: fp16 or bf16, C a multiple of 8, no bias,
            groups=1.

    Returns:
        `[N, K, H', W']`, in the dtype and memory format of the convolution's output; under autocast the
        convolution runs in the lower precision, while statistics and BatchNorm's parameters stay fp32.
        Differentiable any number of times. Kept for backward: input, weight, the convolution's output and
        O(K).

    Raises:
        ValueError, BackendError: as in `bn_act`; BatchNorm of another input than `[N, C, H, W]`, or its tensors given
            with `batch_norm=False`.
    """
    if batch_norm:
        check_images("conv_bn_act", input)
    if backend == "cuda":
        y = convolution(input, weight, bias, stride, padding, dilation, groups)
    else:
        y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if not batch_norm:
        return act(y, negative_slope, backend, running_mean, running_var, bn_weight, bn_bias)
    return bn_act(
        y, running_mean, running_var, bn_weight, bn_bias, training=training, momentum=momentum, eps=eps,
        negative_slope=negative_slope, process_group=process_group, backend=backend,
    )  # fmt: skip
