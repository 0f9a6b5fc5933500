"""The Triton convolutions against the fp64 definition, kernel by kernel, each way of reading and of writing."""

import itertools

import fastgan.kernels.conv_bn_act as kernels
import fastgan.kernels.conv_bn_act_arrivals as arrivals
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
    finished_verdict,
    verdict,
    weight_gradient_arguments,
)  # fmt: skip
from pairwise import pairwise
from triton_device import DEVICE, MARKS

from fastgan import backends
from fastgan.ops import conv_bn_act_eager as eager
from fastgan.tolerance import misses

pytestmark = [*MARKS, pytest.mark.usefixtures("full_precision", "chains_of_fp32_are_cut")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CHANNELS = [1, 3, 17, 64, 100]

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
    return range(1 if alone else -(-(64 if case.dtype == torch.float32 else 48) // sums))


def check(case: Case, each: bool = False) -> None:
    """Every kernel of a case; `each`: also the convolution that leaves its sums, where another makes use of them."""
    several = [convolve_arguments(case, 10 * seed) for seed in seeds(case)]
    makes_constants = finished(case, several[0]) is not None
    if each or not makes_constants:
        assert verdict(kernels, "convolve", several) is None
    if makes_constants:
        assert finished_verdict(kernels, case, several) is None
    assert verdict(kernels, "weight_gradient", [weight_gradient_arguments(case)]) is None


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
