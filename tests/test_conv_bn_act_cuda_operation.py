"""The blocks by the CUDA convolution: the packed path over the host's kernels, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from simt import DTYPES, run_clean, simt, to_input, to_output
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgan import backends
from fastgan.errors import BackendError
from fastgan.ops import conv_bn_act, conv_bn_act_cuda, conv_bn_act_eager, conv_transpose_bn_act
from fastgan.tolerance import misses

# operation, library's, weight [F, G, R, S] with G, F channels in and out or the reverse, how
CASES = {
    "conv": (conv_bn_act, F.conv2d, (5, 16, 4, 4), {"stride": 2, "padding": 1}),
    "dilated": (conv_bn_act, F.conv2d, (9, 16, 3, 3), {"stride": 1, "padding": 2, "dilation": (2, 2)}),
    "transposed": (conv_transpose_bn_act, F.conv_transpose2d, (16, 5, 4, 4), {"stride": 2, "padding": 1}),
    "longer": (conv_transpose_bn_act, F.conv_transpose2d, (16, 3, 3, 3), {"stride": 2, "output_padding": 1}),
}
NORM = (None, None, None, None)


def on_the_host(name, x, weight, mean, scale, shift, slope, stride, padding, third):
    """The library's operator, its kernels run thread by thread."""
    transposed = name == "conv_transpose_stats"
    args = (None, stride, padding, third)  # of conv_transpose2d the output padding, else the dilation
    nchw, filters = x.permute(0, 3, 1, 2).float(), weight.permute(0, 3, 1, 2).float()
    shape = (
        F.conv_transpose2d(nchw, filters.transpose(0, 1), *args) if transposed else F.conv2d(nchw, filters, *args)
    ).shape
    y = x.new_empty(shape[0], *shape[2:], shape[1])
    out_mean, m2 = torch.empty(shape[1]), torch.empty(shape[1])
    prologue = () if mean is None else tuple(to_input(t) for t in (mean, scale, shift))
    run_clean(
        simt().conv, DTYPES[x.dtype], transposed, to_input(x), to_input(weight), prologue, slope,
        (stride, padding, third), to_output(y), to_output(out_mean), to_output(m2),
    )  # fmt: skip
    return y, out_mean, m2


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(conv_bn_act_cuda, "launch", on_the_host)


