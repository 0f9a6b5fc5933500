"""The Triton convolutions against the fp64 definition, kernel by kernel, each way of reading and of writing."""

import itertools

import fastgan.kernels.conv_bn_act as kernels
import fastgan.kernels.conv_bn_act_arrivals as arrivals
import fastgan.kernels.conv_bn_act_constants as constant_kernels
import fastgan.kernels.conv_bn_act_operand as operand_kernels
import fastgan.kernels.conv_bn_act_tiles as tiles
import fastgan.kernels.conv_bn_act_wgrad as wgrad_kernels
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from convolution_cases import (
    EPILOGUES,
    OPERANDS,
    Case,
    convolve_arguments,
    finished,
    verdict,
    weight_gradient_arguments,
)  # fmt: skip
from pairwise import pairwise
from triton_device import DEVICE, MARKS

from fastgan import backends
from fastgan.ops import conv_bn_act_eager as eager
from fastgan.tolerance import misses

pytestmark = MARKS
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CHANNELS = [1, 3, 17, 64, 100]


@pytest.fixture(autouse=True)
def full_precision():
    """Of cuDNN's fp32 convolutions on a card, as of this processor's; TF32 has tests of its own."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(autouse=True)
def chains_of_fp32_are_cut(monkeypatch):
    """A card's tiles of fp32 are 16 deep, and it splits the pixels: no result is one long chain of additions, as it
    would be with the tests' deep tiles, where PyTorch's own on this processor is none."""

    def tile_of(value, precision, *sizes):
        tile = tiles.tile_of(value, precision, *sizes)
        return tile._replace(depth=min(tile.depth, max(16, tile.depth // 8))) if value.dtype == torch.float32 else tile

    monkeypatch.setattr(kernels, "tile_of", tile_of)
    monkeypatch.setattr(wgrad_kernels, "tile_of", tile_of)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several ragged tiles in every direction, and steps of one kernel position where there are channels enough."""
    monkeypatch.setattr(kernels, "tile_of", lambda *_: tiles.Tile(32, 16, 16, 4, 1))
    monkeypatch.setattr(wgrad_kernels, "tile_of", lambda *_: tiles.Tile(16, 128, 32, 4, 1))


PARAMETERS = {
    "to_large": [False, True],
    "kernel": [(1, 1), (3, 3), (4, 4), (5, 5)],
    "stride": [(1, 1), (2, 2)],
    "padding": [(0, 0), (1, 1), (2, 2)],
    "small_channels": CHANNELS,
    "large_channels": CHANNELS,
    "image": [(3, 9, 7), (1, 5, 6), (2, 6, 11)],
    "operand": list(OPERANDS),
    "epilogue": list(EPILOGUES),
    "bias": [False, True],
    "dtype": DTYPES,
    "slope": [0.2, 0.0],
}


