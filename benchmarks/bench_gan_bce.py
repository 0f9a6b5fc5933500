"""The discriminator's cross-entropy on real and fake logits with mean D(x) and D(G(z)), beside eager."""

import pytest
import torch
import torch.nn.functional as F
from competing import PASSES, passes
from torch import Tensor

from fastgan.ops import gan_bce

WITHOUT = ("tuned",)  # logits have no layout


def definition(real: Tensor, fake: Tensor) -> Tensor:
    losses = [
        F.binary_cross_entropy_with_logits(logits, target)
        for logits, target in ((real, torch.ones_like(real)), (fake, torch.zeros_like(fake)))
    ]
    means = [logits.detach().sigmoid().mean() for logits in (real, fake)]
    return torch.stack([losses[0] + losses[1], *means])


def operation(real: Tensor, fake: Tensor) -> Tensor:
    loss_real, loss_fake, *means = gan_bce(real, fake)
    return torch.stack([loss_real + loss_fake, *means])


@pytest.mark.parametrize("count", [64, 4096])
@pytest.mark.parametrize("what", PASSES)
def test_gan_bce(pair, benchmark, device, what, count, provider):
    benchmark.group = f"gan_bce {what}"
    inputs = [torch.randn(count, device=device) for _ in range(2)]
    run, reference = (passes("gan_bce", p, what, definition, operation, inputs) for p in (provider, "eager"))
    pair(run, reference)
