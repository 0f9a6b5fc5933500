"""The GPU code path without a GPU: fake CUDA tensors through the implementations, meta tensors through a whole step."""

from collections import Counter
from importlib import import_module

import fastgan.kernels.bn_act as bn_act_kernels
import fastgan.kernels.conv_bn_act as convolution_kernels
import fastgan.kernels.conv_bn_act_constants as constant_kernels
import fastgan.kernels.conv_bn_act_wgrad as weight_gradient_kernels
import fastgan.kernels.gan_bce as gan_bce_kernels
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton_device import MARKS

import fastgan
from fastgan import backends, ops
from fastgan.nn import Discriminator, Generator, stack_triton, unit
from fastgan.nn.blocks import parts

pytestmark = MARKS
aten = torch.ops.aten
bn_act_module, gan_bce_module = (import_module(f"fastgan.ops.{name}") for name in ("bn_act", "gan_bce"))


@pytest.fixture
def launches(monkeypatch):
    """Fake CUDA tensors in the block; kernels are recorded, not run, and trusted without a comparison."""
    seen = []

    def launch(kernel, grid, tensor, *args, **meta):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert all(t.device.type == "cuda" for t in tensors), "a tensor on the host reaches a kernel"
        assert all(0 < size < 2**31 for size in grid)
        seen.append(kernel.fn.__name__)

    convolutions = (convolution_kernels, weight_gradient_kernels, constant_kernels)
    for module in (bn_act_kernels, gan_bce_kernels, *convolutions):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(backends, "_is_compared", lambda tensor: False)
    with FakeTensorMode(), torch.device("cuda"):
        yield seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bn_act_on_fake_cuda(launches, dtype, layout):
    y = torch.empty(8, 64, 16, 16, dtype=dtype).to(memory_format=layout)
    weight, bias = torch.ones(64), torch.zeros(64)
    z, mean, var = bn_act_module._train(y, weight, bias, 1e-5, 0.2, "triton")
    assert launches == ["_stats_kernel", "_combine_kernel", "_apply_kernel"]
    assert (z.device.type, z.dtype, z.stride()) == ("cuda", dtype, y.stride())
    assert mean.dtype == var.dtype == torch.float32
    launches.clear()
    dz = torch.empty_like(y).contiguous()
    dy, dw, db = bn_act_module._grad(dz, y, weight, bias, mean, var, 1e-5, 0.2, True, True, True, "triton")
    assert launches == ["_reduce_kernel", "_sum_kernel", "_backward_kernel"]
    assert (dy.dtype, dy.stride(), dw.dtype, db.shape) == (dtype, y.stride(), torch.float32, (64,))
    launches.clear()
    bn_act_module._update(mean, var, mean, var, 2048, 0.1, None)
    bn_act_module._eval(y, weight, bias, mean, var, 1e-5, 0.0, None)
    assert launches == ["_update_kernel", "_apply_kernel"]


@pytest.mark.parametrize("half", ["both", "real", "fake"])
def test_gan_bce_on_fake_cuda(launches, half):
    real, fake = (torch.empty(128, dtype=torch.bfloat16) if half in ("both", w) else None for w in ("real", "fake"))
    stats, grad_real, grad_fake = gan_bce_module._forward(real, fake, 1.0, 0.0, None)
    assert launches == ["_gan_bce_kernel"]
    assert stats.shape == (4,)
    dx, dg = gan_bce_module._backward(torch.ones(4), grad_real, grad_fake, real, fake, 1.0, 0.0)
    assert [g.numel() for g in (dx, dg)] == [128 if x is not None else 0 for x in (real, fake)]


def test_the_public_operations_take_triton_on_fake_cuda_and_match_their_implementations(launches):
    x = torch.empty(4, 3, 32, 32).to(memory_format=torch.channels_last)
    weight, one, zero = torch.empty(64, 3, 4, 4), torch.ones(64), torch.zeros(64)
    z = ops.conv_bn_act(x, weight, zero, one, one, zero, stride=2, padding=1, training=True)
    assert (z.shape, z.device.type) == ((4, 64, 16, 16), "cuda")
    up = ops.conv_transpose_bn_act(z, torch.empty(64, 8, 4, 4), None, None, stride=2, padding=1, training=True)
    assert up.shape == (4, 8, 32, 32)
    loss, *_ = ops.gan_bce(torch.empty(4), torch.empty(4))
    assert (loss.shape, loss.device.type) == ((), "cuda")
    assert backends.choose("bn_act", x).decision.backend == "triton"


