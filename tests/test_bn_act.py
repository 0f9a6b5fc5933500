"""bn_act: PyTorch's semantics row by row, gradients of every order, compile, export, memory kept, clear errors."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from triton_device import BACKENDS, DEVICE, MARKS

from fastgan import backends
from fastgan.errors import FastganError
from fastgan.nn.blocks import batch_norm_arguments
from fastgan.ops import bn_act

pytestmark = MARKS
module = import_module("fastgan.ops.bn_act")
eager = import_module("fastgan.ops.bn_act_eager")
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
OPS = torch.ops.fastgan


def by_module(norm, x, backend, slope=0.2):
    """`norm` followed by LeakyReLU through bn_act, as a stack calls it."""
    named = batch_norm_arguments(norm)
    return bn_act(
        x, named["running_mean"], named["running_var"], named["bn_weight"], named["bn_bias"],
        training=named["training"], momentum=named["momentum"], eps=named["eps"], negative_slope=slope, backend=backend,
    )  # fmt: skip


# --- a table of nn.BatchNorm2d's semantics, every row in training and eval ------------------------------------------

ROWS = {
    "default": {},
    "momentum=None": {"momentum": None},
    "momentum=1": {"momentum": 1.0},
    "momentum=0": {"momentum": 0.0},
    "affine=False": {"affine": False},
    "track_running_stats=False": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "eps=0.3": {"eps": 0.3},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_semantics(row, backend, training, layout, dtype):
    torch.manual_seed(0)
    ours, theirs = (nn.BatchNorm2d(3, dtype=dtype, device=DEVICE, **ROWS[row]) for _ in range(2))
    for norm in (ours, theirs):
        if norm.affine:
            nn.init.constant_(norm.weight, 1.7)
            nn.init.constant_(norm.bias, -0.4)
    for mode in (True, True, training):  # two training batches first, so that eval has statistics to use
        x = (torch.randn(4, 3, 5, 5, dtype=dtype, device=DEVICE) * 2 + 1).contiguous(memory_format=layout)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        z = by_module(ours.train(mode), mine, backend)
        expected = F.leaky_relu(theirs.train(mode)(other), 0.2)
        torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-12)
        dz = torch.randn_like(z)
        got = torch.autograd.grad(z, [mine, *ours.parameters()], dz)
        want = torch.autograd.grad(expected, [other, *theirs.parameters()], dz)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_per_channel_raises_in_training_only(shape, backend):
    x, zero, one = torch.randn(shape, device=DEVICE), torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match="more than 1 value per channel in training, got input"):
        bn_act(x, zero, one, training=True, backend=backend)
    expected = F.leaky_relu(F.batch_norm(x, zero, one), 0.2)
    torch.testing.assert_close(bn_act(x, zero, one, training=False, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_leaves_the_statistics_unchanged(backend, training):
    x = torch.randn(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    mean, var = torch.full((3,), 0.5, device=DEVICE), torch.full((3,), 2.0, device=DEVICE)
    z = bn_act(x, mean, var, training=training, backend=backend)
    assert z.shape == x.shape
    z.sum().backward()
    assert torch.equal(mean, torch.full_like(mean, 0.5))
    assert torch.equal(var, torch.full_like(var, 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wants", ["input", "weight", "bias", "none"])
def test_partial_requires_grad(backend, wants):
    tensors = {n: torch.randn(s, device=DEVICE) for n, s in (("input", (4, 3, 2, 2)), ("weight", 3), ("bias", 3))}
    for name, value in tensors.items():
        value.requires_grad_(name == wants)
    z = bn_act(tensors["input"], None, None, tensors["weight"], tensors["bias"], training=True, backend=backend)
    assert z.requires_grad == (wants != "none")
    if wants != "none":
        z.square().sum().backward()
        assert tensors[wants].grad is not None


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_statistics_and_parameters_stay_fp32(half):
    norm = nn.BatchNorm2d(3, device=DEVICE)
    with torch.autocast(DEVICE, half):
        y = F.conv2d(torch.randn(4, 3, 8, 8, device=DEVICE), torch.randn(3, 3, 3, 3, device=DEVICE))
        z = by_module(norm, y, "triton")
    assert z.dtype == y.dtype == half
    z.float().sum().backward()
    assert norm.running_var.dtype == norm.weight.grad.dtype == torch.float32


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_every_order_of_gradient_through_the_operations(training, slope):
    """Eager kernels under the custom operations' own formulas: what compiled code and every backend share."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def f(x, weight, bias):
        if training:
            return OPS.bn_act_train(x, weight, bias, 1e-5, slope, "eager")[0]
        return OPS.bn_act_eval(x, weight, bias, mean, var, 1e-5, slope, "eager")

    def penalty(x, weight, bias):
        (g,) = torch.autograd.grad(f(x, weight, bias).square().sum(), x, create_graph=True)
        return g

    assert gradcheck(f, (x, weight, bias))
    assert gradgradcheck(f, (x, weight, bias))
    assert gradgradcheck(penalty, (x, weight, bias), fast_mode=True)  # the third derivative