def tensors(case, dtype=torch.bfloat16, requires_grad=False):
    _, _, shape, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 5, 6, generator=generator).to(dtype)
    weight = (torch.randn(shape, generator=generator) / 10).to(dtype)
    return [t.requires_grad_(requires_grad) for t in (x, weight)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolution_and_its_gradients_are_the_librarys(host, case, dtype, layout):
    _, library, _, how = CASES[case]
    x, weight = tensors(case, dtype, requires_grad=True)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    arguments = {
        "bias": None,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "transposed": "trans" in library.__name__,
        **how,
    }
    backends.reset_counts()
    y = conv_bn_act_cuda.convolution(x, weight, **arguments)
    assert backends.counts() == {("cuda", "convolve"): 1}
    assert y.is_contiguous(memory_format=torch.channels_last)
    own = library(x, weight, **how)
    reason = misses(y, own, library(x.double(), weight.double(), **how))
    assert reason is None, reason
    got, want = (torch.autograd.grad(out.sum(), (x, weight), create_graph=True) for out in (y, own))
    torch.testing.assert_close(got, want)
    again, expected = (torch.autograd.grad((a * a).sum(), weight)[0] for a in (got[0], want[0]))
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("case", CASES)
def test_prologue_and_statistics_through_the_contract(host, case):
    """As a stack asks for them: the previous block's BatchNorm on the way in, the sums of the result beside it."""
    x, weight = tensors(case)
    _, library, _, how = CASES[case]
    to_large = library is F.conv_transpose2d
    pairs = [
        conv_bn_act_cuda._pair(how.get(key, default))
        for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    geometry = conv_bn_act_eager.Geometry(tuple(weight.shape[2:]), *pairs)
    size = tuple(library(x, weight, **how).shape[2:])
    constants = torch.stack(
        [torch.linspace(-1, 1, 16), torch.linspace(-2, 2, 16), torch.linspace(3, -2, 16), torch.ones(16)]
    )
    for given, slope in ((constants, 0.2), (None, 0.0)):
        args = (x, None, given, slope, weight, None, geometry, to_large, size, True, None, None, 1.0)
        y, parts = conv_bn_act_cuda.convolve(*args)
        own, truth = (_definition(args, dtype) for dtype in (None, torch.float64))
        reason = misses(y, own, truth)
        assert reason is None, reason
        count, mean, m2 = conv_bn_act_eager.combined(parts)
        assert (count == y.numel() // y.shape[1]).all()
        stored = y.double()
        torch.testing.assert_close(mean.double(), stored.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m2.double(), stored.var((0, 2, 3), correction=0) * count, rtol=1e-4, atol=1e-4)


def _definition(args, dtype):
    """The result of the contract's definition; in `dtype` with the operand rounded, as tensor cores take it."""
    value, second, constants, slope, weight, *rest = args
    operand = conv_bn_act_eager.operand(value, second, constants, slope)
    given = [operand, weight] if dtype is None else [operand.to(dtype), weight.to(dtype)]
    return conv_bn_act_eager.convolve(given[0], None, None, 1.0, given[1], *rest)[0]


REFUSED = {
    "float32": ({"dtype": torch.float32}, {}, "takes float16 or bfloat16.*got torch.float32"),
    "bias": ({}, {"bias": torch.zeros(5, dtype=torch.bfloat16)}, "adds no bias"),
    "groups": ({}, {"groups": 2}, "groups=1, got"),
    "stride": ({}, {"stride": (1, 2)}, r"one stride for rows and columns, got \(1, 2\)"),
    "channels": ({"channels": 12}, {}, "channels in multiples of 8, got 12"),
    "empty": ({"batch": 0}, {}, "not empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_an_error_with_the_reason(name):
    given, options, message = REFUSED[name]
    dtype, channels = given.get("dtype", torch.bfloat16), given.get("channels", 16)
    x, weight = (
        torch.ones(given.get("batch", 2), channels, 5, 6, dtype=dtype),
        torch.ones(5, channels, 3, 3, dtype=dtype),
    )
    if name == "groups":
        weight = weight[:4, :8]
    with pytest.raises(BackendError, match=message):
        conv_bn_act(x, weight, *NORM, training=True, backend="cuda", **options)


@pytest.mark.parametrize("case", CASES)
def test_on_fake_cuda(monkeypatch, case):
    """The GPU's path without one: the weight is packed, one launch, and the operation's fake agrees with it."""
    seen = []

    def launch(name, x, weight, mean, scale, shift, slope, *numbers):
        assert all(t.is_contiguous() for t in (x, weight))
        assert x.shape[-1] == weight.shape[-1] == 16
        assert all(t.device.type == "cuda" for t in (x, weight))
        seen.append((name, tuple(weight.shape)))
        *spatial, channels = expected[0], *expected[2:], expected[1]
        return x.new_empty(*spatial, channels), *(x.new_empty(channels, dtype=torch.float32) for _ in range(2))

    monkeypatch.setattr(conv_bn_act_cuda, "launch", launch)
    operation, library, shape, how = CASES[case]
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.empty(2, 16, 5, 6, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16)
        expected = library(x, weight, **how).shape
        for backend in ("cuda", None, "eager"):
            z = operation(x, weight, *NORM, training=True, batch_norm=False, negative_slope=1.0, backend=backend, **how)
            assert (z.shape, z.device.type) == (expected, "cuda")
            assert z.is_contiguous(memory_format=torch.channels_last) or backend != "cuda"
        options = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, **how}
        pairs = [conv_bn_act_cuda._pair(options[k]) for k in ("stride", "padding", "dilation", "output_padding")]
        transposed = library is F.conv_transpose2d
        z = conv_bn_act_cuda._forward(x, weight, *pairs, transposed)
    outer, inner = (shape[1], shape[0]) if transposed else shape[:2]
    assert seen == [("conv_transpose_stats" if transposed else "conv_stats", (outer, *shape[2:], inner))]
    assert z.shape == expected
    assert z.is_contiguous(memory_format=torch.channels_last)
