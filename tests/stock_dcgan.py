"""PyTorch's stock DCGAN example, written from its description: what fastgan's networks and step are compared with.

64 x 64 images; the discriminator ends in a sigmoid and is trained with `BCELoss`; every backward pass computes all
gradients of the networks that it goes through.
"""

import torch
from torch import Tensor, nn


def generator(latent_dim: int = 100, width: int = 64, channels: int = 3) -> nn.Module:
    layers: list[nn.Module] = []
    before, stride, padding = latent_dim, 1, 0
    for factor in (8, 4, 2, 1):
        layers.append(nn.ConvTranspose2d(before, width * factor, 4, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(width * factor), nn.ReLU(True)]
        before, stride, padding = width * factor, 2, 1
    layers += [nn.ConvTranspose2d(before, channels, 4, 2, 1, bias=False), nn.Tanh()]
    return _Main(layers)


def discriminator(width: int = 64, channels: int = 3) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for factor in (1, 2, 4):
        layers.append(nn.Conv2d(width * factor, width * factor * 2, 4, 2, 1, bias=False))
        layers += [nn.BatchNorm2d(width * factor * 2), nn.LeakyReLU(0.2, True)]
    layers += [nn.Conv2d(width * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    return _Main(layers)


class _Main(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def step(
    g: nn.Module, d: nn.Module, opt_g: torch.optim.Optimizer, opt_d: torch.optim.Optimizer, real: Tensor, z: Tensor
) -> None:
    """The stock training step on `real` [N, C, 64, 64] and latents `z` [N, latent_dim, 1, 1]."""
    criterion = nn.BCELoss()
    ones, zeros = real.new_ones(len(real)), real.new_zeros(len(real))
    d.zero_grad()
    criterion(d(real).view(-1), ones).backward()
    fake = g(z)
    criterion(d(fake.detach()).view(-1), zeros).backward()
    opt_d.step()
    g.zero_grad()
    criterion(d(fake).view(-1), ones).backward()
    opt_g.step()
