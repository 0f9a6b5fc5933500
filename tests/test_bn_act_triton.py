"""The Triton kernels of bn_act against the definition, kernel by kernel and through autograd."""

import mmap
from functools import partial

import fastgan.kernels.bn_act as kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastgan.kernels import tuning
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_right_as_torch
from torch.autograd import gradcheck, gradgradcheck
from triton_device import DEVICE, MARKS

from fastgan import backends, first_use
from fastgan.ops import bn_act
from fastgan.ops.bn_act_eager import settle
from fastgan.tolerance import FACTOR, misses

pytestmark = MARKS
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 4097), (3, 1, 7, 1), (2, 65, 1, 7), (1, 3, 4097, 1), (2, 64, 4, 4), (5, 65), (7, 1)]
CASES = [(s, layout) for s in SHAPES for layout in LAYOUTS if len(s) == 4 or layout == "contiguous"]
SLOW = {((2, 65, 1, 7), "contiguous"), ((2, 64, 4, 4), "contiguous"), ((1, 3, 4097, 1), "channels_last")}
SLOW |= {((1, 1, 1, 4097), layout) for layout in LAYOUTS}
NEARLY = (1 << 31) - 8
SPLIT = ("bn_stats", "bn_act", "bn_act_reduce", "bn_act_backward")


