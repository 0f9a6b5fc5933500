"""The C++ kernels of bn_act and gan_bce on CPUs against the definition, kernel by kernel, by the tolerance rule."""

from types import SimpleNamespace

import pytest
import torch
from test_bn_act_triton import CASES, SPLIT, arguments, seeds, verdict
from test_gan_bce import logits
from tolerance import assert_as_right_as_torch

from fastgan import backends

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shared arguments are on the card there")


@pytest.fixture(scope="module")
def kernels():
    if (reason := backends.why_not("cpu", device="cpu")) is not None:
        pytest.skip(reason)
    return SimpleNamespace(**{name: backends.kernel("cpu", name) for name in (*SPLIT, "gan_bce")})


@pytest.mark.parametrize("slope", [0.2, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@pytest.mark.parametrize("name", SPLIT)
def test_kernel(kernels, name, shape, layout, dtype, slope):
    several = [arguments(name, shape, layout, dtype, slope, seed) for seed in seeds(shape, name)]
    assert verdict(kernels, name, several) is None


@pytest.mark.parametrize("target", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gan_bce(kernels, dtype, target):
    columns = []
    for seed in range(8):
        args = (logits(37, 10.0, seed, dtype), logits(64, 10.0, seed + 99, dtype), target, 1 - target)
        exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
        eager = backends.kernel("eager", "gan_bce")
        columns.append([kernels.gan_bce(*args), eager(*args), eager(*exact)])
    assert_as_right_as_torch(
        *([torch.cat([run[i].flatten() for run in runs]) for i in range(3)] for runs in zip(*columns, strict=True))
    )
