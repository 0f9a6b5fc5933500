"""A discriminator's block alone: convolution, BatchNorm and LeakyReLU, beside eager channels-last."""

import pytest
import torch
import torch.nn.functional as F
from competing import PASSES, passes
from torch import Tensor

from fastgan.ops import conv_bn_act


def definition(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y = F.conv2d(x, weight, None, 2, 1)
    return F.leaky_relu(F.batch_norm(y, None, None, gamma, beta, True), 0.2)


def operation(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return conv_bn_act(x, weight, None, None, gamma, beta, stride=2, padding=1, training=True)


@pytest.mark.parametrize("what", PASSES)
def test_conv_bn_act(pair, benchmark, batch, device, what, provider):
    benchmark.group = f"conv_bn_act {what}"
    x, weight = torch.randn(batch(32), 64, 32, 32, device=device), torch.randn(128, 64, 4, 4, device=device)
    inputs = (x, weight, torch.ones(128, device=device), torch.zeros(128, device=device))
    run, reference = (passes("conv_bn_act", p, what, definition, operation, inputs) for p in (provider, "tuned"))
    pair(run, reference)