def seeds(case: Case) -> range:
    """Sums of a few channels need several draws: each may be right, or PyTorch's, by luck. In fp32, where the errors
    are those of the additions alone, the ratio was 0.7 to 1.3 of 288 sums pooled, up to 1.9 of 48 and 4.2 of 24."""
    ends = (case.small_channels, case.large_channels)
    read, sums = ends if case.to_large else ends[::-1]
    if read == 1 and case.kernel == (1, 1):
        sums = 1  # all channels are one signal, scaled: they are right or wrong together
    alone = case.epilogue == "store" or case.dtype == torch.float64
    return range(1 if alone else -(-(64 if case.dtype == torch.float32 else 24) // sums))


def check(case: Case, each: bool = False) -> None:
    """Every kernel of a case; `each`: also the convolution that leaves its sums, where another makes use of them."""
    several = [convolve_arguments(case, 10 * seed) for seed in seeds(case)]
    makes_constants = finished(case, several[0]) is not None
    if each or not makes_constants:
        assert verdict(kernels, "convolve", several) is None
    if makes_constants:
        assert finished_verdict(kernels, case, several) is None
    assert verdict(kernels, "weight_gradient", [weight_gradient_arguments(case)]) is None


def finished_verdict(module, case: Case, several: list[tuple]) -> str | None:
    names, arguments = zip(*(finished(case, args) for args in several), strict=True)
    return verdict(module, names[0], list(arguments))


@pytest.mark.parametrize("case", [Case(**values) for values in pairwise(PARAMETERS)], ids=lambda case: str(case[:9]))
def test_kernels_are_as_right_as_pytorch(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", list(zip(CHANNELS, CHANNELS[2:] + CHANNELS[:2], strict=True)), ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 4, 5])
@pytest.mark.parametrize("to_large", [False, True])
def test_full_product(to_large, kernel, stride, padding, channels, dtype):
    shape = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (padding,) * 2, "dtype": dtype}
    pairs = list(itertools.product(OPERANDS, EPILOGUES))
    operand, epilogue = pairs[(kernel + 5 * stride + 7 * padding + channels[0]) % len(pairs)]
    ends = {"small_channels": channels[0], "large_channels": channels[1]}
    check(Case(to_large, **shape, **ends, operand=operand, epilogue=epilogue), each=True)


RAGGED = [
    Case(False, small_channels=18, large_channels=20, image=(2, 9, 7), operand="activation", epilogue="statistics"),
    Case(True, small_channels=20, large_channels=18, image=(2, 9, 7), operand="gradient", epilogue="backward"),
    Case(True, (3, 5), (3, 2), (1, 0), (2, 1), 17, 5, (2, 11, 9), "gradient", "backward"),
    Case(False, (3, 5), (3, 2), (1, 0), (2, 1), 17, 5, (2, 11, 9), "leaky", "statistics", bias=True),
    Case(True, (2, 3), (3, 3), (0, 0), (3, 2), 17, 5, (2, 11, 9), "activation", "statistics"),
    Case(True, (4, 4), (1, 1), (0, 0), (1, 1), 20, 17, (3, 4, 4), "activation", "statistics"),
    Case(True, (4, 4), (2, 2), (1, 1), (1, 1), 20, 3, (3, 9, 8), "activation", "store", bias=True),
    Case(True, (5, 3), (2, 4), (2, 0), (1, 1), 17, 1, (2, 10, 11), "gradient", "store"),
]


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_several_ragged_tiles_unequal_axes_and_dilation(case, small_tiles, monkeypatch):
    """In fp64, where no luck is involved, only indices and masks; the last three are the generator's first layer and
    ends with merged phases."""
    monkeypatch.setattr(wgrad_kernels, "MAX_SPLITS", 3)
    check(case, each=True)


def test_a_lone_pixel_is_not_multiplied_by_kernel_positions_that_miss_it(monkeypatch):
    """A transposed convolution of one pixel: each output pixel is a phase with one position."""
    case = Case(True, (4, 4), (1, 1), (0, 0), (1, 1), 64, 33, (5, 4, 4), "plain", "store")
    seen = launched(case, monkeypatch)
    assert seen["grid"] == (16,)
    assert seen["STRIDE"] == seen["STEP"] == (4, 4)


def launched(case: Case, monkeypatch) -> dict:
    """The grid and the compile-time arguments of a convolution."""
    seen = {}
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *_, **meta: seen.update(grid=grid, **meta))
    kernels.convolve(*convolve_arguments(case))
    return seen


@pytest.mark.parametrize(
    ("case", "merged"),
    [
        (Case(True, small_channels=64, large_channels=3, image=(2, 64, 64), epilogue="store"), True),
        (Case(True, small_channels=64, large_channels=1, image=(2, 64, 64), epilogue="store"), True),
        (Case(True, (4, 4), (1, 1), (0, 0), (1, 1), 100, 3, (2, 4, 4), epilogue="store"), True),  # of one pixel
        (Case(True, small_channels=64, large_channels=3, image=(2, 64, 64), epilogue="statistics"), False),
        (Case(True, small_channels=64, large_channels=64, image=(2, 64, 64), epilogue="store"), False),
        (Case(True, (3, 3), (1, 1), small_channels=64, large_channels=3, epilogue="store"), False),  # one phase
        (Case(True, dilation=(2, 2), small_channels=64, image=(2, 64, 64), epilogue="store"), False),
    ],
    ids=str,
)
def test_phases_are_merged_where_that_multiplies_less(case, merged, monkeypatch):
    assert launched(case, monkeypatch)["MERGED"] == merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("operand", "kernel", "channels"),
    [("activation", 4, 3), ("gradient", 4, 3), ("activation", 4, 1), ("leaky", 5, 3), ("gradient", 3, 1)],
)
def test_merged_phases_are_as_right_as_pytorch(operand, kernel, channels, dtype):
    """A generator's last layer, and the gradient of a discriminator's first by its images."""
    ends = {"small_channels": 64, "large_channels": channels, "image": (3, 16, 14)}
    case = Case(True, (kernel, kernel), **ends, operand=operand, epilogue="store", bias=kernel == 4, dtype=dtype)
    assert verdict(kernels, "convolve", [convolve_arguments(case)]) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_merged_phases_keep_what_is_not_finite_where_pytorch_has_it(bad):
    """A kernel of 4 at a stride of 2 gives every phase the same positions: no output meets a pixel that is not its."""
    args = list(convolve_arguments(Case(True, operand="plain", epilogue="store", dtype=torch.float32)))
    args[0][1, 1, 2, 1] = bad
    y, _ = kernels.convolve(*args)
    own, _ = eager.convolve(*args)
    assert torch.equal(y.isfinite(), own.isfinite())
    assert not y.isfinite().all()


