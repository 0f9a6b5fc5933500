"""The training steps that are measured, and the convolutions that they are made of."""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from fastgan.nn import Discriminator, Generator
from fastgan.train.config import PRESETS, TrainConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One training step: images, widths, batch and precision (bf16 is autocast), and the length of a run."""

    name: str
    image_size: int
    channels: int
    latent_dim: int
    g_channels: int
    d_channels: int
    batch_size: int
    precision: str
    kimg: float

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def networks(self, device: torch.device) -> tuple[Generator, Discriminator]:
        """Generator and discriminator, the same weights every time."""
        torch.manual_seed(0)
        with device:
            generator = Generator(self.image_size, self.channels, self.latent_dim, self.g_channels)
            return generator, Discriminator(self.image_size, self.channels, self.d_channels)

    def images(self, device: torch.device) -> torch.Tensor:
        """A batch [N, C, H, W] of noise in [-1, 1]."""
        shape = (self.batch_size, self.channels, self.image_size, self.image_size)
        return torch.rand(shape, generator=torch.Generator().manual_seed(1)).mul(2).sub(1).to(device)


def dcgan(image_size: int, batch_size: int, precision: str) -> Case:
    """The stock widths; digits at 32 pixels, colour above."""
    channels = 1 if image_size == 32 else 3
    name = f"DCGAN-{image_size}, batch {batch_size}, {precision}"
    return Case(name, image_size, channels, 100, 64, 64, batch_size, precision, PRESETS[str(image_size)]["kimg"])


def default_run() -> Case:
    """The step of `python -m fastgan.train` without arguments."""
    run = TrainConfig()
    widths = (run.latent_dim, run.g_channels, run.d_channels)
    return Case("the default run", run.image_size, 1, *widths, run.batch_size, "fp32", run.kimg)


CASES = (default_run(), *(dcgan(*key) for key in product((32, 64, 128), (32, 64), PRECISIONS)))


class Layer(NamedTuple):
    """A convolution [N, in_channels, input_size, input_size] -> [N, out_channels, output_size, output_size]."""

    name: str
    transposed: bool
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    input_size: int
    output_size: int

    def gflop(self, batch: int) -> float:
        """Of the definition, two for each multiplication with its addition: the same forward, for the input gradient
        and for the weight gradient."""
        positions = min(self.input_size, self.output_size) ** 2
        return 2e-9 * batch * positions * self.kernel**2 * self.in_channels * self.out_channels

    def gigabytes(self, batch: int, itemsize: int) -> float:
        """Input, output and weight once each, which any of the three passes reads or writes."""
        images = batch * (self.in_channels * self.input_size**2 + self.out_channels * self.output_size**2)
        return 1e-9 * itemsize * (images + self.in_channels * self.out_channels * self.kernel**2)

    def is_product(self) -> bool:
        """Whether it is a matrix product: one side is a single pixel."""
        return min(self.input_size, self.output_size) == 1

    def module(self) -> nn.Module:
        """As it stands in the network."""
        make = nn.ConvTranspose2d if self.transposed else nn.Conv2d
        return make(self.in_channels, self.out_channels, self.kernel, self.stride, self.padding, bias=False)


def layers(case: Case) -> tuple[list[Layer], list[Layer]]:
    """The convolutions of the generator and of the discriminator, first to last, seen as they run on shapes alone."""
    generator, discriminator = case.networks(torch.device("meta"))
    latents = torch.empty(case.batch_size, case.latent_dim, device="meta")
    return _convolutions("G", generator, latents), _convolutions("D", discriminator, case.images(torch.device("meta")))


def measured_layers() -> dict[str, tuple[Case, Layer]]:
    """The convolutions that are measured by themselves, by the names of their rows, and the case of each."""
    cases = {f"DCGAN-{size}": dcgan(size, 32, "fp32") for size in (32, 64, 128)}
    return {
        f"{name} {layer.name}": (case, layer)
        for name, case in cases.items()
        for network in layers(case)
        for layer in network
    }


def _convolutions(prefix: str, network: nn.Module, input: torch.Tensor) -> list[Layer]:
    found: list[Layer] = []

    def note(module, args, output) -> None:
        channels, sizes = (module.in_channels, module.out_channels), (args[0].shape[-1], output.shape[-1])
        name = f"{prefix}{len(found) + 1} {channels[0]}-{channels[1]} to {sizes[1]}x{sizes[1]}"
        geometry = (module.kernel_size[0], module.stride[0], module.padding[0])
        found.append(Layer(name, isinstance(module, nn.ConvTranspose2d), *channels, *geometry, *sizes))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(note)
    network(input)
    return found
