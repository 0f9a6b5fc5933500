"""The CPU kernels of the 4x4 stride-2 convolution in bf16 against the fp64 definition on the same numbers: on AMX with
products of bf16 numbers, elsewhere those for fp32, which read and write bf16."""

import pytest
import torch
import torch.nn.functional as F
from test_cpu_convolution import (
    AUTOMATIC,
    SHAPES,
    activate,
    activation_constants,
    channels_last,
    convolve,
    gradients,
    sides,
    to_small,
)
from tolerance import assert_as_right_as_torch
from torch import Tensor

from fastgan import library
from fastgan.backends import instruction_set

BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def kernels():
    library.load("cpu")
    if instruction_set(BF16) == "plain":
        pytest.skip("convolutions in bfloat16 need AVX2, which this processor, build or FASTGAN_CPU lacks")


def on_amx() -> bool:
    """Whether products are of bf16 numbers, by the definition; else they are of fp32, by Winograd's algorithm."""
    return instruction_set(BF16) == "amx"


def rounded_sides(*shape) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides in bf16; the weight in fp32, as the kernels take it, of numbers that bf16 has."""
    large, small, weight = sides(*shape)
    return large.to(BF16), small.to(BF16), weight.to(BF16).float()


def weight_gradient(large, small, layout_last=False) -> Tensor:
    """Of operands as `convolve` takes them."""
    large, small = ((*side, *(None, None, 1.0)[len(side) - 1 :]) for side in (large, small))
    return torch.ops.fastgan_cpu.weight_gradient(*large, *small, layout_last, AUTOMATIC)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_directions_are_as_right_as_the_library(shape, layout):
    large, small, weight = rounded_sides(*shape)
    weight, low = weight.contiguous(memory_format=layout), weight.to(BF16)
    got, sums = convolve([large], weight, False, small.shape[2:])
    assert got.dtype == BF16
    assert sums.numel() == 0
    # Sums in fp32, rounded once: in bf16 PyTorch 2.14 is wrong here where a result is one pixel wide (7, 1).
    own = to_small(large.float(), weight).to(BF16)
    assert_as_right_as_torch(got, own, to_small(large.double(), weight.double()), "to small")
    truths, own = gradients(large.double(), small.double(), weight.double()), gradients(large, small, low)
    got, _ = convolve([small], weight, True, large.shape[2:])
    assert_as_right_as_torch(got, own[0], truths[0], "to large")
    got = weight_gradient([large], [small], layout == torch.channels_last)
    assert got.dtype == torch.float32
    # The library rounds its to bf16: ours, which the optimiser takes in fp32, must be as right as sums in fp32 are,
    # whose products of bf16 numbers are exact. Winograd's transforms round.
    single, factor = gradients(large.float(), small.float(), weight), 2.0 if on_amx() else 4.0
    assert_as_right_as_torch(got, single[1], truths[1], "weight gradient", factor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_amx_it_is_the_convolution_in_fp32_rounded_once(shape):
    """Bit for bit, with weights and operands that are not rounded to bf16."""
    if on_amx():
        pytest.skip("on AMX products are of bf16 numbers")
    large, small, weight = sides(*shape)
    large, small = large.to(BF16), small.to(BF16)
    constants, by = activation_constants(large.shape[1], torch.float32), torch.randn(4, small.shape[1])

    def run(dtype):
        low, high = small.to(dtype), [large.to(dtype), None, constants, 0.2]
        down = convolve(high, weight, False, small.shape[2:])[0]
        up = convolve([low, low, by, 1.0], weight, True, large.shape[2:])[0]
        return down.to(BF16), up.to(BF16), weight_gradient(high, [low, low, by, 1.0])

    for got, expected in zip(run(BF16), run(torch.float32), strict=True):
        assert torch.equal(got, expected)


def test_weights_are_rounded_to_nearest():
    if not on_amx():
        pytest.skip("without AMX products are of fp32 numbers")
    large, small, weight = sides(2, 17, 24, 5, 6, True)
    large, small = large.to(BF16), small.to(BF16)
    rounded = weight.to(BF16).float()
    assert not torch.equal(weight, rounded)
    for operand, to_large, size in ((large, False, small.shape[2:]), (small, True, large.shape[2:])):
        got, expected = (convolve([operand], w, to_large, size)[0] for w in (weight, rounded))
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "shape",
    [(2, 17, 24, 5, 6, True), (3, 64, 130, 4, 4, False), (2, 3, 40, 4, 5, True), (5, 40, 7, 8, 9, True)],
    ids=str,
)
def test_prologues_come_before_the_zero_padding_and_finishes_after_the_sum(shape):
    """Constants are far from 0, so that phi(beta), C or a lane beyond the channels would show at every edge."""
    multiplied = BF16 if on_amx() else torch.float32
    large, small, weight = rounded_sides(*shape)
    raw = channels_last(*small.shape).to(BF16)
    by = torch.randn(4, small.shape[1]) * torch.tensor([1, 0.1, 0.1, 1])[:, None] + torch.tensor([0, 0, 2, 0])[:, None]
    constants, slope = activation_constants(large.shape[1], torch.float32), 0.2

    def definition(dtype, operand_dtype):
        """PyTorch rounds operands before they are multiplied, as it stores an activation; so do products of bf16."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        large_, small_, raw_, by_, constants_ = (t.to(wide) for t in (large, small, raw, by, constants))
        z = activate(large_, constants_, slope).to(operand_dtype).to(dtype)
        a, b, c, mu = by_[:, :, None, None]
        dy = (a * small_ + b * (raw_ - mu) + c).to(operand_dtype).to(dtype)
        dz = gradients(z, dy, weight.to(dtype))[0].to(wide)
        dweight = gradients(z.to(wide), dy.to(wide), weight.to(wide))[1]
        mean, s, beta, _ = constants_[:, :, None, None]
        g = torch.where(s * (large_ - mean) + beta > 0, dz, slope * dz)
        return to_small(z, weight.to(dtype)), g.to(dtype), dweight

    y, _ = convolve([large, None, constants, slope], weight, False, small.shape[2:])
    g, sums = convolve([small, raw, by, 1.0], weight, True, large.shape[2:], output=(large, constants, slope))
    dweight = weight_gradient([large, None, constants, slope], [small, raw, by, 1.0])
    # Against sums in fp64 of the same rounded operands, and (no rounding at all) against the plain definition.
    own = definition(BF16, BF16)
    for truth in (definition(torch.float64, multiplied), definition(torch.float64, torch.float64)):
        assert_as_right_as_torch((y, g), own[:2], truth[:2])
    # A kernel may round an operand next to a tie the other way than PyTorch does, after another order of operations.
    error = (dweight - definition(torch.float64, multiplied)[2]).norm() / dweight.norm()
    assert error < 1e-4, error
    padded_first = F.conv2d(
        activate(F.pad(large.double(), [1] * 4), constants.double(), slope), weight.double(), None, 2
    )
    whole = padded_first[..., : small.shape[2], : small.shape[3]]
    assert (whole - y.double()).abs().max() > 1, "the planted order of padding and prologue would not show here"
    # The sums are of what is stored.
    mean = constants[0][None, :, None, None].double()
    terms = torch.stack([g.double(), g.double() * (large.double() - mean)])
    assert ((sums - terms.sum((1, 3, 4))).abs() <= 1e-5 * terms.abs().sum((1, 3, 4))).all()


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("to_large", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_statistics_are_those_of_the_stored_output(to_large, offset, parts):
    large, small, weight = rounded_sides(3, 32, 48, 20, 12, False)
    weight = weight + offset / weight[0].numel()
    operand, size = (small, large.shape[2:]) if to_large else (large, small.shape[2:])
    y, sums = convolve([operand + 1], weight, to_large, size, statistics=parts)
    assert sums.dtype == torch.float32
    for part, (mean, m2) in zip(y.double().chunk(parts), sums.double().view(parts, 2, -1), strict=True):
        torch.testing.assert_close(mean, part.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        var = m2 / (part.numel() // part.shape[1])
        torch.testing.assert_close(var, part.var((0, 2, 3), unbiased=False), rtol=2e-5, atol=0)


def test_each_batch_takes_its_own_constants():
    """Also where images of two batches stand side by side in one tile, or in one pair."""
    large, small, weight = rounded_sides(6, 20, 24, 4, 4, False)
    constants = torch.cat([activation_constants(20, torch.float32) for _ in range(2)])
    by = torch.randn(8, 24)
    together = convolve([large, None, constants, 0.2], weight, False, (4, 4))[0]
    g, sums = convolve([small, small, by, 1.0], weight, True, (8, 8), output=(large, constants, 0.2))
    dweight = weight_gradient([large, None, constants, 0.2], [small, small, by, 1.0])
    parts = []
    for which, (x, y) in enumerate(zip(large.chunk(2), small.chunk(2), strict=True)):
        own, grad = constants[4 * which : 4 * which + 4], by[4 * which : 4 * which + 4]
        assert torch.equal(convolve([x, None, own, 0.2], weight, False, (4, 4))[0], together.chunk(2)[which])
        own_g, own_sums = convolve([y, y, grad, 1.0], weight, True, (8, 8), output=(x, own, 0.2))
        assert torch.equal(own_g, g.chunk(2)[which])
        assert torch.equal(own_sums, sums[2 * which : 2 * which + 2])
        parts.append(weight_gradient([x, None, own, 0.2], [y, y, grad, 1.0]))
    torch.testing.assert_close(dweight, sum(parts), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("channels", "filters"), [(3, 130), (16, 40), (64, 130)])
def test_bits_do_not_depend_on_the_number_of_threads(channels, filters):
    large, small, weight = rounded_sides(9, channels, filters, 8, 8, False)
    constants = activation_constants(channels, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            down = convolve([large, None, constants, 0.2], weight, False, (8, 8), statistics=True)
            up = convolve([small], weight, True, (16, 16), statistics=True)
            results.append((*down, *up, weight_gradient([large, None, constants, 0.2], [small])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("channels", [3, 8, 17, 40])
def test_nothing_of_an_earlier_call_is_read(channels):
    """Working memory is kept between calls: what a call with NaN leaves in it must not reach the next."""

    def run(large, small, weight):
        up = convolve([small], weight, True, large.shape[2:])[0]
        return convolve([large], weight, False, small.shape[2:])[0], up, weight_gradient([large], [small])

    large, small, weight = rounded_sides(4, 64, 64, 9, 9, True)
    for result in run(large * torch.nan, small * torch.nan, weight * torch.nan):
        assert result.isnan().all()
    for shape in [(3, channels, channels, 7, 5, True), (1, channels, channels, 3, 3, False)]:
        for result in run(*rounded_sides(*shape)):
            assert result.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(value):
    """There is no transform that mixes pixels: the definition's elements and no others become so."""
    if not on_amx():
        pytest.skip("Winograd's transforms mix pixels: test_cpu_convolution.py")
    large, small, weight = rounded_sides(3, 32, 32, 4, 4, False)
    large[1, 3, 2, 5] = value
    got, _ = convolve([large], weight, False, small.shape[2:])
    assert torch.equal(torch.isfinite(got), torch.isfinite(to_small(large.float(), weight)))


def test_relu_stops_gradients_that_are_not_finite():
    large, small, weight = rounded_sides(1, 32, 32, 4, 4, False)
    small[0, 3, 2, 1], small[0, 4, 0, 0] = float("inf"), float("nan")
    constants = torch.stack([torch.zeros(32), torch.ones(32), torch.full((32,), -100.0), torch.ones(32)])
    g, sums = convolve([small], weight, True, large.shape[2:], output=(large, constants, 0.0))
    assert not g.any()
    assert not sums.any()


def test_empty_batch():
    weight = torch.randn(8, 4, 4, 4)
    y, sums = convolve([channels_last(0, 4, 6, 6).to(BF16)], weight, False, (3, 3), statistics=True)
    assert y.shape == (0, 8, 3, 3)
    assert not sums.any()
    assert not weight_gradient([channels_last(0, 4, 6, 6).to(BF16)], [y]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({4: torch.randn(8, 4, 4, 4).to(BF16)}, "weight must have the dtype"),
        ({2: torch.randn(4, 4).to(BF16)}, "constants must have the dtype"),
        ({2: torch.randn(4, 4), 1: channels_last(2, 4, 6, 6)}, "second operand must have the dtype"),
    ],
)
def test_what_must_be_in_fp32_is_refused_in_bf16(changes, message):
    args = [
        channels_last(2, 4, 6, 6).to(BF16),
        None,
        None,
        1.0,
        torch.randn(8, 4, 4, 4),
        False,
        3,
        3,
        0,
        None,
        None,
        1.0,
        0,
    ]
    args = [changes.get(i, value) for i, value in enumerate(args)]
    with pytest.raises(RuntimeError, match=f"convolve: {message}"):
        torch.ops.fastgan_cpu.convolve(*args)
