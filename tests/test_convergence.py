"""Training on the CPU kernels and on eager operations from the same weights, beside eager training from weights that
were perturbed in the seventh digit: the kernels' rounding must not lead further away than such a perturbation does."""

import copy

import pytest
import torch
from torch import Tensor

from fastgan import GanStep, library
from fastgan.backends import counts, reset_counts, use_backend
from fastgan.nn import Discriminator, Generator

STEPS = 200


def train(images: Tensor, generator: Generator, discriminator: Discriminator, backend: str) -> tuple[Tensor, Tensor]:
    """Losses [STEPS, 2] and all weights after training copies of the networks."""
    networks = copy.deepcopy(generator), copy.deepcopy(discriminator)
    optimizers = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999), fused=True) for n in networks]
    draws = torch.Generator().manual_seed(5)
    step = GanStep(*networks, *optimizers, latents=lambda n: torch.randn(n, generator.latent_dim, generator=draws))
    losses = []
    with use_backend(backend):
        for index in range(STEPS):
            metrics = step(images[32 * index : 32 * (index + 1)])
            losses.append(torch.stack([metrics["loss_d"], metrics["loss_g"]]))
    return torch.stack(losses), torch.cat([p.detach().flatten() for n in networks for p in n.parameters()])


def divergence(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """RMS difference of the losses and of the weights."""
    return tuple((a - b).double().square().mean().sqrt().item() for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_kernels_lead_no_further_away_than_a_perturbation():
    from fastgan.data import prepare

    library.load("cpu")
    if torch.ops.fastgan_cpu.instruction_set() == "plain":
        pytest.skip("this processor has no AVX2: stacks run module by module here")
    pixels = torch.from_numpy(prepare("digits", 32).images[: 32 * STEPS].copy()).permute(0, 3, 1, 2)
    images = pixels.float() / 127.5 - 1
    torch.manual_seed(0)
    generator, discriminator = Generator(32, 1, 32, 16), Discriminator(32, 1, 16)
    eager = train(images, generator, discriminator, "eager")
    reset_counts()
    fast = train(images, generator, discriminator, "cpu")
    assert counts()["cpu", "convolve"] > 9 * STEPS
    with torch.no_grad():
        for parameter in (*generator.parameters(), *discriminator.parameters()):
            parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))
    perturbed = train(images, generator, discriminator, "eager")
    for got, allowed in zip(divergence(fast, eager), divergence(perturbed, eager), strict=True):
        assert got <= 10 * allowed
