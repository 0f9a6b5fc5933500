"""gan_bce: the definition, both backends, gradients of every order, one pass, torch's machinery, clear errors."""

import math
from importlib import import_module

import fastgan.kernels.gan_bce as kernels
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_right_as_torch
from torch.autograd import gradcheck, gradgradcheck
from triton_device import BACKENDS, DEVICE, MARKS

from fastgan import backends
from fastgan.ops import gan_bce, gan_bce_generator

pytestmark = MARKS
module = import_module("fastgan.ops.gan_bce")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def logits(n, scale=3.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_textbook(backend, dtype):
    real, fake = logits(7, seed=1, dtype=dtype), logits(5, seed=2, dtype=dtype)
    p, q = real.sigmoid(), fake.sigmoid()
    loss_real, loss_fake, d_real, d_fake = gan_bce(real, fake, backend=backend)
    torch.testing.assert_close(loss_real, -p.log().mean())
    torch.testing.assert_close(loss_fake, -(1 - q).log().mean())
    torch.testing.assert_close((d_real, d_fake), (p.mean(), q.mean()))
    smooth, *_ = gan_bce(real, fake, real_target=0.9, backend=backend)
    torch.testing.assert_close(smooth, -(0.9 * p.log() + 0.1 * (1 - p).log()).mean())
    loss, d_fake = gan_bce_generator(fake, backend=backend)
    torch.testing.assert_close(loss, -q.log().mean())
    loss, _ = gan_bce_generator(fake, saturating=True, backend=backend)
    torch.testing.assert_close(loss, (1 - q).log().mean())
    torch.testing.assert_close(d_fake, q.mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_half_alone(backend):
    x = logits(6)
    assert gan_bce(None, x, backend=backend)[::2] == (None, None)
    assert gan_bce(x, None, backend=backend)[1::2] == (None, None)
    both = gan_bce(x, x, backend=backend)
    torch.testing.assert_close(gan_bce(x, None, backend=backend)[0], both[0])
    torch.testing.assert_close(gan_bce(None, x, backend=backend)[1], both[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_order_of_gradient(backend):
    real, fake = logits(4).requires_grad_(), logits(3, seed=1).requires_grad_()

    def losses(real, fake):
        return gan_bce(real, fake, real_target=0.9, fake_target=0.1, backend=backend)[:2]

    def penalty(real, fake):
        return torch.autograd.grad(sum(losses(real, fake)) ** 2, (real, fake), create_graph=True)

    assert gradcheck(losses, (real, fake))
    assert gradgradcheck(losses, (real, fake))
    assert gradgradcheck(penalty, (real, fake))
    for saturating in (False, True):
        generator = lambda x, s=saturating: gan_bce_generator(x, saturating=s, backend=backend)[0]  # noqa: E731
        assert gradcheck(generator, (fake,))
        assert gradgradcheck(generator, (fake,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_d_believes_is_detached(backend):
    x = logits(4).requires_grad_()
    *_, d_real, d_fake = gan_bce(x, x, backend=backend)
    assert not d_real.requires_grad
    assert not d_fake.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("target", [1.0, 0.9, 0.0])
def test_kernel_is_as_right_as_pytorch(dtype, scale, target):
    """Over eight batches together, as the mean of one may be lucky."""
    eager, columns = backends.kernel("eager", "gan_bce"), []
    for seed in range(8):
        args = (logits(37, scale, seed, dtype), logits(64, scale, seed + 99, dtype), target, 1 - target)
        exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
        columns.append([kernels.gan_bce(*args), eager(*args), eager(*exact)])
    got, own, truth = (
        [torch.cat([run[i].flatten() for run in runs]) for i in range(3)] for runs in zip(*columns, strict=True)
    )
    assert_as_right_as_torch(got, own, truth)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("n", [1, 3, 4096, 4097])
def test_any_number_of_logits(n, backend):
    x = logits(n)
    torch.testing.assert_close(gan_bce(x, x, backend=backend), gan_bce(x, x, backend="eager"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_hundred_are_exact_and_their_gradients_finite(backend):
    x = torch.tensor([100.0, -100.0], device=DEVICE, requires_grad=True)
    right, wrong, *_ = gan_bce(x[:1], x[:1], backend=backend)
    assert wrong.item() == 100.0
    assert right.item() == pytest.approx(math.exp(-100), rel=1e-3, abs=1e-44)
    (g,) = torch.autograd.grad(right + wrong, x)
    assert torch.isfinite(g).all()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_show_in_the_loss_where_they_do_in_pytorch(bad, backend):
    x = torch.tensor([0.5, bad, -1.0], device=DEVICE)
    for target in (0.0, 0.9, 1.0):
        loss = gan_bce(None, x, fake_target=target, backend=backend)[1]
        own = F.binary_cross_entropy_with_logits(x, torch.full_like(x, target))
        if (
            backend == "cpu"
        ):  # as the definition: where PyTorch has 0 times infinity, the term of target 0 or 1 is left out
            own = gan_bce(None, x, fake_target=target, backend="eager")[1]
        if math.isnan(bad):
            assert loss.isnan()
        elif not torch.isfinite(own):
            assert not torch.isfinite(loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_logits_give_an_fp32_loss_and_a_half_gradient(backend):
    x = torch.randn(8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    loss, d_fake = gan_bce_generator(x, backend=backend)
    assert loss.dtype == d_fake.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_layout(backend):
    x = torch.randn(3, 1, 4, 6, device=DEVICE)[..., ::2].requires_grad_()
    loss = gan_bce(x, x, backend=backend)[0]
    (g,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(g, (x.detach().sigmoid() - 1) / x.numel())


def test_the_same_bits_and_one_launch(monkeypatch):
    x, launches = logits(5000, dtype=torch.float32), []
    first = gan_bce(x, x, backend="triton")
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args, **meta: (launches.append(args[1]), launch(*args, **meta))[1])
    second = gan_bce(x, x, backend="triton")
    assert launches == [(1,)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_bytes_kept_are_the_logits_and_one_fp32_number_each(backend):
    x, y = (torch.randn(1000, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        gan_bce(x, y, backend=backend)
    assert sum(t.numel() * t.element_size() for t in kept.values()) == 2 * 1000 * (2 + 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", ["both", "real", "fake"])
def test_opcheck(half, backend):
    x, y = torch.randn(6, device=DEVICE, requires_grad=True), torch.randn(4, device=DEVICE, requires_grad=True)
    real, fake = (x if half != "fake" else None), (y if half != "real" else None)
    torch.library.opcheck(torch.ops.fastgan.gan_bce.default, (real, fake, 0.9, 0.0, backend))


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow), "export"])
def test_compile_and_export(mode):
    class Loss(torch.nn.Module):
        def forward(self, real, fake):
            loss_real, loss_fake, d_real, _ = gan_bce(real, fake)
            return loss_real + loss_fake + gan_bce_generator(fake)[0], d_real

    x, y = torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE)
    expected = Loss()(x, y)
    if mode != "export":
        compiled = torch.compile(Loss(), fullgraph=True, backend=mode)
        x.requires_grad_()
        got = compiled(x, y)
        (g,) = torch.autograd.grad(got[0], x)
        torch.testing.assert_close(g, (x.detach().sigmoid() - 1) / 6)
    else:
        got = torch.export.export(Loss(), (x, y)).module()(x, y)
    torch.testing.assert_close(tuple(t.detach() for t in got), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    x = torch.randn(16, device=DEVICE) * 20
    expected = gan_bce(x, x)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(gan_bce(x, x, backend=backend), expected)


def test_errors():
    with pytest.raises(ValueError, match="expected real_logits, fake_logits or both, got None and None"):
        gan_bce(None, None)
    with pytest.raises(ValueError, match=r"real_logits are torch.float32 on cpu, fake_logits torch.float64"):
        gan_bce(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    x, whole = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    for halves, got in (((whole, whole), "torch.int64 and torch.int64"), ((None, whole), "torch.int64"),
                        (([0.0], x), "list and torch.float32"), ((x, [0.0]), "torch.float32 and list")):  # fmt: skip
        with pytest.raises(ValueError, match=f"logits must be floating tensors, got {got}"):
            gan_bce(*halves)
    for target in (3.0, -0.1, math.nan):
        for name in ("real_target", "fake_target"):
            with pytest.raises(ValueError, match=rf"targets must be in \[0, 1\], got .*{name}={target}"):
                gan_bce(x, x, **{name: target})


PLANTED = {
    "p - t with the wrong sign": ("(1.0 - TARGET) * p - TARGET * q", "(1.0 - TARGET) * p + TARGET * q"),
    "mean forgotten": ("- TARGET * q) / n", "- TARGET * q)"),
    "mask without effect": ("losses += tl.where(inside, tl.where(x == x, loss, x), 0.0)", "losses += loss"),
    "log1p left out": ("tl.maximum(-x, 0.0) + log1p", "tl.maximum(-x, 0.0)"),
    "sigmoid of -x": ("p = tl.where(x < 0, far, near)", "p = tl.where(x < 0, near, far)"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(planted_kernels, bug):
    wrong = planted_kernels(kernels, *PLANTED[bug])
    args = (logits(5), logits(3), 0.9, 0.0)
    got, truth = wrong.gan_bce(*args), backends.kernel("eager", "gan_bce")(*args)
    assert not all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, truth, strict=True))
