"""The discriminator's cross-entropy on real and fake logits with mean D(x) and D(G(z)), beside eager.

Every competitor returns all four, behind the sum that is differentiated: what nobody gets, a compiler leaves out.
"""

import pytest
import torch
import torch.nn.functional as F
from competing import PASSES, passes
from torch import Tensor

from fastgan.ops import gan_bce

WITHOUT = ("tuned",)  # logits have no layout


def definition(real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
    losses = [
        F.binary_cross_entropy_with_logits(logits, target)
        for logits, target in ((real, torch.ones_like(real)), (fake, torch.zeros_like(fake)))
    ]
    return losses[0] + losses[1], *losses, *(logits.detach().sigmoid().mean() for logits in (real, fake))


def operation(real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
    loss_real, loss_fake, *means = gan_bce(real, fake)
    return loss_real + loss_fake, loss_real, loss_fake, *means


class Nothing(torch.autograd.Function):
    """The four numbers and the gradients of two of them without any computation."""

    @staticmethod
    def forward(ctx, *logits):
        ctx.save_for_backward(*logits)
        losses, means = ([logits[0].new_empty(()) for _ in range(2)] for _ in range(2))
        ctx.mark_non_differentiable(*means)
        return *losses, *means

    @staticmethod
    def backward(ctx, *_):
        return ctx.saved_tensors


def nothing(real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
    loss_real, loss_fake, *means = Nothing.apply(real, fake)
    return loss_real + loss_fake, loss_real, loss_fake, *means


# As many as images, and as many as a discriminator has that judges patches.
@pytest.mark.parametrize("count", [64, 4096, 65536])
@pytest.mark.parametrize("what", PASSES)
def test_gan_bce(pair, benchmark, device, what, count, provider):
    benchmark.group = f"gan_bce {what}"
    inputs = [torch.randn(count, device=device) for _ in range(2)]
    run, reference = (passes("gan_bce", p, what, definition, operation, inputs) for p in (provider, "eager"))
    pair(run, reference)


@pytest.mark.parametrize("count", [64, 4096, 65536])
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("competitor", ["no kernel"])
def test_floor(pair, benchmark, device, what, count, competitor):
    """The most that any kernel can gain where it must be called through autograd: PyTorch's own time remains."""
    benchmark.group = f"gan_bce {what}"
    inputs = [torch.randn(count, device=device) for _ in range(2)]
    run, reference = (passes("gan_bce", "eager", what, one, operation, inputs) for one in (nothing, definition))
    pair(run, reference)
