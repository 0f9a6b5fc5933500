"""BatchNorm and LeakyReLU, beside eager channels-last. GB/s count the passes over the activation that the definition
of a one-read, one-write kernel needs: three forward, five backward."""

import pytest
import torch
import torch.nn.functional as F
from competing import PASSES, passes
from torch import Tensor

from fastgan.ops import bn_act

SHAPES = {"64 at 32x32": (64, 64, 32, 32), "256 at 8x8": (64, 256, 8, 8), "24 at 16x16": (32, 24, 16, 16)}
CROSSINGS = {"forward": 3, "backward": 5, "both": 8}


def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True), 0.2)


def operation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return bn_act(x, None, None, weight, bias, training=True)


class Nothing(torch.autograd.Function):
    """Memory for the result and the gradients, without any computation."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx, _):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def inputs_of(n: int, channels: int, *size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, channels, *size, device=device)
    return x, torch.ones(channels, device=device), torch.zeros(channels, device=device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", PASSES)
def test_bn_act(pair, benchmark, batch, device, what, shape, provider):
    benchmark.group = f"bn_act {what}"
    n, *sizes = SHAPES[shape]
    inputs = inputs_of(batch(n), *sizes, device=device)
    run, reference = (passes("bn_act", p, what, definition, operation, inputs) for p in (provider, "tuned"))
    pair(run, reference, gigabytes=1e-9 * CROSSINGS[what] * inputs[0].nbytes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("competitor", ["no kernel"])
def test_floor(pair, benchmark, batch, device, what, shape, competitor):
    """What a call through autograd takes besides: with its bytes at a copy's bandwidth, the least from memory."""
    benchmark.group = f"bn_act {what}"
    n, *sizes = SHAPES[shape]
    inputs = inputs_of(batch(n), *sizes, device=device)
    run, reference = (passes("bn_act", "tuned", what, f, operation, inputs) for f in (Nothing.apply, definition))
    pair(run, reference)