def test_a_planted_item_is_caught_on_fake_cuda(launches, monkeypatch):
    original = bn_act_module._statistics
    monkeypatch.setattr(bn_act_module, "_statistics", lambda y, m, v, eps: original(y, m, v, eps + v.sum().item()))
    with pytest.raises(Exception, match=r"item|data-dependent|_local_scalar_dense"):
        bn_act_module._train(torch.empty(2, 3, 4, 4), None, None, 1e-5, 0.2, "triton")


class Context:
    """Stands in for autograd's, whose engine refuses CUDA tensors where there is no driver."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


CONVOLVE = "_convolve_kernel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_both_networks_on_fake_cuda_are_nothing_but_convolutions(launches, network, dtype):
    made = network_of(network, dtype)
    input = torch.empty((4, 16) if network == "generator" else (4, 3, 32, 32), dtype=dtype)
    with torch.no_grad():
        made(input)
        assert CONVOLVE not in launches, "the library's convolutions are the default until ours are measured faster"
        launches.clear()
        with fastgan.use_backend("triton"):
            output = made(input)
    assert (output.device.type, output.dtype) == ("cuda", dtype)
    assert Counter(launches) == {CONVOLVE: 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_each_backward_operation_on_fake_cuda(launches, network, dtype):
    """Called directly: gradients of the input and of every parameter, with their shapes, dtypes and devices."""
    made = network_of(network, dtype)
    input = torch.empty((4, 16, 1, 1) if network == "generator" else (4, 3, 32, 32), dtype=dtype)
    blocks = parts(made.main)[0][1]
    parameters = [p for b in blocks for p in (b.conv.weight, b.conv.bias, *norm_parameters(b.norm))]
    run = unit._Run(stack_triton, [unit._step(block, 1) for block in blocks], dtype, False)
    context = Context()
    context.needs_input_grad = (False, True, *(p is not None for p in parameters))
    with torch.no_grad():
        output = unit._Blocks.forward(context, run, input, *parameters)
        launches.clear()
        _, *grads = unit._Blocks._backward(context, torch.empty_like(output))
    assert Counter(launches) == {CONVOLVE: 4, "_weight_gradient_kernel": 4}
    for grad, tensor in zip(grads, (input, *parameters), strict=True):
        assert (grad is None) == (tensor is None)
        if tensor is not None:
            assert (grad.shape, grad.dtype, grad.device) == (tensor.shape, tensor.dtype, tensor.device)


def network_of(name, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be converted
    try:
        return Generator(32, 3, 16, 8) if name == "generator" else Discriminator(32, 3, 8)
    finally:
        torch.set_default_dtype(before)


def norm_parameters(norm):
    return (None, None) if norm is None else (norm.weight, norm.bias)


# --- a whole training step on meta tensors --------------------------------------------------------------------------


class NoHostCopies(TorchDispatchMode):
    """Bans what would make the host wait for the device: reading a value, copying a tensor to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = args[0].device.type if args and isinstance(args[0], torch.Tensor) else None
        if func is aten._local_scalar_dense.default and device == "meta":
            raise AssertionError("a value is read on the host")
        if (
            func is aten._to_copy.default
            and device == "meta"
            and torch.device(kwargs.get("device", "meta")).type == "cpu"
        ):
            raise AssertionError("a tensor is copied to the host")
        return func(*args, **kwargs)


def meta_step(break_in=None, **options):
    with torch.device("meta"):
        generator, discriminator = Generator(16, 3, 8, 4), Discriminator(16, 3, 4)
    if break_in is not None:
        generator.main[-1].register_forward_hook(lambda module, args, out: break_in(out) and None)
    optimizers = [torch.optim.Adam(net.parameters(), foreach=True) for net in (generator, discriminator)]
    step = fastgan.GanStep(generator, discriminator, *optimizers, **options)
    return step, torch.empty(4, 3, 16, 16, device="meta")


@pytest.mark.parametrize("options", [{}, {"loss": "minimax"}, {"real_target": 0.9}, {"r1": 1.0, "penalty_interval": 1}])
def test_a_step_never_waits_for_the_device(options):
    step, real = meta_step(**options)
    backends.reset_counts()
    with fastgan.use_backend("triton"), NoHostCopies():
        metrics = step(real)
    assert all(value.device.type == "meta" for value in metrics.values())
    assert {backend for backend, _ in backends.counts()} == {"triton"}, "an eager definition ran in place of a kernel"
    assert all(p.grad is not None for p in step.generator.parameters())


@pytest.mark.parametrize(
    "leak", [lambda t: t.cpu(), lambda t: t.sum().item(), lambda t: bool(t.any())], ids=["cpu", "item", "bool"]
)
def test_a_planted_wait_is_caught(leak):
    step, real = meta_step(break_in=leak)
    with (
        fastgan.use_backend("triton"),
        NoHostCopies(),
        pytest.raises((AssertionError, RuntimeError, NotImplementedError)),
    ):
        step(real)