class Net(nn.Module):
    """Two blocks and a linear end: what R1 is taken through."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1, bias=False) for a, b in ((3, 4), (4, 6)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in (4, 6))
        self.to(DEVICE, dtype)

    def forward(self, x, backend):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = convolution(x)
            x = F.leaky_relu(norm(y), 0.2) if backend is None else by_module(norm, y, backend)
        return x.mean((1, 2, 3))

    def r1(self, x, backend):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(self(x, backend).sum(), x, create_graph=True)
        penalty = g.square().sum((1, 2, 3)).mean()
        return penalty.detach(), *torch.autograd.grad(penalty, list(self.parameters()), allow_unused=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_r1_through_a_network_is_pytorch_s(backend):
    net, x = Net(torch.float64), torch.randn(4, 3, 12, 12, dtype=torch.float64, device=DEVICE)
    for got, want in zip(net.r1(x, backend), net.r1(x, None), strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_r1_in_fp32_is_right_by_the_rule(backend):
    from fastgan.tolerance import misses

    x = torch.randn(4, 3, 12, 12, dtype=torch.float32, device=DEVICE)
    single, double = Net(torch.float32), Net(torch.float64)
    runs = (single.r1(x, backend), single.r1(x, None), double.r1(x.double(), None))
    kept = [i for i, t in enumerate(runs[2]) if t is not None]
    assert misses(*(torch.cat([run[i].flatten() for i in kept]) for run in runs)) is None


def test_a_split_operation_refuses_to_be_differentiated():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(FastganError, match="bn_stats is one half of an operation and cannot be differentiated"):
        OPS.bn_stats(x, None)
    with torch.no_grad():
        assert OPS.bn_stats(x, None)[0].shape == (3,)


# --- torch's machinery ----------------------------------------------------------------------------------------------

Y = torch.randn(2, 3, 4, 4)
STAT = [torch.rand(3) + 0.5 for _ in range(4)]
CALLS = {
    "bn_act_train": lambda b: (Y.clone().requires_grad_(), STAT[0].clone().requires_grad_(), STAT[1], 1e-5, 0.2, b),
    "bn_act_eval": lambda b: (Y.clone().requires_grad_(), STAT[0], None, STAT[2], STAT[3], 1e-5, 0.2, b),
    "bn_act_grad": lambda b: (Y, Y, STAT[0], STAT[1], STAT[2], STAT[3], 1e-5, 0.2, True, True, True, b),
    "bn_stats": lambda b: (Y, b),
    "bn_act": lambda b: (Y, *STAT, 0.2, b),
    "bn_act_reduce": lambda b: (Y, Y, *STAT, 0.2, b),
    "bn_act_backward": lambda b: (Y, Y, *STAT, 0.2, STAT[0], STAT[1], 32, b),
    "update_running_stats": lambda b: (*(t.clone() for t in STAT), 32, 0.1, b),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, backend):
    args = tuple(
        a.to(DEVICE) if isinstance(a, torch.Tensor) and not a.requires_grad else a for a in CALLS[name](backend)
    )
    torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("training", [True, False])
def test_compile_whole(training, compiler):
    x, weight = torch.randn(4, 3, 5, 5, device=DEVICE), torch.rand(3, device=DEVICE)
    states = [[torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)] for _ in range(2)]

    def f(x, weight, mean, var):
        return bn_act(x, mean, var, weight, None, training=training)

    compiled = torch.compile(f, fullgraph=True, backend=compiler)
    results = []
    for function, state in ((f, states[0]), (compiled, states[1])):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        z = function(*leaves, *state)
        results.append([z.detach(), *torch.autograd.grad(z.square().sum(), leaves), *state])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_gradient_of_compiled_code_is_an_error_not_none():
    """torch cannot differentiate compiled code twice; it says so itself, and nothing is silently missing."""
    x = torch.randn(4, 3, 5, 5, device=DEVICE, requires_grad=True)
    z = torch.compile(lambda x: bn_act(x, None, None, training=True), fullgraph=True, backend="aot_eager")(x)

    def second():
        (g,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)

    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second()


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            n = self.norm
            return bn_act(x, n.running_mean, n.running_var, n.weight, n.bias, training=self.training)

    layer, x = Layer().train(training), torch.randn(4, 3, 5, 5)
    program = torch.export.export(layer, (x,))
    expected = layer(x)
    exported = program.module()
    exported.norm.running_mean.zero_()
    exported.norm.running_var.fill_(1.0)
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(exported.norm.running_mean, layer.norm.running_mean)
    updates = [n for n in program.graph.nodes if "update_running_stats" in str(n.target)]
    assert len(updates) == training


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["eager", "no_grad", "compiled"])
def test_running_statistics_move_exactly_once(backend, mode):
    x = torch.randn(4, 3, 5, 5, device=DEVICE)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)

    def f(x, mean, var):
        return bn_act(x, mean, var, training=True, momentum=0.5, backend=backend)

    function = torch.compile(f, fullgraph=True, backend="aot_eager") if mode == "compiled" else f
    with torch.set_grad_enabled(mode != "no_grad"):
        function(x, mean, var)
    torch.testing.assert_close(mean, 0.5 * x.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.5 + 0.5 * x.var((0, 2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_only_the_input_and_per_channel_numbers_are_kept(backend, layout):
    """Eager keeps y and, for its in-place LeakyReLU, z, which the next layer keeps anyway; the operation only y."""
    x = torch.randn(8, 16, 12, 12, device=DEVICE).to(memory_format=layout).requires_grad_()
    weight, bias = torch.ones(16, device=DEVICE, requires_grad=True), torch.zeros(16, device=DEVICE, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        bn_act(x, None, None, weight, bias, training=True, backend=backend)
    activations = sum(t.numel() * t.element_size() for t in kept.values() if t.numel() > 1000)
    rest = sum(t.numel() for t in kept.values() if t.numel() <= 1000)
    assert activations == x.numel() * 4 * (2 if backend == "eager" else 1)
    assert rest <= 6 * 16


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight must have shape \[C\] = \[3\], got \[4\]"),
        ({"running_var": None}, "go together, got one of them"),
        ({"bias": torch.ones(3, dtype=torch.float64)}, "bias must be torch.float32 .*got torch.float64"),
        ({"input": torch.ones(3)}, r"input must be a floating \[N, C, ...\], got \[3\]"),
        ({"input": torch.ones(3), "running_mean": None, "running_var": None}, r"floating \[N, C, ...\], got \[3\]"),
        ({"input": torch.ones(2, 3, dtype=torch.int64)}, "input must be a floating"),
        ({"running_mean": None, "running_var": None, "training": False}, "required when training=False"),
        ({"eps": 0.0}, "eps must be positive in training, got 0.0"),
        *(({"momentum": momentum}, rf"momentum must be in \[0, 1\], got {momentum}") for momentum in (7.0, -0.1, None)),
        ({"weight": torch.ones(3, device="meta")}, "weight is on meta, input on cpu"),
    ],
)
def test_errors_name_the_argument(changes, message):
    given = {"input": torch.randn(2, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": True}
    with pytest.raises(ValueError, match=message):
        bn_act(**{**given, **changes})


# --- planted bugs in what the kernels share -------------------------------------------------------------------------


def eps_outside_the_root(y, mean, var, eps):
    return mean, 1 / (var.sqrt() + eps)


def swapped_variances(running_mean, running_var, mean, var, n, momentum):
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (n - 1) / n, momentum)


def twice(running_mean, running_var, mean, var, n, momentum):
    for _ in range(2):
        eager.update_running_stats(running_mean, running_var, mean, var, n, momentum)


@pytest.mark.parametrize("bug", [eps_outside_the_root, swapped_variances, twice])
def test_a_planted_bug_is_caught(monkeypatch, bug):
    if bug is eps_outside_the_root:
        monkeypatch.setattr(module, "_statistics", bug)
    else:
        kernel = backends.kernel
        planted = lambda backend, name: bug if name == "update_running_stats" else kernel(backend, name)  # noqa: E731
        monkeypatch.setattr(backends, "kernel", planted)
    with pytest.raises(AssertionError):
        test_semantics("eps=0.3", "triton", True, torch.contiguous_format, torch.float64)
