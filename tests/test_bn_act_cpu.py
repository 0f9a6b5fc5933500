"""The C++ kernels of bn_act and gan_bce on CPUs against the definition, kernel by kernel, by the tolerance rule."""

from types import SimpleNamespace

import pytest
import torch
from test_bn_act_triton import CASES, SPLIT, arguments, seeds, verdict
from test_gan_bce import logits
from tolerance import assert_as_right_as_torch

from fastgan import backends
from fastgan.ops import bn_act

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


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_whole_kernels_are_the_definition_to_the_second_gradient(training, layout):
    """The operation in fp64 on a strided input: output, statistics, gradients, and gradients of these."""
    found = []
    for backend in ("cpu", "eager"):
        torch.manual_seed(3)
        y = torch.randn(3, 5, 4, 7, dtype=torch.float64).to(memory_format=layout)[..., ::2].requires_grad_()
        weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
        versions = mean._version, var._version
        backends.reset_counts()
        z = bn_act(y, mean, var, weight, bias, training=training, momentum=0.3, eps=0.1, backend=backend)
        first = torch.autograd.grad(
            (z * torch.arange(z.numel()).view_as(z)).sum(), (y, weight, bias), create_graph=True
        )
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (y, weight, bias))
        assert {name for name, _ in backends.counts()} == {backend}
        if backend == "cpu":  # F.batch_norm does not say that it changes them
            assert (mean._version > versions[0] and var._version > versions[1]) == training
        found.append([t.detach() for t in (z, mean, var, *first, *second)])
    for mine, own in zip(*found, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-10)


def test_whole_kernels_refuse_what_does_not_fit_by_name():
    for changes, message in (
        ({"weight": torch.ones(4)}, r"weight must have shape \[C\] = \[3\], got \[4\]"),
        ({"bias": torch.ones(3, dtype=torch.float64)}, "bias must be torch.float32"),
        ({"input": torch.randn(1, 3)}, "more than 1 value per channel"),
    ):
        given = {"input": torch.randn(2, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3), **changes}
        with pytest.raises(ValueError, match=message):
            bn_act(**given, training=True, backend="cpu")
