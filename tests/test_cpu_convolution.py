"""The CPU kernels of the 4x4 stride-2 convolution against the fp64 definition."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_right_as_torch
from torch import Tensor

from fastgan import library

AUTOMATIC, WINOGRAD, DIRECT = 0, 1, 2
SHAPES = [  # N, C, K, H, W of the small side, whether the large side has an odd last row and column
    (1, 1, 1, 1, 1, False),
    (2, 3, 64, 8, 8, False),
    (1, 17, 3, 5, 3, True),
    (2, 1, 16, 3, 7, True),
    (3, 16, 32, 8, 8, False),
    (2, 64, 17, 5, 6, False),
    (1, 100, 64, 4, 4, True),
    (2, 64, 128, 6, 9, True),
    (2, 128, 130, 2, 4, False),
    (9, 17, 130, 3, 6, True),  # batches large enough for each thread to take images on its own
    (9, 24, 20, 4, 5, False),
    # Few channels: images read in place in some directions, a register of channels and one that is not full.
    (3, 12, 24, 8, 9, True),
    (2, 16, 40, 8, 8, False),
    (5, 6, 20, 5, 4, True),
    # Thin: one row, one column, few and many terms, rows longer than a run of sums, each number of registers.
    (2, 2, 24, 1, 6, False),
    (2, 4, 40, 7, 1, True),
    (3, 1, 130, 4, 2, False),
    (1, 3, 20, 2, 70, True),
    (1, 2, 16, 1, 70, False),
    # Tiles: images side by side, an odd number of them, ragged blocks of channels, rows of many tiles; a weight so
    # large that images are read some channels at a time.
    (33, 40, 33, 4, 4, False),
    (7, 33, 48, 2, 3, True),
    (16, 5, 20, 1, 1, False),
    (3, 64, 64, 16, 16, False),
    (2, 3, 16, 4, 90, True),
    (21, 4, 7, 3, 5, True),
    (33, 200, 300, 4, 4, False),
    # More than 12 MB of operands, which are walked in steps of some images.
    (5, 16, 16, 80, 80, False),
    (5, 8, 8, 72, 72, True),
]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    library.load("cpu")
    if torch.ops.fastgan_cpu.instruction_set() == "plain":
        pytest.skip("this processor has no AVX2: the stack leaves convolutions to the library here")
    return torch.ops.fastgan_cpu


def channels_last(*shape: int, offset: float = 0.0) -> Tensor:
    return (torch.randn(shape) + offset).contiguous(memory_format=torch.channels_last)


def sides(N, C, K, H, W, odd, dtype=torch.float32):
    torch.manual_seed(N + C + K)
    large, small = channels_last(N, C, 2 * H + odd, 2 * W + odd), channels_last(N, K, H, W)
    return large.to(dtype), small.to(dtype), (torch.randn(K, C, 4, 4) / (4 * C**0.5)).to(dtype)


def convolve(operand, weight, to_large, size, scheme=AUTOMATIC, statistics=False, output=(None, None, 1.0)):
    value, second, constants, slope = (*operand, *(None, None, 1.0)[len(operand) - 1 :])
    return torch.ops.fastgan_cpu.convolve(
        value, second, constants, slope, weight, to_large, *size, statistics, *output, scheme
    )


def to_small(large: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(large, weight, None, 2, 1)


def gradients(large: Tensor, small: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the large side (which is the transposed convolution of `small`) and of the weight."""
    mask = [True, True, False]
    return torch.ops.aten.convolution_backward(
        small, large, weight, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, mask
    )[:2]


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_directions_are_as_right_as_the_library(shape, dtype):
    large, small, weight = sides(*shape, dtype)
    truth = to_small(large.double(), weight.double())
    got, _ = convolve([large], weight, False, small.shape[2:])
    assert_as_right_as_torch(got, to_small(large, weight), truth, "to small")
    truths, own = gradients(large.double(), small.double(), weight.double()), gradients(large, small, weight)
    got, _ = convolve([small], weight, True, large.shape[2:])
    assert_as_right_as_torch(got, own[0], truths[0], "to large")
    # The sum over a handful of pixels is exact to the last bit in the library now and then: that is luck, not a rule.
    got = torch.ops.fastgan_cpu.weight_gradient(large, None, None, 1.0, small, None, None, 1.0, False, AUTOMATIC)
    assert_as_right_as_torch(got, own[1], truths[1], "weight gradient")


