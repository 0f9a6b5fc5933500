"""Each convolution of the DCGAN networks in each pass, beside the library's, channels-last. GFLOP/s count the
multiplications of the definition, whatever a kernel saves."""

import pytest
import torch
from torch import nn

from fastgan.backends import use_backend
from fastgan.bench.cases import measured_layers
from fastgan.nn import ConvStack

WITHOUT = ("compiled",)  # a convolution alone stays the library's
LAYERS = measured_layers()
PASSES = ("forward", "input gradient", "weight gradient")


def one_pass(layer, batch: int, what: str, provider: str, device: torch.device):
    """The layer as a `ConvStack` of its own where a backend runs it, else as PyTorch's module."""
    torch.manual_seed(0)
    backend = "eager" if provider in ("eager", "tuned") else provider
    layout = torch.contiguous_format if provider == "eager" else torch.channels_last
    network = (nn.Sequential if backend == "eager" else ConvStack)(layer.module()).to(device, memory_format=layout)
    input = torch.randn(batch, layer.in_channels, layer.input_size, layer.input_size, device=device)
    input = input.contiguous(memory_format=layout).requires_grad_(what == "input gradient")
    network.requires_grad_(what == "weight gradient")

    def forward() -> torch.Tensor:
        with use_backend(backend):
            return network(input)

    if what == "forward":
        return forward
    output, leaves = forward(), [input] if what == "input gradient" else list(network.parameters())
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("what", PASSES)
def test_layer(pair, benchmark, batch, device, what, name, provider):
    benchmark.group = what
    case, layer = LAYERS[name]
    size = batch(case.batch_size)
    if size < case.batch_size and case.image_size > 32:
        pytest.skip("--quick: only the smallest networks' layers")
    run, reference = (one_pass(layer, size, what, p, device) for p in (provider, "tuned"))
    pair(run, reference, gflop=layer.gflop(size))