def arguments(name, shape, layout, dtype, slope=0.2, seed=0, frozen=False):
    """Arguments of a split operation with beta and the constant C far from 0, so that a wrong mask shows."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    channels, n = shape[1], torch.Size(shape).numel() // shape[1]
    place = partial(torch.Tensor.to, memory_format=LAYOUTS[layout]) if len(shape) == 4 else torch.Tensor.contiguous
    y, dz = (place((scale * draw(shape) + shift).to(DEVICE, dtype)) for scale, shift in ((2, 3), (1, 0)))
    if name == "bn_stats":
        return (y,)
    invstd = torch.rand(channels, generator=generator) + 0.5
    mean, invstd, weight, bias, grad_weight, grad_bias = (
        t.to(DEVICE, stat)
        for t in (
            3 + draw(channels),
            invstd,
            draw(channels),
            4 * draw(channels),
            n * draw(channels),
            n * draw(channels),
        )
    )
    common = (y, mean, invstd, weight, bias, slope)
    if name == "bn_act":
        return common
    if name == "bn_act_reduce":
        return settle(name, (dz, *common))
    return settle(name, (dz, *common, *((None, None, 0) if frozen else (grad_weight, grad_bias, n))))


def results(kernel, args):
    out = kernel(*args)
    return out if isinstance(out, tuple) else (out,)


def verdict(module, name, several, factor=FACTOR):
    """Why the kernel of `module` misses, or None; over several arguments together, as one channel may be lucky."""
    eager = backends.kernel("eager", name)
    got, own, truth = [], [], []
    for args in several:
        got.append(results(getattr(module, name), args))
        own.append(results(eager, args))
        truth.append(results(eager, [a.double() if isinstance(a, torch.Tensor) else a for a in args]))
    joined = (
        tuple(torch.cat([t.flatten() for t in column]) for column in zip(*runs, strict=True))
        for runs in (got, own, truth)
    )
    return misses(*joined, factor)


def seeds(shape, name, dtype=torch.float32):
    """As many draws as give 64 sums: of 8, one kernel's or PyTorch's luck decides (RMS ratios from 0.9 to 4.0 for the
    same code were seen, with 64 of them 0.7 to 1.5, with 128 of them 0.9 to 1.1). In fp64 luck has no part: the rule
    lets thousands of ulps pass."""
    alone = dtype == torch.float64 or name not in ("bn_stats", "bn_act_reduce")
    return range(1 if alone else -(-64 // shape[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@pytest.mark.parametrize("name", SPLIT)
def test_kernel(name, shape, layout, dtype):
    if (shape, layout) in SLOW and len(seeds(shape, name, dtype)) > 1 and dtype != torch.float32:
        pytest.skip("64 sums of it take seconds in the interpreter: here fp32 has the shape, `slow` the halves")
    slope = {torch.float32: 0.2, torch.float16: 0.0, torch.bfloat16: 0.2, torch.float64: 1.0}[dtype]
    several = [arguments(name, shape, layout, dtype, slope, seed) for seed in seeds(shape, name, dtype)]
    assert verdict(kernels, name, several) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, -0.5])
@pytest.mark.parametrize("name", SPLIT)
def test_kernel_full_product(name, shape, layout, dtype, slope):
    several = [arguments(name, shape, layout, dtype, slope, seed) for seed in seeds(shape, name, dtype)]
    assert verdict(kernels, name, several) is None


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, -0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_statistics_and_every_slope(layout, slope):
    shape = (2, 3, 5, 7)
    frozen = [arguments("bn_act_backward", shape, layout, torch.float32, slope, frozen=True)]
    assert verdict(kernels, "bn_act_backward", frozen) is None
    for name in ("bn_act", "bn_act_reduce"):
        args = [arguments(name, shape, layout, torch.float32, slope, seed) for seed in seeds(shape, name)]
        assert verdict(kernels, name, args) is None


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 9), w=st.integers(1, 9),
    layout=st.sampled_from(sorted(LAYOUTS)), name=st.sampled_from(SPLIT), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_small_shape(n, c, h, w, layout, name, seed):
    """fp64, where the two computations must agree to thousands of ulps: no luck is involved, only indices and masks."""
    args = [arguments(name, (n, c, h, w), layout, torch.float64, 0.2, seed)]
    assert verdict(kernels, name, args) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", [32, 256])
def test_several_splits_and_ragged_tiles(monkeypatch, layout, tile):
    """Small tiles stand in for large tensors: partial results, several tiles a program, an almost empty last one."""
    monkeypatch.setattr(kernels, "TILE", tile)
    monkeypatch.setattr(tuning, "CONFIGURATIONS", (tuning.Configuration(tile, 4),))
    monkeypatch.setattr(kernels, "PROGRAMS", 12)
    for name in SPLIT:
        several = [arguments(name, (3, 3, 11, 13), layout, torch.float32, 0.2, seed) for seed in range(4)]
        assert verdict(kernels, name, several) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_mean_far_above_the_deviation(layout):
    torch.manual_seed(0)
    several = [((1e4 + torch.randn(4, 8, 9, 9)).to(DEVICE, memory_format=LAYOUTS[layout]),) for _ in range(3)]
    assert verdict(kernels, "bn_stats", several) is None


def test_one_outlier_does_not_ruin_the_variance():
    y = torch.randn(4, 8, 16, 16, device=DEVICE)
    y[0, :, 0, 0] = 1e4
    assert verdict(kernels, "bn_stats", [(y,)]) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_channel_and_are_pytorch_s(layout, bad):
    x = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=LAYOUTS[layout])
    x[1, 1, 2, 3] = bad
    for slope in (0.0, 0.2):
        z = bn_act(x, None, None, training=True, negative_slope=slope, backend="triton")
        own = F.leaky_relu(F.batch_norm(x, None, None, training=True), slope)
        assert z[:, 1].isnan().all()
        torch.testing.assert_close(z[:, [0, 2]], own[:, [0, 2]])
        mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
        z = bn_act(x, mean, var, training=False, negative_slope=slope, backend="triton")
        v = F.batch_norm(x, mean, var)
        torch.testing.assert_close(z, F.relu(v) if slope == 0 else F.leaky_relu(v, slope), equal_nan=True)


def test_gamma_zero_gives_the_bias_and_finite_gradients():
    x = torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True)
    weight, bias = torch.zeros(3, device=DEVICE, requires_grad=True), torch.tensor([1.0, -1.0, 2.0], device=DEVICE)
    z = bn_act(x, None, None, weight, bias, training=True, backend="triton")
    assert torch.equal(z, F.leaky_relu(bias, 0.2)[None, :, None, None].expand_as(z))
    dx, dw = torch.autograd.grad((z * torch.randn_like(z)).sum(), (x, weight))
    assert not dx.any()
    assert torch.isfinite(dw).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_every_time(layout):
    for name in SPLIT:
        args = arguments(name, (3, 5, 33, 17), layout, torch.float32)
        first, second = (results(getattr(kernels, name), args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_sign_of_v_is_the_forward_s(monkeypatch):
    """An element whose v is exactly 0 or a rounding away takes the same branch forward and backward."""
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    mean, one = x.mean((0, 2, 3)), torch.ones(3, device=DEVICE)
    bias = -(x[0, :, 3, 3] - mean)  # v is 0 there
    z = kernels.bn_act(x, mean, one, one, bias, 0.5)
    dy = kernels.bn_act_backward(torch.ones_like(x), x, mean, one, one, bias, 0.5, None, None, 0)
    assert torch.equal(dy == 1, z > 0)
    assert (z == 0).any()


# --- through autograd -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_gradients_run_through_the_kernels(layout, training):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64).to(DEVICE, memory_format=LAYOUTS[layout]).requires_grad_()
    weight, bias = (torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(2, dtype=torch.float64, device=DEVICE), torch.ones(2, dtype=torch.float64, device=DEVICE)

    def f(x, weight, bias):
        running = (None, None) if training else (mean, var)
        return bn_act(x, *running, weight, bias, training=training, backend="triton")

    backends.reset_counts()
    assert gradcheck(f, (x, weight, bias))
    assert gradgradcheck(f, (x, weight, bias), fast_mode=True)
    ran = backends.counts()
    assert ran["triton", "bn_act"] > 0
    assert ran["triton", "bn_act_backward"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_operation_is_as_right_as_pytorch(layout, dtype, slope):
    torch.manual_seed(1)
    x = (2 * torch.randn(3, 8, 6, 6) + 1).to(DEVICE, dtype).to(memory_format=LAYOUTS[layout])
    dz = torch.randn_like(x)
    weight, bias = torch.randn(8, device=DEVICE), torch.randn(8, device=DEVICE)
    v = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    dz = torch.where(v.abs() < 1e-4, 0, dz)  # there either branch is right

    def run(convert, **chosen):
        leaves = [convert(t).detach().requires_grad_() for t in (x, weight, bias)]
        running = [torch.zeros_like(leaves[1]), torch.ones_like(leaves[1])]
        if chosen:
            z = bn_act(leaves[0], *running, *leaves[1:], training=True, negative_slope=slope, **chosen)
        else:
            z = F.leaky_relu(F.batch_norm(leaves[0], *running, *leaves[1:], True), slope)
        return (z.detach(), *torch.autograd.grad(z, leaves, dz.to(z.dtype)), *(r.detach() for r in running))

    def same(t):
        return t

    assert_as_right_as_torch(run(same, backend="triton"), run(same), run(torch.Tensor.double))


def test_a_strided_input_is_copied_once():
    x = torch.randn(2, 3, 8, 8, device=DEVICE)[:, :, ::2, ::2].requires_grad_()
    z = bn_act(x, None, None, training=True, backend="triton")
    torch.testing.assert_close(z, F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.2))
    assert z.is_contiguous(memory_format=torch.channels_last)
    z.sum().backward()


def test_running_statistics_are_updated_once():
    x = torch.randn(4, 3, 5, 5, device=DEVICE)
    mean, var, own_mean, own_var = (f(3, device=DEVICE) for f in (torch.zeros, torch.ones, torch.zeros, torch.ones))
    with torch.no_grad():
        bn_act(x, mean, var, training=True, momentum=0.3, backend="triton")
    F.batch_norm(x, own_mean, own_var, training=True, momentum=0.3)
    torch.testing.assert_close(mean, own_mean)
    torch.testing.assert_close(var, own_var)


def sparse(elements=1 << 32):
    """bf16 zeros whose memory is reserved, not used: addresses are real, and the interpreter checks each, but only
    pages that are touched take room."""
    no_reserve = 0x4000  # Python names MAP_NORESERVE only from 3.13 on
    memory = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def huge(layout):
    """2^32 elements, the last image's last position from -3 to 5."""
    y = sparse().view(4, 1024, 1024, 1024)
    if layout == "channels_last":
        y = y.permute(0, 3, 1, 2)
    y[-1, :, -1, -1] = torch.linspace(-3, 5, 1024)
    y[0, 0, 0, 0] = 7.0
    return y