@pytest.mark.parametrize("scheme", [WINOGRAD, DIRECT], ids=["winograd", "direct"])
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_schemes_compute_the_definition_in_fp64(shape, scheme, dtype):
    large, small, weight = sides(*shape, dtype)
    close = {"rtol": 1e-12, "atol": 1e-11}  # weight gradients are sums of up to 19,200 terms
    torch.testing.assert_close(
        convolve([large], weight, False, small.shape[2:], scheme)[0], to_small(large, weight), **close
    )
    dlarge, dweight = gradients(large, small, weight)
    torch.testing.assert_close(convolve([small], weight, True, large.shape[2:], scheme)[0], dlarge, **close)
    got = torch.ops.fastgan_cpu.weight_gradient(large, None, None, 1.0, small, None, None, 1.0, False, scheme)
    torch.testing.assert_close(got, dweight, **close)


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 8, 8, False), (2, 17, 40, 5, 6, True), (2, 64, 128, 8, 8, False)], ids=str
)
def test_weight_layouts_give_the_same_bits(shape):
    large, small, weight = sides(*shape)
    nothing = (None, None, 1.0)
    both = []
    for last in (False, True):
        stored = weight.contiguous(memory_format=torch.channels_last) if last else weight
        gradient = torch.ops.fastgan_cpu.weight_gradient(large, *nothing, small, *nothing, last, AUTOMATIC)
        assert gradient.is_contiguous(memory_format=torch.channels_last) == last
        to_large = convolve([small], stored, True, large.shape[2:])[0]
        both.append((convolve([large], stored, False, small.shape[2:])[0], to_large, gradient))
    for one, two in zip(*both, strict=True):
        assert torch.equal(one, two)


def activation_constants(channels: int, dtype=torch.float64) -> Tensor:
    """[mu, s, beta, 1/std] with mu and beta far from 0, so that a wrong order of padding and prologue shows."""
    rows = (torch.randn(channels) + 3, torch.rand(channels) + 0.5, torch.randn(channels) + 5, torch.rand(channels) + 1)
    return torch.stack(rows).to(dtype)


def activate(y: Tensor, constants: Tensor, slope: float) -> Tensor:
    mu, s, beta, _ = constants[:, :, None, None]
    return F.leaky_relu(s * (y - mu) + beta, slope)


@pytest.mark.parametrize("scheme", [AUTOMATIC, WINOGRAD, DIRECT], ids=["automatic", "winograd", "direct"])
@pytest.mark.parametrize("shape", [(2, 17, 24, 5, 6, True), (2, 32, 16, 4, 4, False), (2, 12, 24, 8, 9, True)], ids=str)
def test_prologue_comes_before_the_zero_padding(shape, scheme):
    large, small, weight = (t.double() for t in sides(*shape))
    constants, slope = activation_constants(large.shape[1]), 0.2
    truth = to_small(activate(large, constants, slope), weight)
    got, _ = convolve([large, None, constants, slope], weight, False, small.shape[2:], scheme)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    padded_first = F.conv2d(activate(F.pad(large, [1] * 4), constants, slope), weight, None, 2, 0)
    assert (padded_first - truth).abs().max() > 1, "the planted order of padding and prologue would not show here"


