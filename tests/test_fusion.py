"""`fastgan.fuse` makes a user's own networks run on the fused operations and changes nothing else."""

import copy

import pytest
import torch
from stock_dcgan import discriminator as stock_discriminator
from stock_dcgan import generator as stock_generator
from torch import nn

import fastgan
from fastgan import backends
from fastgan.errors import FastganError
from fastgan.nn import ConvStack


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return stock_generator(8, 4, 3), stock_discriminator(4, 3)


def test_the_stock_networks_run_on_the_operations(networks):
    latents = torch.randn(2, 8, 1, 1)
    for network, sample in zip(networks, (latents, torch.randn(2, 3, 64, 64)), strict=True):
        plain = copy.deepcopy(network)
        names, main = list(network.state_dict()), network.main
        assert fastgan.fuse(network) is network
        assert network.main is main
        assert isinstance(main, ConvStack)
        assert list(network.state_dict()) == names
        with backends.use_backend("eager"):
            assert torch.equal(network(sample), plain(sample))
        torch.testing.assert_close(network(sample), plain(sample))
        for one, other in zip(network.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(one, other)
        backends.reset_counts()
        network(sample)
        assert sum(backends.counts().values()) > 0


def test_optimisers_and_hooks_stay(networks):
    generator, _ = networks
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    calls = []
    generator.main.register_forward_hook(lambda *_: calls.append(1))
    fastgan.fuse(generator)
    before = generator.main[0].weight.clone()
    generator(torch.randn(2, 8, 1, 1)).square().mean().backward()
    optimizer.step()
    assert calls == [1]
    assert not torch.equal(generator.main[0].weight, before)


def test_only_plain_sequentials_with_blocks_are_touched():
    class Own(nn.Sequential):
        pass

    convolution = lambda: nn.Conv2d(1, 1, 3)  # noqa: E731
    module = nn.ModuleList(
        [
            Own(convolution(), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU()),
            nn.Sequential(nn.Sequential(convolution(), nn.LeakyReLU(0.2)), nn.Tanh()),
        ]
    )
    fastgan.fuse(module)
    assert [type(m) for m in module] == [Own, nn.Sequential, nn.Sequential]
    assert type(module[2][0]) is ConvStack
    assert fastgan.fuse(module) is module  # a second call finds its own work


def test_nothing_to_fuse():
    with pytest.raises(FastganError, match=r"Linear has no nn.Sequential in which"):
        fastgan.fuse(nn.Linear(1, 1))