@pytest.fixture
def last_program(monkeypatch):
    """`last_program(module, y)`: run only the last program of each launch; statistics of y, or, given z, apply."""
    if DEVICE == "cuda":
        pytest.skip("a card gets the real tensor of test_past_two_to_the_31_elements_for_real")
    import interpreter
    import triton.language as tl

    def run(module, y, z=None):
        def launch(kernel, grid, tensor, *args, **meta):
            program = [size - 1 for size in grid]
            monkeypatch.setattr(
                interpreter.Builder,
                "create_get_program_id",
                lambda self, axis: interpreter.Handle(np.array([program[axis]], np.int32), tl.int32),
            )
            kernel[(1,)](*args, **meta)

        for name, value in (("launch", launch), ("PROGRAMS", 1 << 30), ("MAX_SPLITS", 1 << 30)):
            monkeypatch.setattr(module, name, value)
        if z is None:
            return module._per_channel(module._stats_kernel, y, 3, y)[1]
        one = torch.ones(y.shape[1])
        module._elementwise(module._apply_kernel, y, z, y, 0 * one, one, 2 * one, one, SLOPE=0.5)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_past_two_to_the_31_elements(last_program, layout):
    y, z = huge(layout), huge(layout)
    z[0, 0, 0, 0] = 0.0
    last_program(kernels, y, z)
    v = 2 * y[-1, :, -1, -1].float() + 1
    expected = torch.where(v > 0, v, v / 2).bfloat16()
    assert torch.equal(z[-1, -4:, -1, -1], expected[-4:])
    assert not z[0, 0, 0, :9].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_past_two_to_the_31_elements(last_program, layout):
    y = huge(layout)
    n, mean, _ = last_program(kernels, y)
    values = 64 if layout == "channels_last" else 4 * 1024  # a tile of 64 channels, or 4 images and 1,024 columns
    assert n[-1, -1] == values
    torch.testing.assert_close(mean[-1, -1], y[-1, -1, -1, -1].float() / values)


