"""The DCGAN networks: shapes, initialisation, exchange of weights with PyTorch's example, clear errors."""

import pytest
import torch
from stock_dcgan import discriminator as stock_discriminator
from stock_dcgan import generator as stock_generator

from fastgan.backends import use_backend
from fastgan.errors import FastganError
from fastgan.nn import Discriminator, Generator


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shapes(size, channels):
    images = Generator(size, channels, 5, 2)(torch.randn(2, 5))
    assert images.shape == (2, channels, size, size)
    assert images.abs().max() <= 1
    assert Discriminator(size, channels, 2)(images).shape == (2,)


def test_latents_may_be_maps_of_one_pixel():
    generator = Generator(16, 1, 5, 2).eval()
    z = torch.randn(3, 5)
    assert torch.equal(generator(z), generator(z[:, :, None, None]))


def test_no_layer_is_wider_than_eight_times_the_base():
    widths = {module.num_features for module in Generator(512, 3, 8, 2).modules() if hasattr(module, "num_features")}
    assert widths == {2, 4, 8, 16}


def test_weights_move_to_and_from_the_stock_example():
    torch.manual_seed(0)
    z, x = torch.randn(2, 100, 1, 1), torch.randn(2, 3, 64, 64)
    stock_g, stock_d = stock_generator(width=4).eval(), stock_discriminator(width=4).eval()
    g, d = Generator(base_channels=4).eval(), Discriminator(base_channels=4).eval()
    assert not torch.allclose(g(z), stock_g(z))  # before: other weights, so the equality below means something
    g.load_state_dict(stock_g.state_dict())
    d.load_state_dict(stock_d.state_dict())
    with use_backend("eager"):
        assert torch.equal(g(z), stock_g(z))
        assert torch.equal(d(x).sigmoid(), stock_d(x).flatten())
    stock_g.load_state_dict(Generator(base_channels=4).state_dict())
    stock_d.load_state_dict(Discriminator(base_channels=4).state_dict())


def test_the_stock_widths_are_the_defaults():
    assert list(Generator().state_dict()) == list(stock_generator().state_dict())
    shapes = [tuple(value.shape) for value in Discriminator().state_dict().values()]
    assert shapes == [tuple(value.shape) for value in stock_discriminator().state_dict().values()]


def test_initialisation_is_dcgans():
    torch.manual_seed(0)
    generator = Generator(64, 3, 100, 64)
    convolution, norm = generator.main[3], generator.main[1]
    assert abs(convolution.weight.mean().item()) < 1e-3
    assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not norm.bias.any()


def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    discriminator = Discriminator(16, 1, 8, spectral_norm=True)
    with torch.no_grad():
        for _ in range(50):
            discriminator(torch.randn(2, 1, 16, 16))
    for layer in discriminator.main:
        if isinstance(layer, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1.0, rel=0.02)


def test_the_slope_is_the_callers():
    slopes = {m.negative_slope for m in Generator(16, 1, 4, 2, negative_slope=0.3).modules() if hasattr(m, "inplace")}
    assert slopes == {0.3}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Generator(48), "power of two among .*got 48"),
        (lambda: Generator(8), "got 8"),
        (lambda: Discriminator(1024), "got 1024"),
        (lambda: Generator(64, 2), "channels must be 1 .* got 2"),
        (lambda: Generator(64, 3, 0), "latent_dim must be at least 1, got 0"),
        (lambda: Discriminator(64, 3, 0), "base_channels must be at least 1, got 0"),
        (lambda: Generator(16, 1, 8, 2)(torch.zeros(2, 7)), r"\[N, 8\].*got \[2, 7, 1, 1\]"),
        (lambda: Discriminator(16, 1, 2)(torch.zeros(2, 3, 16, 16)), r"\[N, 1, 16, 16\], got \[2, 3, 16, 16\]"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(build, message):
    with pytest.raises(FastganError, match=message):
        build()
