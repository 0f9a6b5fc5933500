"""The DCGAN networks (Radford, Metz, Chintala, 2016, arXiv:1511.06434).

Both are one `ConvStack` (an `nn.Sequential` that fuses) called `main` with the module order of PyTorch's stock DCGAN
example, so at 64 pixels a `state_dict` moves between the two unchanged.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastgan.errors import FastganError
from fastgan.nn.stack import ConvStack

IMAGE_SIZES = (16, 32, 64, 128, 256, 512)
CHANNELS = (1, 3, 4)
_WIDEST = 8  # no layer is wider than this times base_channels: at 512 pixels doubling on would give 4,096 channels


def _hidden_widths(image_size: int, channels: int, base_channels: int) -> list[int]:
    """Channels of the hidden feature maps, from image_size / 2 pixels (narrow) down to 4 x 4 (wide)."""
    if image_size not in IMAGE_SIZES:
        raise FastganError(f"image_size must be a power of two among {IMAGE_SIZES}, got {image_size}")
    if channels not in CHANNELS:
        raise FastganError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGB and transparency), got {channels}")
    if base_channels < 1:
        raise FastganError(f"base_channels must be at least 1, got {base_channels}")
    levels = image_size.bit_length() - 3
    return [base_channels * min(2**level, _WIDEST) for level in range(levels)]


def dcgan_init_(module: nn.Module) -> None:
    """Draw the weights of one module as DCGAN does, in place; use it with `net.apply(dcgan_init_)`.

    Convolutions: normal(0, 0.02), bias 0. BatchNorm: weight normal(1, 0.02), bias 0. Others stay as they are.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _activation(negative_slope: float) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace=True) if negative_slope else nn.ReLU(inplace=True)


class Generator(nn.Module):
    """Maps latents to images: transposed convolution, BatchNorm and ReLU, doubling the size from 4 x 4.

    Args:
        image_size: pixels on a side, a power of two from 16 to 512.
        channels: 1, 3 or 4.
        latent_dim: length of a latent, at least 1.
        base_channels: width of the last hidden layer; each layer before it is twice as wide, up to 8 times.
        negative_slope: of the hidden activations; 0 is ReLU.

    Raises:
        FastganError: a size out of the ranges above, or latents of another shape in `forward`.

    Differentiable twice.
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        latent_dim: int = 100,
        base_channels: int = 64,
        *,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise FastganError(f"latent_dim must be at least 1, got {latent_dim}")
        widths = _hidden_widths(image_size, channels, base_channels)[::-1]
        self.image_size, self.channels, self.latent_dim = image_size, channels, latent_dim
        layers: list[nn.Module] = []
        for before, width in zip([latent_dim, *widths], widths, strict=False):
            stride, padding = (2, 1) if layers else (1, 0)  # the first layer makes 4 x 4 from 1 x 1
            layers += [
                nn.ConvTranspose2d(before, width, 4, stride, padding, bias=False),
                nn.BatchNorm2d(width),
                _activation(negative_slope),
            ]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = ConvStack(*layers)
        self.apply(dcgan_init_)

    def forward(self, latents: Tensor) -> Tensor:
        """`latents` [N, latent_dim] or [N, latent_dim, 1, 1] to images [N, channels, size, size] in [-1, 1]."""
        if latents.dim() == 2:
            latents = latents[:, :, None, None]
        if latents.dim() != 4 or tuple(latents.shape[1:]) != (self.latent_dim, 1, 1):
            raise FastganError(
                f"Generator: latents must be [N, {self.latent_dim}] or [N, {self.latent_dim}, 1, 1], "
                f"got {list(latents.shape)}"
            )
        return self.main(latents)


class Discriminator(nn.Module):
    """Maps images to logits of "real": strided convolution, BatchNorm and LeakyReLU, halving down to 4 x 4.

    Args:
        image_size: pixels on a side, a power of two from 16 to 512.
        channels: 1, 3 or 4.
        base_channels: width of the first layer; each layer after it is twice as wide, up to 8 times.
        negative_slope: of the hidden activations.
        spectral_norm: divide each weight by its largest singular value (Miyato et al., 2018,
            arXiv:1802.05957). The parameters are then named `main.0.parametrizations.weight...`.

    Raises:
        FastganError: a size out of the ranges above, or images of another shape in `forward`.

    Differentiable twice.
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        base_channels: int = 64,
        *,
        negative_slope: float = 0.2,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = _hidden_widths(image_size, channels, base_channels)
        self.image_size, self.channels = image_size, channels
        layers: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 4, 2, 1, bias=False),
            _activation(negative_slope),
        ]
        for before, width in pairwise(widths):
            layers += [
                nn.Conv2d(before, width, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width),
                _activation(negative_slope),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False))
        self.main = ConvStack(*layers)
        self.apply(dcgan_init_)
        if spectral_norm:
            normalise: Callable[[nn.Module], nn.Module] = nn.utils.parametrizations.spectral_norm
            for layer in self.main:
                if isinstance(layer, nn.Conv2d):
                    normalise(layer)

    def forward(self, images: Tensor) -> Tensor:
        """`images` [N, channels, size, size] in [-1, 1] to logits [N]; sigmoid(logit) is D(x)."""
        expected = (self.channels, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise FastganError(
                f"Discriminator: images must be [N, {', '.join(map(str, expected))}], got {list(images.shape)}"
            )
        return torch.flatten(self.main(images))
