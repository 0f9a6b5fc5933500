"""A generator's block alone: transposed convolution, BatchNorm and ReLU, beside eager channels-last."""

import pytest
import torch
import torch.nn.functional as F
from competing import PASSES, passes
from torch import Tensor

from fastgan.ops import conv_transpose_bn_act


def definition(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y = F.conv_transpose2d(x, weight, None, 2, 1)
    return F.relu(F.batch_norm(y, None, None, gamma, beta, True))


def operation(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return conv_transpose_bn_act(
        x, weight, None, None, gamma, beta, stride=2, padding=1, training=True, negative_slope=0.0
    )


@pytest.mark.parametrize("what", PASSES)
def test_conv_transpose_bn_act(pair, benchmark, batch, device, what, provider):
    benchmark.group = f"conv_transpose_bn_act {what}"
    x, weight = torch.randn(batch(32), 128, 16, 16, device=device), torch.randn(128, 64, 4, 4, device=device)
    inputs = (x, weight, torch.ones(64, device=device), torch.zeros(64, device=device))
    stem = "conv_transpose_bn_act"
    run, reference = (passes(stem, p, what, definition, operation, inputs) for p in (provider, "tuned"))
    pair(run, reference)