@pytest.mark.parametrize(("stride", "dilation"), list(itertools.product([1, 2, 3, 4], [1, 2, 3])))
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_phases_multiply_what_counts_and_nothing_else(kernel, stride, dilation):
    """The multiplications of all phases of an axis are those of the plain convolution that they are the gradient of."""
    from fastgan.kernels.conv_transpose_bn_act import spacing

    size, padding, step = 64 * stride, kernel // 2, spacing(stride, dilation)
    used = 0
    for phase in range(stride):
        hits = [r for r in range(kernel) if (phase + padding - r * dilation) % stride == 0]
        assert hits == list(range(hits[0], kernel, step))[: len(hits)] if hits else True
        used += len(hits) * size // stride
    assert used == kernel * size // stride


# --- the last program of several ------------------------------------------------------------------------------------


def both_finishers(dtype=torch.float32) -> list[torch.Tensor]:
    """Of convolutions with many tiles in several groups, and a gradient of many splits."""
    results = []
    for case in (
        Case(False, operand="activation", epilogue="statistics", dtype=dtype, image=(3, 19, 21)),
        Case(True, operand="gradient", epilogue="backward", dtype=dtype, image=(3, 9, 11)),
    ):
        name, arguments = finished(case, convolve_arguments(case))
        results += getattr(kernels, name)(*arguments)
        results.append(kernels.weight_gradient(*weight_gradient_arguments(case)))
    return results


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter's programs run in an order of one's choice")
def test_the_same_bits_in_whatever_order_programs_come(small_tiles, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    expected, orders = both_finishers(), []
    inside = type(builder).set_grid_idx

    def backwards(self, x, y, z):
        orders.append((x, y))
        inside(self, self.grid_dim[0] - 1 - x, self.grid_dim[1] - 1 - y, z)

    monkeypatch.setattr(type(builder), "set_grid_idx", backwards)
    assert all(torch.equal(one, two) for one, two in zip(both_finishers(), expected, strict=True))
    assert len(set(orders)) > 30


def test_counters_are_zero_again_after_a_launch(small_tiles, monkeypatch):
    zeros = torch.zeros(1 << 12, dtype=torch.int32, device=DEVICE)
    asked = []
    for module in (kernels, wgrad_kernels):
        monkeypatch.setattr(module, "counters", lambda like, size: asked.append(size) or zeros)
    one, two = both_finishers(), both_finishers()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert max(asked) > 6, "several groups were wanted"
    assert not zeros.any()


def test_a_counter_that_is_left_is_noticed(small_tiles, planted_kernels, monkeypatch):
    planted = planted_kernels(arrivals, "tl.store(counter, 0)", "tl.store(counter, 1)")
    for module in (constant_kernels, wgrad_kernels):
        monkeypatch.setattr(module, "_comes_last", planted._comes_last)
    with pytest.raises(AssertionError):
        test_counters_are_zero_again_after_a_launch(None, monkeypatch)


def test_each_stream_has_counters_of_its_own_and_they_are_kept(monkeypatch):
    monkeypatch.setattr(arrivals, "_counters", {})
    like = torch.empty(1, device="meta")
    assert arrivals.counters(like, 10) is arrivals.counters(like, 4096)
    assert arrivals.counters(like, 5000).numel() >= 5000
    assert arrivals.counters(torch.empty(1), 3) is not arrivals.counters(torch.empty(1), 3)


# --- the constants between two convolutions -------------------------------------------------------------------------


@pytest.mark.parametrize("tiles_", [1, 3, 700])
@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.float64), *((65, dtype) for dtype in DTYPES)], ids=str)
def test_block_constants(channels, dtype, tiles_):
    torch.manual_seed(0)
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.empty(2, channels, 3, 3, dtype=dtype, device=DEVICE)
    count = torch.randint(1, 9, (tiles_, 1)).expand(tiles_, channels) + 1
    mean, m2, rest = torch.randn(tiles_, channels) + 50, torch.rand(tiles_, channels), torch.randn(tiles_, channels)
    parts = torch.stack([count, mean, m2, 1e-5 * rest]).to(DEVICE, stat)
    weight, bias, mean = (torch.randn(channels, device=DEVICE, dtype=stat) for _ in range(3))
    var = torch.rand(channels, device=DEVICE, dtype=stat)
    for frozen in (False, True):
        for affine in ((weight, bias), (None, None)):
            runs = []
            for module, wide in ((kernels, False), (eager, False), (eager, True)):
                args = [t if t is None else t.to(torch.float64 if wide else t.dtype, copy=True)
                        for t in (y, parts, *affine, mean, var)]  # fmt: skip
                args[1] = None if frozen else args[1]
                out = module.block_constants(*args, 1e-5, 0.3)
                runs.append((out, args[4], args[5]))
                assert frozen == bool((args[4] == mean).all())
            assert misses(*runs) is None