def test_offsets_of_32_bits_are_caught(last_program, planted_kernels):
    planted = planted_kernels(kernels, "r.to(tl.int64)[:, None] * channels", "r[:, None] * channels")
    with pytest.raises(Exception, match="outside every tensor"):
        last_program(planted, huge("contiguous"))


def just_below(module, last_program, shape):
    """What the last program makes of ones where an axis is 2^31 - 8 long: count, mean, and the last element of z."""
    y, z = (sparse(NEARLY).view(shape) for _ in range(2))
    y.view(-1)[-4096:] = 1.0
    n, mean, _ = last_program(module, y)
    last_program(module, y, z)
    return n[-1, -1].item(), mean[-1, -1].item(), z.flatten()[-1].item()


@pytest.mark.parametrize(("shape", "values"), [((1, 1, 1, NEARLY), 1016), ((NEARLY, 1), 4088)], ids=["columns", "rows"])
def test_just_below_two_to_the_31(last_program, shape, values):
    assert just_below(kernels, last_program, shape) == (values, 1.0, 3.0)


def test_blocks_counted_by_cdiv_are_caught(last_program, planted_kernels):
    planted = planted_kernels(kernels, "(size - 1) // BLOCK + 1", "tl.cdiv(size, BLOCK)")
    with pytest.raises(Exception, match="outside every tensor"):
        just_below(planted, last_program, (1, 1, 1, NEARLY))


@pytest.mark.gpu
def test_past_two_to_the_31_elements_for_real():
    y = torch.zeros((1 << 25) + 1, 64, 1, 1, dtype=torch.bfloat16, device="cuda")
    y[-1] = 2.0
    args = [torch.full((64,), v, device="cuda") for v in (0.0, 1.0, 1.0, 0.5)]
    z = kernels.bn_act(y, *args, 0.2)
    assert torch.all(z[-1] == 2.5)
    mean, _ = kernels.bn_stats(y)
    torch.testing.assert_close(mean, torch.full((64,), 2.0 / y.shape[0], device="cuda"))


# --- planted bugs ---------------------------------------------------------------------------------------------------

PLANTED = {
    "mask without effect": ("tl.where(inside, g, 0.0)", "g + 0.5", "bn_act_reduce"),
    "mask before the prologue": ("deviation = tl.where(inside, value - pivot[None, :], 0.0)",
                                 "deviation = tl.where(inside, value, 0.0) - pivot[None, :]", "bn_stats"),
    "dropped B": ("along * (value - m) + constant", "constant", "bn_act_backward"),
    "dropped C": ("along * (value - m) + constant", "along * (value - m)", "bn_act_backward"),
    "slope's sign": ("v, v * SLOPE)", "v, -v * SLOPE)", "bn_act"),
    "derivative of the other branch": ("tl.where(v > 0, dz, dz * SLOPE)", "tl.where(v < 0, dz, dz * SLOPE)",
                                       "bn_act_reduce"),
    "uncentred": ("result += along * (value - m)", "result += along * value", "bn_act_backward"),
    "lane means left out": ("+ counts * apart * apart", "", "bn_stats"),
    "Chan's term left out": ("+ n * apart * apart", "", "bn_stats"),
    "invstd left out of dgamma": ("r * tl.sum(tl.load(part_weight", "tl.sum(tl.load(part_weight", "bn_act_reduce"),
    "channel of the wrong axis": ("+ r) % channels)[:, None]", "+ r) // channels)[:, None]", "bn_act"),
    "last column dropped": ("c < _left(columns, column, BL)", "c < _left(columns, column, BL) - 1", "bn_act"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(planted_kernels, monkeypatch, bug, dtype):
    """By the comparison at a kernel's first use as well, which lets 8 times PyTorch's own error pass."""
    right, wrong, name = PLANTED[bug]
    module = planted_kernels(kernels, right, wrong)
    monkeypatch.setattr(tuning, "CONFIGURATIONS", (tuning.Configuration(64, 4),))
    module.TILE, module.PROGRAMS = 64, 12  # several tiles and splits on few elements, so that nothing can hide
    several = [arguments(name, (2, 3, 5, 7), "contiguous", dtype, 0.2, seed) for seed in range(4)]
    assert verdict(module, name, several, first_use.FACTOR) is not None
