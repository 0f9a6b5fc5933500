"""conv_bn_act and conv_transpose_bn_act: equal to the plain modules, at every order of gradient, in every mode."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from triton_device import DEVICE, MARKS

from fastgan.ops import conv_bn_act, conv_transpose_bn_act

pytestmark = MARKS
BACKENDS = ["eager", "triton"]
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
OPERATIONS = {
    "conv_bn_act": (conv_bn_act, F.conv2d),
    "conv_transpose_bn_act": (conv_transpose_bn_act, F.conv_transpose2d),
}


def tensors(name, dtype=torch.float64, c=2, k=4):
    """input, weight, bias, bn_weight, bn_bias"""
    torch.manual_seed(0)
    shape = (k, c, 3, 3) if name == "conv_bn_act" else (c, k, 3, 3)
    sizes = [(3, c, 5, 5), shape, k, k, k]
    return [torch.randn(s, dtype=dtype).to(DEVICE).requires_grad_() for s in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_to_the_modules(name, batch_norm, backend, dtype):
    operation, convolution = OPERATIONS[name]
    x, weight, bias, gamma, beta = tensors(name, dtype)
    states = [torch.zeros(4, dtype=dtype, device=DEVICE), torch.ones(4, dtype=dtype, device=DEVICE)]
    own = [s.clone() for s in states]
    norm = (*states, gamma, beta) if batch_norm else (None,) * 4
    how = {"stride": 2, "padding": 1, **({"output_padding": 1} if "transpose" in name else {})}
    z = operation(x, weight, *norm, bias=bias, training=True, batch_norm=batch_norm, backend=backend, **how)
    v = convolution(x, weight, bias, **how)
    if batch_norm:
        v = F.batch_norm(v, *own, gamma, beta, True)
    expected = F.leaky_relu(v, 0.2)
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-12)
    leaves = [x, weight, bias, *((gamma, beta) if batch_norm else ())]
    got, want = (torch.autograd.grad(out.square().sum(), leaves) for out in (z, expected))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states, own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_gradients(name, backend):
    operation, _ = OPERATIONS[name]
    x, weight, _, gamma, beta = tensors(name, c=1, k=2)

    def f(x, weight, gamma, beta):
        return operation(x, weight, None, None, gamma, beta, stride=2, padding=1, training=True, backend=backend)

    assert gradcheck(f, (x, weight, gamma, beta), fast_mode=True)
    assert gradgradcheck(f, (x, weight, gamma, beta), fast_mode=True)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_slopes_without_batch_norm(name, slope):
    operation, convolution = OPERATIONS[name]
    x, weight, *_ = tensors(name)
    for backend in BACKENDS:
        z = operation(x, weight, training=True, batch_norm=False, negative_slope=slope, backend=backend)
        expected = convolution(x, weight)
        assert torch.equal(z, expected.relu() if slope == 0 else expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_and_channels_last(name):
    operation, _ = OPERATIONS[name]
    x, weight, _, gamma, beta = tensors(name, torch.float32)
    x = x.detach().to(memory_format=torch.channels_last)
    mean, var = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        for backend in BACKENDS:
            z = operation(x, weight, mean, var, gamma, beta, training=True, backend=backend)
            assert z.dtype == torch.bfloat16
            assert z.is_contiguous(memory_format=torch.channels_last)
    (g,) = torch.autograd.grad(z.float().sum(), gamma)
    assert g.dtype == mean.dtype == torch.float32


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile_and_export(name, compiler, training):
    operation, _ = OPERATIONS[name]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            _, weight, _, gamma, beta = tensors(name, torch.float32)
            self.weight, self.gamma, self.beta = nn.Parameter(weight), nn.Parameter(gamma), nn.Parameter(beta)
            self.norm = nn.BatchNorm2d(4, device=DEVICE)

        def forward(self, x):
            state = (self.norm.running_mean, self.norm.running_var)
            return operation(x, self.weight, *state, self.gamma, self.beta, stride=2, training=training)

    x = tensors(name, torch.float32)[0].detach()
    expected, after = Block()(x), Block()
    compiled = torch.compile(after, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(Block(), (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(exported.norm.running_var, after.norm.running_var)


def test_kept_are_input_weight_and_the_convolution_s_output():
    x, weight, _, gamma, beta = tensors("conv_bn_act", torch.float32, c=8, k=8)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        z = conv_bn_act(x, weight, None, None, gamma, beta, padding=1, training=True, backend="triton")
    assert sorted(t.numel() for t in kept.values() if t.numel() > 8) == sorted([x.numel(), weight.numel(), z.numel()])


def test_batch_norm_tensors_without_batch_norm_are_an_error():
    x, weight, _, gamma, _ = tensors("conv_bn_act")
    with pytest.raises(ValueError, match="batch_norm=False takes no running statistics"):
        conv_bn_act(x, weight, None, None, gamma, training=True, batch_norm=False)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("name", OPERATIONS)
def test_one_image_without_a_batch_dimension(name, backend):
    """Convolutions take it; BatchNorm would take the rows of their output, here as many, for its channels."""
    operation, convolution = OPERATIONS[name]
    x, weight, _, gamma, beta = tensors(name)
    image = x.detach()[0, :, :4, :4]
    how = {"padding": 1, "backend": backend}
    state = [torch.zeros(4, dtype=x.dtype, device=DEVICE), torch.ones(4, dtype=x.dtype, device=DEVICE)]
    for training in (True, False):
        with pytest.raises(ValueError, match=rf"{name}: input must be \[N, C, H, W\] .*, got \[2, 4, 4\]"):
            operation(image, weight, *state, gamma, beta, training=training, **how)
    assert not state[0].any()
    got = operation(image, weight, training=True, batch_norm=False, **how)
    torch.testing.assert_close(got, F.leaky_relu(convolution(image, weight, padding=1), 0.2))


def test_the_two_signatures_differ_only_where_the_convolutions_do():
    """They are written out twice for `help()`; this holds them together."""
    down, up = (dict(inspect.signature(operation).parameters) for operation in (conv_bn_act, conv_transpose_bn_act))
    assert up.pop("output_padding").default == 0
    assert list(down.items()) == list(up.items())