@pytest.mark.parametrize("count", [0, 18])
@pytest.mark.parametrize("tiles_", [1, 700])
def test_block_gradient_constants(tiles_, count):
    torch.manual_seed(1)
    parts, constants = torch.randn(2, tiles_, 17, device=DEVICE) + 1, torch.rand(4, 17, device=DEVICE) + 1
    runs = [
        module.block_gradient_constants(*args, count)
        for module, args in (
            (kernels, (parts, constants)), (eager, (parts, constants)), (eager, (parts.double(), constants.double())),
        )
    ]  # fmt: skip
    assert misses(*runs) is None
    assert (runs[0][0][1:3] == 0).all() == (count == 0)


def stored_statistics(module, dtype: torch.dtype, mean: float) -> str | None:
    """Why the statistics of an output far from 0 are not those of the stored output, or None."""
    torch.manual_seed(2)
    case = Case(False, (1, 1), (1, 1), (0, 0), small_channels=24, large_channels=24, image=(2, 13, 11), dtype=dtype)
    value, *_ = convolve_arguments(case._replace(operand="plain"))
    mixed = torch.eye(24, device=DEVICE, dtype=dtype)[:, :, None, None] + 1 / 256
    y, parts = module.convolve(
        value + mean, None, None, 1.0, mixed, None, case.geometry, False, case.small_size, True, None, None, 1.0
    )
    wide = y.float()
    sums = [(x.mean((0, 2, 3)), (x - x.mean((0, 2, 3), True)).square().sum((0, 2, 3))) for x in (wide, wide.double())]
    return misses(eager.combined(parts)[1:3], *sums)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_those_of_the_stored_output_wherever_its_mean(dtype, mean, small_tiles):
    assert stored_statistics(kernels, dtype, mean) is None