@pytest.mark.parametrize("scheme", [AUTOMATIC, WINOGRAD, DIRECT], ids=["automatic", "winograd", "direct"])
@pytest.mark.parametrize("shape", [(2, 17, 24, 5, 6, True), (2, 12, 24, 8, 9, True)], ids=str)
def test_gradient_operand_and_backward_finish(shape, scheme):
    large, small, weight = (t.double() for t in sides(*shape))
    raw, by = channels_last(*small.shape).double(), activation_constants(small.shape[1])
    a, b, c, mu = by[:, :, None, None]
    dy = a * small + b * (raw - mu) + c
    constants, slope = activation_constants(large.shape[1]), 0.2
    mean, s, beta, _ = constants[:, :, None, None]
    g = gradients(large, dy, weight)[0]
    g = torch.where(s * (large - mean) + beta > 0, g, slope * g)
    got, sums = convolve([small, raw, by, 1.0], weight, True, large.shape[2:], scheme, output=(large, constants, slope))
    torch.testing.assert_close(got, g, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(sums, torch.stack([g.sum((0, 2, 3)), (g * (large - mean)).sum((0, 2, 3))]))
    got = torch.ops.fastgan_cpu.weight_gradient(large, None, constants, slope, small, raw, by, 1.0, False, scheme)
    truth = gradients(activate(large, constants, slope), dy, weight)[1]
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(
    "shape",
    [(2, 17, 24, 5, 6, True), (3, 64, 130, 4, 4, False), (2, 3, 40, 4, 5, True), (2, 12, 24, 8, 9, True)],
    ids=str,
)
def test_prologues_and_backward_finish_in_fp32(shape):
    """Every operand and result of training's dtype: the sets with wide registers have no copy for fp64."""
    large, small, weight = sides(*shape)
    raw = channels_last(*small.shape)
    # Gradients through statistics have no mean to speak of.
    by = torch.randn(4, small.shape[1]) * torch.tensor([1, 0.1, 0.1, 1])[:, None]
    constants, slope = activation_constants(large.shape[1], torch.float32), 0.2

    def definition(dtype):
        given = large, small, raw, weight, by, constants
        large_, small_, raw_, weight_, by_, constants_ = (t.to(dtype) for t in given)
        z = activate(large_, constants_, slope)
        a, b, c, mu = by_[:, :, None, None]
        dz, dweight = gradients(z, a * small_ + b * (raw_ - mu) + c, weight_)
        mean, s, beta, _ = constants_[:, :, None, None]
        g = torch.where(s * (large_ - mean) + beta > 0, dz, slope * dz)
        return (to_small(z, weight_), g, dweight), torch.stack([g, g * (large_ - mean)])

    y, _ = convolve([large, None, constants, slope], weight, False, small.shape[2:])
    g, sums = convolve([small, raw, by, 1.0], weight, True, large.shape[2:], output=(large, constants, slope))
    args = (large, None, constants, slope, small, raw, by, 1.0, False, AUTOMATIC)
    dweight = torch.ops.fastgan_cpu.weight_gradient(*args)
    truth, terms = definition(torch.float64)
    assert_as_right_as_torch((y, g, dweight), definition(torch.float32)[0], truth)
    assert ((sums - terms.sum((1, 3, 4))).abs() <= 1e-6 * terms.abs().sum((1, 3, 4))).all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("to_large", [False, True])
def test_statistics_are_those_of_the_stored_output(to_large, offset):
    large, small, weight = sides(3, 32, 48, 20, 12, False)
    weight = weight + offset / weight[0].numel()
    operand, size = (small, large.shape[2:]) if to_large else (large, small.shape[2:])
    y, sums = convolve([operand + 1], weight, to_large, size, statistics=True)
    truth = y.double()
    mean, var = truth.mean((0, 2, 3)), truth.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(sums[0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums[1].double() / (y.numel() // y.shape[1]), var, rtol=2e-5, atol=0)


def test_a_thin_weight_gradient_of_more_images_than_are_kept():
    large, small, weight = sides(131, 3, 8, 2, 2, False)
    got = torch.ops.fastgan_cpu.weight_gradient(large, None, None, 1.0, small, None, None, 1.0, False, AUTOMATIC)
    own, truth = gradients(large, small, weight)[1], gradients(large.double(), small.double(), weight.double())[1]
    assert_as_right_as_torch(got, own, truth)


def test_a_thread_alone_takes_images_on_its_own():
    """With more threads they share each product of the larger batches above instead."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for shape in [(9, 17, 130, 3, 6, True), (9, 24, 20, 4, 5, False)]:
            test_all_directions_are_as_right_as_the_library(shape, torch.float32)
    finally:
        torch.set_num_threads(before)


def test_relu_stops_gradients_that_are_not_finite():
    """Where every unit is dead, the sums of the finished gradient are 0, whatever comes from above."""
    large, small, weight = sides(1, 32, 32, 4, 4, False)
    small[0, 3, 2, 1], small[0, 4, 0, 0] = float("inf"), float("nan")
    constants = torch.stack([torch.zeros(32), torch.ones(32), torch.full((32,), -100.0), torch.ones(32)])
    g, sums = convolve([small], weight, True, large.shape[2:], output=(large, constants, 0.0))
    assert not g.any()
    assert not sums.any()


@pytest.mark.parametrize(("channels", "filters"), [(3, 130), (16, 40), (24, 130), (64, 130), (200, 300)])
def test_bits_do_not_depend_on_the_number_of_threads(channels, filters):
    """Nor on whether a thread takes images on its own, as one alone does with 5, or all share each product, nor on how
    many channels of how many images it takes at a time where the weight is large."""
    large, small, weight = sides(5, channels, filters, 8, 8, False)
    constants = activation_constants(channels, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weights = torch.ops.fastgan_cpu.weight_gradient(
                large, None, constants, 0.2, small, None, None, 1.0, False, AUTOMATIC
            )
            up = convolve([small], weight, True, (16, 16), statistics=True)
            down = convolve([large, None, constants, 0.2], weight, False, (8, 8), statistics=True)
            results.append((*down, *up, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_bits_of_a_gradient_that_is_summed_in_turns_do_not_depend_on_the_number_of_threads():
    """A turn takes as many images as a cache holds. A multiple of the threads would start sums anew elsewhere."""
    large, small, _ = sides(41, 64, 64, 16, 16, False)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            operands = (large, None, None, 1.0, small, None, None, 1.0)
            results.append(torch.ops.fastgan_cpu.weight_gradient(*operands, True, AUTOMATIC))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty_batch():
    weight = torch.randn(8, 4, 4, 4)
    y, sums = convolve([channels_last(0, 4, 6, 6)], weight, False, (3, 3), statistics=True)
    assert y.shape == (0, 8, 3, 3)
    assert not sums.any()
    args = (channels_last(0, 4, 6, 6), None, None, 1.0, y, None, None, 1.0, False, AUTOMATIC)
    assert not torch.ops.fastgan_cpu.weight_gradient(*args).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value):
    """Winograd mixes a tile's values: more elements than the definition's may become NaN, never fewer."""
    large, small, weight = sides(1, 32, 32, 4, 4, False)
    large[0, 3, 2, 5] = value
    got, _ = convolve([large], weight, False, small.shape[2:])
    expected = ~torch.isfinite(to_small(large, weight))
    assert expected.any()
    assert not torch.isfinite(got[expected]).any()


@pytest.mark.parametrize("channels", [3, 8, 12, 17, 24])
@pytest.mark.parametrize("scheme", [AUTOMATIC, WINOGRAD, DIRECT], ids=["automatic", "winograd", "direct"])
def test_nothing_of_an_earlier_call_is_read(channels, scheme):
    """Working memory is kept between calls: what a call with NaN leaves in it must not reach the next."""
    large, small, weight = sides(2, 32, 32, 8, 8, False)
    nothing = (None, None, 1.0)

    def run(large, small, weight):
        to_large = convolve([small], weight, True, (16, 16), scheme)[0]
        gradient = torch.ops.fastgan_cpu.weight_gradient(large, *nothing, small, *nothing, False, scheme)
        return convolve([large], weight, False, (8, 8), scheme)[0], to_large, gradient

    for result in run(large * torch.nan, small * torch.nan, weight * torch.nan):
        assert result.isnan().all()
    for result in run(*sides(2, channels, channels, 8, 8, False)):
        assert result.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e37])
def test_scales(scale):
    large, small, weight = sides(2, 64, 64, 4, 4, False)
    got, _ = convolve([large * scale], weight, False, small.shape[2:])
    own, truth = to_small(large * scale, weight), to_small((large * scale).double(), weight.double())
    assert_as_right_as_torch(got, own, truth)


@pytest.mark.parametrize("shape", [(64, 32, 32, 16, 16, False), (2, 1024, 16, 2, 4, False)], ids=str)
def test_long_sums_of_one_sign(shape):
    """Parts of numbers that were cut off, not rounded, and sums that were not taken in runs, lose what is small."""
    large, small, weight = (tensor.abs() for tensor in sides(*shape))
    got, _ = convolve([large], weight, False, small.shape[2:])
    truth = to_small(large.double(), weight.double())
    assert_as_right_as_torch(got, to_small(large, weight), truth, "to small")
    got = torch.ops.fastgan_cpu.weight_gradient(large, None, None, 1.0, small, None, None, 1.0, False, AUTOMATIC)
    own, truth = gradients(large, small, weight)[1], gradients(large.double(), small.double(), weight.double())[1]
    assert_as_right_as_torch(got, own, truth, "weight gradient")


def test_numbers_that_are_hardly_any_leave_no_more_error_than_that():
    """AMX takes denormal numbers for 0. What 1,024 terms lose by it is a small multiple of the least normal number, 24
    to 49 times that at scales from 1e-36 to 1e-34, where results reach 280 times that and more."""
    large, small, weight = sides(2, 64, 64, 4, 4, False)
    got, _ = convolve([large * 1e-36], weight, False, small.shape[2:])
    truth = to_small((large * 1e-36).double(), weight.double())
    assert (got - truth).abs().max() <= 64 * torch.finfo(torch.float32).tiny
    assert truth.abs().max() > 256 * torch.finfo(torch.float32).tiny


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (8, 5, 4, 4)}, r"input must have shape \[2, 5, 6, 6\], got \[2, 4, 6, 6\]"),
        ({"weight": (8, 4, 3, 4)}, r"weight must have shape \[8, 4, 4, 4\], got \[8, 4, 3, 4\]"),
        ({"size": (3, 4)}, "the large side must be twice the small one or one more, got 6 and 4"),
    ],
)
def test_errors_say_what_was_expected(change, message):
    with pytest.raises(RuntimeError, match=message):
        convolve(
            [channels_last(2, 4, 6, 6)],
            torch.randn(change.get("weight", (8, 4, 4, 4))),
            False,
            change.get("size", (3, 3)),
        )


def test_wrong_layout_and_dtype_are_named():
    with pytest.raises(RuntimeError, match="input must be channels-last"):
        convolve([torch.randn(2, 4, 6, 6)], torch.randn(8, 4, 4, 4), False, (3, 3))
    with pytest.raises(RuntimeError, match="weight must have the dtype"):
        convolve([channels_last(2, 4, 6, 6)], torch.randn(8, 4, 4, 4).double(), False, (3, 3))


FINE = (channels_last(2, 4, 6, 6), None, None, 1.0, torch.randn(8, 4, 4, 4), False, 3, 3, 0, None, None, 1.0, 0)
CONSTANTS, OTHER = torch.randn(4, 4), channels_last(2, 8, 3, 3)
BOTH = (channels_last(2, 4, 6, 6), None, None, 1.0, OTHER, None, None, 1.0, False, 0)


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        ("convolve", {0: torch.randn(4, 6, 6)}, "input and weight must have 4 dimensions"),
        ("convolve", {0: channels_last(2, 4, 6, 6).half()}, "input must be float32, float64 or bfloat16"),
        ("convolve", {0: channels_last(2, 4, 6, 6).double()}, "weight must have the dtype"),
        ("convolve", {0: channels_last(2, 0, 6, 6), 4: torch.randn(8, 0, 4, 4)}, "at least one channel.*got 0 and 8"),
        ("convolve", {4: torch.randn(0, 4, 4, 4)}, "at least one channel.*got 4 and 0"),
        ("convolve", {1: channels_last(2, 4, 6, 6)}, "a second operand needs constants"),
        ("convolve", {2: torch.randn(12, 4)}, "3 sets of constants must divide the batch, got 2 images"),
        ("convolve", {2: torch.randn(3, 4)}, r"constants must have shape \[4, 4\]"),
        ("convolve", {8: 3}, "statistics are of equal parts of the batch, got 3 parts of 2 images"),
        ("convolve", {9: OTHER}, "output_y and output_constants come together"),
        ("convolve", {8: 1, 9: OTHER, 10: torch.randn(4, 8)}, "statistics and output_y exclude each other"),
        ("convolve", {9: CONSTANTS, 10: torch.randn(4, 8)}, "output_y must have shape"),
        ("convolve", {12: 7}, "scheme must be 0, 1 or 2, got 7"),
        ("weight_gradient", {4: torch.randn(8, 3, 3)}, "both sides must have 4 dimensions"),
        ("weight_gradient", {4: channels_last(2, 0, 3, 3)}, "at least one channel.*got 4 and 0"),
        ("weight_gradient", {4: channels_last(3, 8, 3, 3)}, "small side must have shape"),
        ("weight_gradient", {4: channels_last(2, 8, 2, 3)}, "must be twice the small one or one more, got 6 and 2"),
        ("weight_gradient", {9: -1}, "scheme must be 0, 1 or 2, got -1"),
    ],
)
def test_wrong_operands_are_refused(operator, changes, message):
    args = [changes.get(i, value) for i, value in enumerate(FINE if operator == "convolve" else BOTH)]
    with pytest.raises(RuntimeError, match=f"{operator}: .*{message}"):
        getattr(torch.ops.fastgan_cpu, operator)(*args)


def test_block_constants_refuse_what_they_would_misread():
    ops, sums = torch.ops.fastgan_cpu, torch.randn(2, 4)

    def constants(sums=sums, count=8, weight=None, running=(None, None)):
        return ops.block_constants(sums, count, weight, None, 1e-5, *running, [0.1])

    for changes, message in [
        ({"sums": sums.bfloat16()}, "sums must be float32 or float64"),
        ({"sums": torch.randn(4, 4)}, r"sums must have shape \[2, 4\]"),
        ({"weight": torch.ones(3)}, r"weight must have shape \[4\]"),
        ({"weight": torch.ones(4).double()}, "weight must have the dtype"),
        ({"running": (torch.zeros(4), None)}, "running_mean and running_var come together"),
        (
            {"count": 1, "running": (torch.zeros(4), torch.ones(4))},
            "the running variance needs more than 1 value per channel",
        ),
    ]:
        with pytest.raises(RuntimeError, match=f"block_constants: {message}"):
            constants(**changes)
    with pytest.raises(RuntimeError, match=r"constants must have shape \[4, 4\]"):
        ops.block_gradient_constants(sums, torch.randn(8, 4), 8)
    with pytest.raises(RuntimeError, match="sums must be float32 or float64"):
        ops.block_gradient_constants(sums.bfloat16(), torch.randn(4, 4).bfloat16(), 8)
