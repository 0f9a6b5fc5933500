"""The CUDA backend on a real card: the same comparisons as on the host, by the tolerance rule, and in a graph."""

from itertools import chain, product

import pytest
import torch
import torch.nn.functional as F

from fastgan import backends, library, ops
from fastgan.ops import bn_act_eager as eager
from fastgan.tolerance import misses

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1, 7), (3, 65, 5, 3), (32, 128, 16, 16), (8, 3, 64, 64), (130, 24, 1, 1)]
FORMATS = [torch.channels_last, torch.contiguous_format]


@pytest.fixture(autouse=True)
def _library():
    library.load("cuda")


def check(name, *args):
    run = torch.ops.fastgan_cuda
    got = getattr(run, name)(*args)
    again = getattr(run, name)(*args)
    definition = backends.kernel("eager", name)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    reason = misses(got, definition(*args), definition(*wide))
    assert reason is None, f"{name}: {reason}"
    pairs = zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, again)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    return got


@pytest.mark.parametrize(("shape", "dtype", "form"), list(product(SHAPES, DTYPES, FORMATS)), ids=str)
def test_bn_act(shape, dtype, form):
    y, dz = (torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=form) for _ in range(2))
    mean, m2 = check("bn_stats", y + 3)
    given = (mean - 3, torch.rsqrt(m2 / (y.numel() // shape[1]) + 1e-5))
    given += (torch.linspace(-2, 2, shape[1], device="cuda"), torch.linspace(3, -1, shape[1], device="cuda"))
    check("bn_act", y, *given, 0.2)
    dz = eager.settle("bn_act_reduce", (dz, y, *given, 0.2))[0].contiguous(memory_format=form)
    sums = check("bn_act_reduce", dz, y, *given, 0.2)
    check("bn_act_backward", dz, y, *given, 0.2, *sums, y.numel() // shape[1])
    check("bn_act_backward", dz, y, *given, 0.2, None, None, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gan_bce(dtype):
    real, fake = (torch.randn(n, device="cuda").mul(10).to(dtype) for n in (64, 1000))
    check("gan_bce", real, fake, 0.9, 0.0)
    check("gan_bce", None, fake, 0.9, 1.0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_convolution(transposed, dtype):
    x = torch.randn(8, 16, 16, 64, device="cuda").to(dtype)
    weight = (torch.randn(96, 4, 4, 64, device="cuda") / 32).to(dtype)
    mean, scale, bias = torch.randn(3, 64, device="cuda")
    name = "conv_transpose_stats" if transposed else "conv_stats"
    third = 0 if transposed else 1
    operation = getattr(torch.ops.fastgan_cuda, name)
    y, mean_y, m2 = operation(x, weight, mean, scale, bias, 0.2, 2, 1, third)

    def library_result(x, weight, mean, scale, bias):
        z = F.leaky_relu(scale * (x.to(mean.dtype) - mean) + bias, 0.2).to(x.dtype).permute(0, 3, 1, 2)
        w = weight.permute(0, 3, 1, 2)
        if transposed:
            return F.conv_transpose2d(z, w.transpose(0, 1), stride=2, padding=1)
        return F.conv2d(z, w, stride=2, padding=1)

    own = library_result(x, weight, mean, scale, bias)
    truth = library_result(*(t.double() for t in (x, weight, mean, scale, bias)))
    stored = y.permute(0, 3, 1, 2)
    assert misses(stored, own, truth) is None
    assert misses((mean_y, m2), eager.stats(stored), eager.stats(stored.double())) is None


def test_adam_ema():
    lists = [[torch.randn(s, device="cuda") for s in ((5, 3), (4097,))] for _ in range(5)]
    lists[3] = [t.square() for t in lists[3]]
    own = [[t.clone() for t in tensors] for tensors in lists]
    step = torch.ones(1, device="cuda")
    ops.adam_ema(*lists, step, lr=0.01, ema_decay=0.9, backend="cuda")
    ops.adam_ema(*own, step, lr=0.01, ema_decay=0.9, backend="eager")
    for got, want in zip(chain(*lists), chain(*own), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_cuda_graph():
    """Capturing allocates nothing outside torch's pool and synchronises nothing, or it would raise."""
    y = torch.randn(4, 8, 6, 6, device="cuda").contiguous(memory_format=torch.channels_last)
    mean, m2 = torch.ops.fastgan_cuda.bn_stats(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.fastgan_cuda.bn_stats(y)
    y.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured[0], mean * 2)
    torch.testing.assert_close(captured[1], m2 * 4)


def test_bad_arguments_are_named():
    y = torch.randn(2, 64, 3, 3, device="cuda")
    good, short = torch.ones(64, device="cuda"), torch.ones(32, device="cuda")
    with pytest.raises(RuntimeError, match=r"bn_act: weight must be contiguous of shape \[C\] = \[64\], got \[32\]"):
        torch.ops.fastgan_cuda.bn_act(y, good, good, short, good, 0.2)
