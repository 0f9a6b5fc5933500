"""Each layer of DCGAN-32, -64 and -128 in each direction: the CPU kernels beside the library's, channels-last.

pytest -o addopts= benchmarks/bench_convolution.py --benchmark-only --benchmark-group-by=param:layer,param:direction
"""

import pytest
import torch
import torch.nn.functional as F

from fastgan import library

LAYERS = {  # C of the large side, K and size of the small side, batch
    "3-64 at 32": (3, 64, 32, 32),
    "64-128 at 16": (64, 128, 16, 32),
    "128-256 at 8": (128, 256, 8, 32),
    "256-512 at 4": (256, 512, 4, 32),
    "1-16 at 16": (1, 16, 16, 64),
    "16-32 at 8": (16, 32, 8, 64),
    "32-64 at 4": (32, 64, 4, 64),
}
DIRECTIONS = ("convolution", "input gradient", "weight gradient")


@pytest.mark.benchmark(group="4x4 stride-2 convolution")
@pytest.mark.parametrize("provider", ["library", "cpu"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_convolution(benchmark, layer, direction, provider):
    library.load("cpu")
    ops, (C, K, H, N) = torch.ops.fastgan_cpu, LAYERS[layer]
    last = {"memory_format": torch.channels_last}
    large, small = torch.randn(N, C, 2 * H, 2 * H).contiguous(**last), torch.randn(N, K, H, H).contiguous(**last)
    weight = torch.randn(K, C, 4, 4)
    theirs = weight.contiguous(**last)
    nothing = (None, None, 1.0)

    def library_backward(mask):
        arguments = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1, mask)
        return torch.ops.aten.convolution_backward(small, large, theirs, None, *arguments)

    run = {
        ("convolution", "library"): lambda: F.conv2d(large, theirs, None, 2, 1),
        ("input gradient", "library"): lambda: library_backward([True, False, False]),
        ("weight gradient", "library"): lambda: library_backward([False, True, False]),
        ("convolution", "cpu"): lambda: ops.convolve(large, *nothing, weight, False, H, H, False, *nothing, 0),
        ("input gradient", "cpu"): lambda: ops.convolve(
            small, *nothing, weight, True, 2 * H, 2 * H, False, *nothing, 0
        ),
        ("weight gradient", "cpu"): lambda: ops.weight_gradient(large, *nothing, small, *nothing, False, 0),
    }[direction, provider]
    benchmark(run)
    benchmark.extra_info["GFLOP of the definition"] = 2 * 16 * C * K * N * H * H / 1e9
