"""Where the CPU's fused stack is faster than eager PyTorch: forward and backward of a block for a grid of shapes.

python benchmarks/stack_shapes.py [--seconds 0.1]

Each line is a block (convolution, BatchNorm, LeakyReLU; every gradient), as `ConvStack` on the kernels and as
`nn.Sequential`, both channels-last, turn by turn in one process: the median over the rounds of eager's time over the
stack's, with its 95 % confidence interval. `_own` in `fastgan/nn/stack_cpu.py` decides for single convolutions.
"""

import argparse
import gc
import statistics
from itertools import product

import torch
from torch import nn

from fastgan.backends import use_backend
from fastgan.bench.pairing import interleave, ratio, seconds
from fastgan.nn import ConvStack

DOWN = [(1, 16), (3, 64), (16, 32), (32, 64), (64, 128), (256, 512)]  # channels in and out of a strided convolution
SIZES = (4, 8, 16, 32)
BATCHES = (1, 4, 32)
GFLOP = 3  # in a pass at most, to keep the grid short


def block(kind: str, channels: tuple[int, int]) -> list[nn.Module]:
    """`down` and `up` are the 4x4 stride-2 convolutions of a DCGAN, `3x3` one that stays the library's."""
    to = channels[::-1] if kind == "up" else channels
    if kind == "3x3":
        convolution: nn.Module = nn.Conv2d(*to, 3, 1, 1, bias=False)
    else:
        convolution = (nn.ConvTranspose2d if kind == "up" else nn.Conv2d)(*to, 4, 2, 1, bias=False)
    return [convolution, nn.BatchNorm2d(to[1]), nn.LeakyReLU(0.2)]


def training_pass(network: nn.Module, input: torch.Tensor, backend: str | None):
    leaves = [input, *network.parameters()]
    with torch.no_grad():
        gradient = torch.randn_like(network(input))

    def run() -> None:
        with use_backend(backend):
            torch.autograd.grad(network(input), leaves, gradient)

    return run


def measure(kind: str, channels: tuple[int, int], size: int, batch: int, seconds_each: float):
    torch.manual_seed(0)
    modules = block(kind, channels)
    input = torch.randn(batch, modules[0].in_channels, size, size).contiguous(memory_format=torch.channels_last)
    input.requires_grad_(True)
    fused, eager = (
        training_pass(make(*modules).to(memory_format=torch.channels_last), input, backend)
        for make, backend in ((ConvStack, None), (nn.Sequential, "eager"))
    )
    device = input.device
    once = max(seconds(f, 1, device) for f in (fused, eager, fused, eager))
    rounds = max(7, min(100, int(seconds_each / 2 / once)))
    times = interleave({"fused": fused, "eager": eager}, rounds, 1, device)
    return statistics.median(times["fused"]), ratio(times["eager"], times["fused"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="about as long each pair is measured")
    parser.add_argument("--only", default="", help="part of a line's name")
    arguments = parser.parse_args()
    gc.freeze()  # collections between rounds need not walk all of PyTorch
    for kind, channels, size, batch in product(("down", "up", "3x3"), DOWN, SIZES, BATCHES):
        gflop = 2e-9 * batch * size * size * channels[0] * channels[1] * (9 if kind == "3x3" else 4)
        name = f"{kind} {channels[0]}-{channels[1]} {size}x{size} batch {batch}"
        if gflop > GFLOP or arguments.only not in name:
            continue
        time, (median, low, high) = measure(kind, channels, size, batch, arguments.seconds)
        print(f"{name:<32}{1e3 * time:9.3f} ms {median:6.2f} [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
