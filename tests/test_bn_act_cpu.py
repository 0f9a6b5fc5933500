"""The C++ kernels of bn_act and gan_bce on CPUs against the definition, kernel by kernel, by the tolerance rule."""

from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from test_bn_act_triton import CASES, SPLIT, arguments, seeds, verdict
from test_gan_bce import logits
from tolerance import assert_as_right_as_torch
from torch.autograd import gradcheck, gradgradcheck

from fastgan import backends
from fastgan.ops import bn_act
from fastgan.tolerance import misses

module = import_module("fastgan.ops.bn_act")

WHOLE = ("bn_act_train", "bn_act_eval", "bn_act_grad")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shared arguments are on the card there")


@pytest.fixture(scope="module")
def kernels():
    if (reason := backends.why_not("cpu", device="cpu")) is not None:
        pytest.skip(reason)
    return SimpleNamespace(**{name: backends.kernel("cpu", name) for name in (*SPLIT, *WHOLE, "gan_bce")})


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
        ({"input": torch.randn(1, 3), "running_mean": None, "running_var": None}, "more than 1 value per channel"),
        ({"running_var": None}, "go together, got one of them"),
        ({"running_var": None, "training": False}, "go together, got one of them"),
        ({"running_mean": None, "running_var": None, "training": False}, "required when training=False"),
        ({"eps": 0.0}, "eps must be positive in training"),
    ):
        given = {"input": torch.randn(2, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        with pytest.raises(ValueError, match=message):
            bn_act(**{**given, "training": True, **changes}, backend="cpu")


# --- forward and backward in one call each --------------------------------------------------------------------------

EPS, MOMENTUM = 1e-2, 0.3  # as large as to show in a result


def whole_arguments(name, shape, layout, dtype, slope=0.2, seed=0, half_parameters=False):
    """Of `name`; the parameters and running statistics are in the activation's dtype or the statistics'."""
    _, y, mean, invstd, weight, bias, _ = arguments("bn_act_reduce", shape, layout, dtype, slope, seed)
    dz, var = torch.randn_like(y), invstd**-2
    if half_parameters:
        mean, var, weight, bias = (t.to(dtype) for t in (mean, var, weight, bias))
    if name == "bn_act_train":
        return y, weight, bias, mean, var, MOMENTUM, EPS, slope
    if name == "bn_act_eval":
        return y, weight, bias, mean, var, EPS, slope
    return dz, y, weight, bias, mean, var, EPS, slope, True, True, True


def definition(name, *args):
    """The whole operation made of the definition's split operations: what other backends run."""
    if name == "bn_act_eval":
        return (module._eval(*args, "eager"),)
    if name == "bn_act_grad":
        return module._grad(*args, "eager")
    y, weight, bias, running_mean, running_var, momentum, eps, slope = args
    moved = running_mean.clone(), running_var.clone()
    return *module._train(y, weight, bias, eps, slope, "eager", *moved, momentum), *moved


def by_kernel(run, name, *args):
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    out = run(*args)
    return (*out, *args[3:5]) if name == "bn_act_train" else out if isinstance(out, tuple) else (out,)


def whole_verdict(run, name, several):
    """Why the whole kernel `run` misses, or None."""
    wide = [[a.double() if isinstance(a, torch.Tensor) else a for a in args] for args in several]
    columns = (
        [by_kernel(run, name, *args) for args in several],
        [definition(name, *args) for args in several],
        [definition(name, *args) for args in wide],
    )
    return misses(*(tuple(torch.cat([t.flatten() for t in c]) for c in zip(*runs, strict=True)) for runs in columns))


@pytest.mark.parametrize("slope", [0.2, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_kernel(kernels, name, shape, layout, dtype, slope):
    several = [whole_arguments(name, shape, layout, dtype, slope, seed) for seed in seeds(shape, "bn_stats")]
    assert whole_verdict(getattr(kernels, name), name, several) is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_kernel_with_parameters_in_bfloat16(kernels, name, layout):
    several = [
        whole_arguments(name, (2, 3, 5, 7), layout, torch.bfloat16, seed=seed, half_parameters=True)
        for seed in range(22)
    ]
    assert whole_verdict(getattr(kernels, name), name, several) is None


def without_a_term(run, dz, *args):
    return run(dz, *args[:-3], False, *args[-2:])


def moved_twice(run, y, weight, bias, mean, var, *rest):
    run(y, weight, bias, mean, var, *rest)
    return run(y, weight, bias, mean, var, *rest)


def biased(run, y, weight, bias, mean, var, momentum, *rest):
    before, n = var.clone(), y.numel() // y.shape[1]
    out = run(y, weight, bias, mean, var, momentum, *rest)
    var.copy_((1 - momentum) * before + (var - (1 - momentum) * before) * (n - 1) / n)
    return out


def no_eps(run, *args):
    return run(*(0.0 if a is EPS else a for a in args))


def slope_with_the_wrong_sign(run, *args):
    return run(*(-a if isinstance(a, float) and a == 0.2 else a for a in args))


def weight_left_out(run, *args):
    at = 2 if args[-1] is True else 1
    return run(*args[:at], None, *args[at + 1 :])


MISTAKES = [
    *((name, bug) for name in WHOLE for bug in (no_eps, slope_with_the_wrong_sign, weight_left_out)),
    ("bn_act_train", moved_twice), ("bn_act_train", biased), ("bn_act_grad", without_a_term),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mistake"), MISTAKES, ids=lambda x: getattr(x, "__name__", x))
def test_a_planted_mistake_is_caught(kernels, name, mistake):
    several = [whole_arguments(name, (2, 3, 5, 7), "channels_last", torch.float32, seed=seed) for seed in range(22)]
    right = getattr(kernels, name)
    assert whole_verdict(right, name, several) is None
    assert whole_verdict(partial(mistake, right), name, several) is not None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_every_order_through_the_kernels(kernels, layout, training):
    torch.manual_seed(0)
    y = torch.randn(3, 2, 2, 2, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def f(y, weight, bias):
        return bn_act(y, mean.clone(), var.clone(), weight, bias, training=training, backend="cpu")

    backends.reset_counts()
    assert gradcheck(f, (y, weight, bias))
    assert gradgradcheck(f, (y, weight, bias))
    ran = backends.counts()
    forward = "bn_act_train" if training else "bn_act_eval"
    assert ran["cpu", forward] > 0
    assert ran["cpu", "bn_act_grad"] > 0
    assert all(backend == "cpu" for backend, _ in ran)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", WHOLE)
def test_the_same_bits_for_any_number_of_threads(kernels, name, layout):
    """Of several tasks, the last of them ragged."""
    args, before, results = whole_arguments(name, (5, 20, 61, 67), layout, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(by_kernel(getattr(kernels, name), name, *args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_gan_bce_has_the_same_bits_for_any_number_of_threads(kernels):
    args, before, results = (logits(40001), logits(9, seed=1), 1.0, 0.0), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(kernels.gan_bce(*args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    torch.testing.assert_close(results[0], backends.kernel("eager", "gan_bce")(*args))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slope", [0.2, 0.0])
def test_nan_and_infinity_are_where_pytorch_has_them(kernels, slope, training, bad):
    """But for ReLU's gradient at a NaN itself, where all kernels take the slope and PyTorch passes the gradient on."""
    x = torch.randn(2, 3, 4, 4)
    x[1, 1, 2, 3] = bad
    runs = []
    for backend in ("eager", "cpu"):
        leaf, mean, var = x.clone().requires_grad_(), torch.zeros(3), torch.ones(3)
        z = bn_act(leaf, mean, var, training=training, negative_slope=slope, backend=backend)
        (gradient,) = torch.autograd.grad(z.sum(), leaf)
        if slope == 0 and bad != bad and not training:
            gradient[1, 1, 2, 3] = 0
        runs.append((z, mean, var, gradient))
    for own, got in zip(*runs, strict=True):
        torch.testing.assert_close(got, own, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("slope", [0.2, 0.0])
def test_gradients_that_are_not_finite_go_where_pytorchs_go(kernels, slope, layout, training, bad):
    """ReLU's dead units pass nothing on; at slope 0.2 everything that depends on it shows it."""
    x, runs = torch.randn(2, 3, 4, 4).to(memory_format=layout), []
    x[1, 1, 2, 3] = -9
    dz = torch.randn(2, 3, 4, 4)
    dz[1, 1, 2, 3] = bad
    for backend in ("eager", "cpu"):
        leaves = [t.clone().requires_grad_() for t in (x, torch.ones(3), torch.zeros(3))]
        how = {"training": training, "negative_slope": slope, "backend": backend}
        z = bn_act(leaves[0], torch.zeros(3), torch.ones(3), *leaves[1:], **how)
        runs.append(torch.autograd.grad(z, leaves, dz))
    for own, got in zip(*runs, strict=True):
        assert torch.equal(got.isfinite(), own.isfinite())
        if slope == 0:
            assert got.isfinite().all()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_one_channel_is_one_row_in_either_layout(kernels, layout):
    """The same bits as of the same numbers in a row: as columns of one value they took thirty times as long."""
    y, dz = (torch.randn(3, 1, 20, 30).to(memory_format=layout) for _ in range(2))
    args = (torch.ones(1), torch.zeros(1))
    row = kernels.bn_act_train(y.reshape(1, 1, -1), *args, None, None, 0.1, 1e-5, 0.2)
    own = kernels.bn_act_train(y, *args, None, None, 0.1, 1e-5, 0.2)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(own, row, strict=True))
    rest = (*args, own[1], own[2], 1e-5, 0.2, True, True, True)
    row, own = kernels.bn_act_grad(dz.reshape(1, 1, -1), y.reshape(1, 1, -1), *rest), kernels.bn_act_grad(dz, y, *rest)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(own, row, strict=True))


def test_gan_bce_in_fp32_over_the_whole_range(kernels):
    """Each logit alone, where nothing averages out: a few ulp, down to the subnormal numbers."""
    eager = backends.kernel("eager", "gan_bce")
    for x in torch.cat([torch.linspace(-104, 104, 417), torch.linspace(-3, 3, 121)]):
        stats, _, grad = kernels.gan_bce(None, x[None], 1.0, 1.0)
        truth, _, slope = eager(None, x[None].double(), 1.0, 1.0)
        torch.testing.assert_close(stats[1::2].double(), truth[1::2], rtol=5e-7, atol=3e-45)
        torch.testing.assert_close(grad.double(), -(-x[None].double()).sigmoid(), rtol=5e-7, atol=3e-45)
        assert slope.shape == grad.shape


@pytest.mark.parametrize("changes", [{3: None}, {1: torch.ones(4)}, {2: torch.ones(3, dtype=torch.float64)}])
def test_wrong_arguments_are_refused(kernels, changes):
    args = list(whole_arguments("bn_act_train", (2, 3, 5, 7), "contiguous", torch.float32))
    for at, value in changes.items():
        args[at] = value
    with pytest.raises(RuntimeError, match=r"bn_act_train: (running_mean and|weight must|bias must)"):
        kernels.bn_act_train(*args)


@pytest.mark.parametrize("target", [1.0, 0.9, 0.0])
def test_gan_bce_is_exact_in_fp64_over_the_whole_range(kernels, target):
    """Tiny losses and saturated logits by their relative error: not a digit may be lost to cancellation."""
    for x in torch.cat(
        [torch.linspace(-745, 745, 241), torch.linspace(-3, 3, 61), torch.tensor([-1e300, 1e300])]
    ).double():
        stats, _, grad = kernels.gan_bce(None, x[None], 1.0, target)
        own, _, _ = backends.kernel("eager", "gan_bce")(None, x[None], 1.0, target)
        slope = (1 - target) * x[None].sigmoid() - target * (-x[None]).sigmoid()
        torch.testing.assert_close(stats[1::2], own[1::2], rtol=1e-13, atol=1e-307)
        torch.testing.assert_close(grad, slope, rtol=1e-13, atol=2e-16 if target == 0.9 else 1e-307)
