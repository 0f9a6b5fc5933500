"""The CUDA kernels of bn_act, run thread by thread on the host, against the definition."""

from functools import partial
from itertools import product

import pytest
import torch
from simt import DTYPES, run_clean, simt, to_input, to_output

from fastgan.ops import bn_act_eager as eager
from fastgan.tolerance import misses

# N, C, H, W: one value short of and past every block boundary that a few thousand values can reach, and no whole 16 bytes.
SHAPES = [(1, 1, 1, 7), (2, 3, 5, 3), (3, 65, 1, 3), (2, 16, 4, 4), (5, 24, 1, 1), (1, 8, 37, 8), (130, 8, 4, 2)]
SHAPES += [(1, 3, 35, 31)]  # channels-last, the ragged rest of the rows beside more than one block
LAYOUTS = ["channels_last", "contiguous"]
SEEDS = [0, 3]


def values(shape, layout, dtype, seed=0):
    """A dense tensor in the layout; its storage starts at a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    x = torch.randn(n, c, h, w, generator=generator) * 2 + 3
    flat = x.permute(0, 2, 3, 1) if layout == "channels_last" else x
    flat = flat.contiguous().to(dtype)
    return flat.permute(0, 3, 1, 2) if layout == "channels_last" else flat


def memory(tensor, layout):
    """The tensor as its memory lies."""
    return tensor.permute(0, 2, 3, 1) if layout == "channels_last" else tensor


def arrays(layout, *tensors):
    return [to_input(memory(t, layout)) for t in tensors]


def channels(c, y):
    """mean and invstd of y, and weight (one negative) and bias far from 0, so that a misplaced term shows."""
    mean, m2 = eager.stats(y)
    invstd = torch.rsqrt(m2 / (y.numel() // c) + 1e-5)
    weight = torch.linspace(-2, 2, c) if c > 1 else torch.tensor([1.5])
    bias = torch.linspace(3, -1, c)
    return mean, invstd, weight.contiguous(), bias.contiguous()


def twice(shape, run):
    """Results of the kernel for two orders of the threads, which must be the same bits."""
    first, second = (run(seed) for seed in SEEDS)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return first


def check(got, own, truth):
    reason = misses(tuple(got), own, truth)
    assert reason is None, reason


cases = pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    list(product(SHAPES, LAYOUTS, DTYPES)),
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch."),
)


def stats(y, layout, seed):
    mean, m2 = torch.empty(y.shape[1]), torch.empty(y.shape[1])
    code = DTYPES[y.dtype]
    last = layout == "channels_last"
    run_clean(
        simt().bn_stats, code, tuple(y.shape), last, *arrays(layout, y), to_output(mean), to_output(m2), seed=seed
    )
    return mean, m2


def apply(y, layout, per_channel, slope, seed):
    z = torch.empty_like(y)
    last = layout == "channels_last"
    (source,) = arrays(layout, y)
    given = tuple(map(to_input, per_channel))
    target = to_output(memory(z, layout))
    run_clean(simt().bn_act, DTYPES[y.dtype], tuple(y.shape), last, source, given, slope, target, seed=seed)
    return (z,)


def reduce(dz, y, layout, per_channel, slope, seed):
    sums = torch.empty(y.shape[1]), torch.empty(y.shape[1])
    last = layout == "channels_last"
    given = tuple(map(to_input, per_channel))
    sources = arrays(layout, dz, y)
    targets = map(to_output, sums)
    run_clean(simt().bn_act_reduce, DTYPES[y.dtype], tuple(y.shape), last, *sources, given, slope, *targets, seed=seed)
    return sums


def backward(dz, y, layout, per_channel, slope, sums, count, seed):
    dy = torch.empty_like(y)
    last = layout == "channels_last"
    given = tuple(map(to_input, per_channel))
    sources = arrays(layout, dz, y)
    sums = map(to_input, sums)
    target = to_output(memory(dy, layout))
    run_clean(
        simt().bn_act_backward,
        *(DTYPES[y.dtype], tuple(y.shape), last, *sources, given, slope, *sums, count, target),
        seed=seed,
    )
    return (dy,)


@cases
def test_statistics(shape, layout, dtype):
    y = values(shape, layout, dtype)
    got = twice(shape, lambda seed: stats(y, layout, seed))
    check(got, eager.stats(y), eager.stats(y.double()))


@cases
def test_forward(shape, layout, dtype):
    y = values(shape, layout, dtype)
    given = channels(shape[1], y)
    for slope in (0.2, 0.0, 1.0):
        got = twice(shape, lambda seed, s=slope: apply(y, layout, given, s, seed))
        truth = eager.apply(y.double(), *(t.double() for t in given), slope)
        check(got, (eager.apply(y, *given, slope),), (truth,))


@cases
def test_backward(shape, layout, dtype):
    y, dz = values(shape, layout, dtype), values(shape, layout, dtype, seed=1)
    given = channels(shape[1], y)
    dz = eager.settle("bn_act_reduce", (dz, y, *given, 0.2))[0]
    dz = memory(dz, layout).contiguous()
    dz = dz.permute(0, 3, 1, 2) if layout == "channels_last" else dz
    wide = [t.double() for t in (dz, y, *given)]
    count = y.numel() // shape[1]
    for slope in (0.2, 0.0):
        sums = twice(shape, lambda seed, s=slope: reduce(dz, y, layout, given, s, seed))
        check(sums, eager.reduce(dz, y, *given, slope), eager.reduce(*wide, slope))
        for n in (count, 0):
            got = twice(shape, partial(backward, dz, y, layout, given, slope, sums, n))
            used = (None, None) if n == 0 else sums
            truth_sums = (None, None) if n == 0 else [t.double() for t in sums]
            own = eager.backward(dz, y, *given, slope, *used, n)
            check(got, (own,), (eager.backward(*wide, slope, *truth_sums, n),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_values_far_from_zero(layout):
    """mean / std = 1e4: the sum of squares minus the square of the sum would have no digit left."""
    y = values((4, 8, 9, 9), layout, torch.float32) / 2e4 + 1.0
    got = stats(y, layout, 0)
    check(got, eager.stats(y), eager.stats(y.double()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_addresses_that_are_no_multiple_of_16(layout):
    """A view that starts one element into its storage takes the scalar kernels, and the same results."""
    shape = (2, 8, 4, 4)
    y = values(shape, layout, torch.float32)
    given = channels(8, y)
    shifted = torch.empty(y.numel() + 1)[1:].view(memory(y, layout).shape).copy_(memory(y, layout))
    shifted = shifted.permute(0, 3, 1, 2) if layout == "channels_last" else shifted
    assert shifted.data_ptr() % 16 == 4
    (z,) = apply(shifted, layout, given, 0.2, 0)
    assert torch.equal(z, apply(y, layout, given, 0.2, 0)[0])
    check(stats(shifted, layout, 0), eager.stats(y), eager.stats(y.double()))


@pytest.mark.parametrize("slope", [0.2, 0.0, 1.0])
def test_infinity_and_nan_like_the_definition(slope):
    y = torch.tensor([[float("-inf"), float("inf"), float("nan"), -2.0, 0.0, 2.0, -0.0, 1.0]]).view(1, 1, 1, 8)
    given = (torch.zeros(1), torch.ones(1), torch.ones(1), torch.zeros(1))
    (z,) = apply(y, "contiguous", given, slope, 0)
    torch.testing.assert_close(z, eager.apply(y, *given, slope), rtol=0, atol=0, equal_nan=True)
    dz = torch.ones_like(y)
    (dy,) = backward(dz, y, "contiguous", given, slope, (torch.zeros(1), torch.zeros(1)), 0, 0)
    own = eager.backward(dz, y, *given, slope, None, None, 0)
    torch.testing.assert_close(dy, own, rtol=0, atol=0, equal_nan=True)