STORED_BUGS = {
    "m2 of the unrounded output": ("result = tl.where(filled, stored.to(ACC), 0.0)", "result = acc"),
    "what rounding takes from the mean dropped": ("3 * every + part, rest", "3 * every + part, rest * 0"),
}


@pytest.mark.parametrize("bug", STORED_BUGS)
def test_a_planted_bug_in_the_statistics_is_noticed(bug, planted_kernels, monkeypatch):
    planted = planted_kernels(kernels, *STORED_BUGS[bug])
    monkeypatch.setattr(planted, "tile_of", lambda *_: tiles.Tile(32, 16, 16, 4, 1))
    found = [stored_statistics(planted, dtype, 1e4) for dtype in (torch.float32, torch.bfloat16)]
    assert any(reason is not None for reason in found)


# --- promises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_large", [False, True])
def test_the_same_bits_every_time(to_large, small_tiles):
    case = Case(to_large, operand="gradient", epilogue="backward", dtype=torch.float32, image=(3, 9, 11))
    for name, arguments in (("convolve", convolve_arguments), ("weight_gradient", weight_gradient_arguments)):
        one, two = (getattr(kernels, name)(*arguments(case)) for _ in range(2))
        same = one if isinstance(one, tuple) else (one,)
        assert all(torch.equal(a, b) for a, b in zip(same, two if isinstance(two, tuple) else (two,), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_gradient_has_the_weights_layout_and_dtype(layout, dtype):
    case = Case(dtype=torch.bfloat16)
    *before, weight, geometry = weight_gradient_arguments(case)
    weight = weight.to(dtype, memory_format=layout)
    gradient = kernels.weight_gradient(*before, weight, geometry)
    assert (gradient.dtype, gradient.stride()) == (dtype, weight.stride())
    assert misses(gradient, eager.weight_gradient(*before, weight, geometry),
                  eager.weight_gradient(*(b.double() if isinstance(b, torch.Tensor) else b for b in before),
                                        weight.double(), geometry)) is None  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_layout_of_the_weight_is_read(layout):
    case = Case(dtype=torch.float64)
    args = list(convolve_arguments(case))
    args[4] = args[4].to(memory_format=layout)
    assert verdict(kernels, "convolve", [tuple(args)]) is None


def test_an_empty_batch_gives_an_empty_result_and_a_zero_gradient():
    case = Case(image=(0, 9, 7))
    y, parts = kernels.convolve(*convolve_arguments(case._replace(epilogue="store", operand="plain")))
    assert y.shape == (0, 17, 4, 3)
    assert parts.shape[0] == 0
    assert not kernels.weight_gradient(*weight_gradient_arguments(case._replace(operand="plain"))).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_pytorch_has_it(bad):
    args = list(convolve_arguments(Case(operand="activation", epilogue="store", dtype=torch.float32)))
    args[0][1, 1, 4, 3] = bad
    y, _ = kernels.convolve(*args)
    own, _ = eager.convolve(*args)
    assert torch.equal(y.isfinite(), own.isfinite())
    assert not y.isfinite().all()


@triton.jit
def _where_kernel(out, tile, images, height, width, BLOCK: tl.constexpr):
    image, row, column, exists = operand_kernels._pixels(tile, BLOCK, images, height, width)
    at = tl.arange(0, BLOCK)
    tl.store(out + at, ((image * height + row) * width + column) * 4)
    tl.store(out + BLOCK + at, exists.to(tl.int64))


@pytest.mark.parametrize("tile", [0, 5, 2**27 - 1, 2**27 + 3])
def test_offsets_beyond_31_bits(tile):
    """The pixel of each row of a tile, and its offset, in a tensor of 2^36 elements that no machine here holds."""
    height, width, block = 1000, 999, 128
    images = -(-(2**27 + 2) * block // (height * width))
    out = torch.zeros(2, block, dtype=torch.int64, device=DEVICE)
    _where_kernel[(1,)](out, tile, images, height, width, block)
    pixels = tile * block + torch.arange(block, device=DEVICE)
    assert torch.equal(out[0], 4 * pixels)
    assert torch.equal(out[1].bool(), pixels < images * height * width)


# --- TF32 -----------------------------------------------------------------------------------------------------------


def rounded(tensor):
    from interpreter import to_tf32

    return torch.from_numpy(to_tf32(tensor.numpy()).copy()).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def tf32():
    """On this processor, as a card has it on."""
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.mkldnn.conv.fp32_precision = before


@pytest.mark.skipif(DEVICE != "cpu", reason="rounds as the interpreter does, on the host")
@pytest.mark.parametrize("kind", ["plain", "activation"])
def test_tf32_is_the_definition_of_rounded_operands(kind, tf32):
    case = Case(operand=kind, epilogue="store", dtype=torch.float32, small_channels=64, large_channels=64, slope=0.25)
    args = list(convolve_arguments(case))
    # Few enough digits that the prologue does not round: then both sides of the comparison round the same numbers.
    args[:3] = [a if a is None else (a * 16).round() / 16 for a in args[:3]]
    args[0] += (torch.rand_like(args[0]) * 2**10).round() / 2**14
    y, _ = kernels.convolve(*args)
    x, weight = rounded(eager.operand(*args[:4])), rounded(args[4])
    truth = F.conv2d(x.double(), weight.double(), None, case.stride, case.padding)
    assert misses(y, F.conv2d(x, weight, None, case.stride, case.padding), truth) is None
    exact = eager.convolve(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))[0]
    assert misses(y, eager.convolve(*args)[0], exact) is not None, "the switch for TF32 changed nothing"


# --- planted bugs ---------------------------------------------------------------------------------------------------

MASKED_FIRST = ("return tl.where(inside, mapped, 0.0).to(value.dtype)", "return mapped.to(value.dtype)")
BUGS = {
    "padding before the prologue": (operand_kernels, *MASKED_FIRST),
    "B of the gradient dropped": (operand_kernels, "second.to(mean.dtype) - mean, shift", "mean * 0, shift"),
    "C of the gradient dropped": (operand_kernels, "shift + tl.zeros_like(mean))", "tl.zeros_like(mean))"),
    "gradient without its own mean": (operand_kernels, "second.to(mean.dtype) - mean,", "second.to(mean.dtype),"),
    "halo row dropped": (kernels, "(h >= 0) & (h < height)", "(h > 0) & (h < height)"),
    "halo column dropped": (kernels, "(w >= 0) & (w < width)", "(w >= 0) & (w < width - 1)"),
    "rows that are none counted": (kernels, "tl.sum(exists.to(ACC), 0)", "tl.sum(exists.to(ACC), 0) + 1"),
    "slope not applied backward": (kernels, "_through_activation(acc, v, OUT_SLOPE)", "acc"),
    "product with y instead of y - mu": (kernels, "            raw = raw - m\n", ""),
    "bias forgotten": (kernels, "acc += tl.load(bias + n, real, 0.0).to(ACC)[None, :]", "acc += 0.0"),
    "phases swapped": (kernels, "j * STRIDE[1] + right", "j * STRIDE[1] + (STRIDE[1] - 1 - right)"),
    "merged phases swapped": (kernels, "left[:, None] * STRIDE[1] + s0", "left[:, None] * STRIDE[1] + 1 - s0"),
    "a merged phase's last position dropped": (kernels, "& (s < KERNEL[1])", "& (s < KERNEL[1] - 1)"),
    "a merged phase's first pixel dropped": (kernels, "& (j >= 0) & (j < out_width)", "& (j > 0) & (j < out_width)"),
    "a split lost": (wgrad_kernels, "in tl.static_range(GROUP):", "in tl.static_range(1, GROUP):"),
    "halo of the weight gradient dropped": (wgrad_kernels, "& (h >= 0) & (h < height)", "& (h > 0) & (h < height)"),
}  # fmt: skip


def first_miss(modules: dict) -> str | None:
    """Of a few elements, so that a dropped term cannot hide."""
    common = {"small_channels": 2, "large_channels": 3, "image": (2, 9, 6)}
    cases = [
        Case(False, **common, operand="activation", epilogue="statistics", bias=True),
        Case(True, **common, operand="gradient", epilogue="backward"),
        Case(False, **common, operand="plain", epilogue="statistics", dtype=torch.bfloat16),
    ]
    merged = Case(True, (3, 3), **common, operand="activation", epilogue="store")
    if (reason := verdict(modules.get(kernels, kernels), "convolve", [convolve_arguments(merged)])) is not None:
        return reason
    for case in cases:
        several = [convolve_arguments(case, 10 * seed) for seed in range(4)]
        reason = finished_verdict(modules.get(kernels, kernels), case, several)
        if reason is None and case.dtype == torch.float64:
            several = [weight_gradient_arguments(case, seed) for seed in range(2)]
            reason = verdict(modules.get(wgrad_kernels, wgrad_kernels), "weight_gradient", several)
        if reason is not None:
            return reason
    return None


def test_the_planted_bugs_are_the_only_difference():
    assert first_miss({}) is None


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, planted_kernels, monkeypatch):
    module, right, wrong = BUGS[bug]
    monkeypatch.setattr(tiles, "_PLAIN", (tiles.Tile(16, 32, 16, 4, 1),))
    planted = planted_kernels(module, right, wrong)
    if module is operand_kernels:
        for user in (kernels, wgrad_kernels):
            monkeypatch.setattr(user, "_operand", planted._operand)
        assert first_miss({}) is not None
    else:
        assert first_miss({module: planted}) is not None


CONSTANT_BUGS = {
    "biased running variance": ("m2 / tl.maximum(counts - 1.0, 1.0)", "m2 / counts"),
    "eps outside the root": ("1.0 / tl.sqrt(var + tl.full((BC,), eps, ACC))",
                             "1.0 / (tl.sqrt(var) + tl.full((BC,), eps, ACC))"),
    "spread of the tiles' means dropped": (" + n * apart * apart, 0)", ", 0)"),
    "running statistics not kept": ("tl.store(running_mean + c, new_mean", "tl.store(running_mean + c, 0 * new_mean"),
}  # fmt: skip


@pytest.mark.parametrize("bug", CONSTANT_BUGS)
def test_a_planted_bug_in_the_constants_is_noticed(bug, planted_kernels, monkeypatch):
    planted = planted_kernels(constant_kernels, *CONSTANT_BUGS[bug])
    monkeypatch.setattr(kernels, "block_constants", planted.block_constants)
    with pytest.raises(AssertionError):
        test_block_constants(65, torch.float32, 3)


# --- choice of tiles ------------------------------------------------------------------------------------------------


def test_tiles_are_the_widest_that_fill_the_card(monkeypatch):
    lists = (tiles.Tile(128, 128, 64, 8, 3), tiles.Tile(64, 64, 64, 4, 3))
    monkeypatch.setattr(tiles, "_HALVES", lists)
    halves = torch.empty(0, dtype=torch.bfloat16)
    assert tiles.tile_of(halves, "ieee", 1 << 20, 256, 2048) == lists[0]
    assert tiles.tile_of(halves, "ieee", 1 << 10, 256, 2048) == lists[1]
    assert tiles.tile_of(halves, "ieee", 1 << 20, 3, 48)[:3] == (128, 16, 64)
    assert tiles.tile_of(halves, "ieee", 5, 3, 3)[:3] == (16, 16, 16)


@pytest.mark.parametrize(("depth", "expected"), [(48, 16), (75, 16), (16, 16), (64, 64), (128, 64), (32, 32), (1, 16)])
def test_steps_over_a_few_channels_pad_no_more_than_a_matrix_instruction_needs(depth, expected):
    assert tiles.depth_of_few(depth, 64) == expected
    assert -depth % expected < tiles.LEAST


def test_counts_name_the_kernels():
    backends.reset_counts()
    backends.run("triton", "convolve", *convolve_arguments(Case()))
    assert backends.counts() == {("triton", "convolve"): 1}
