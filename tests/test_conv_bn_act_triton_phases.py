"""The phases of a transposed convolution in the Triton kernels: what each multiplies, and where several are merged."""

import itertools

import fastgan.kernels.conv_bn_act as kernels
import pytest
import torch
from convolution_cases import Case, convolve_arguments, verdict
from triton_device import MARKS

from fastgan.ops import conv_bn_act_eager as eager

pytestmark = [*MARKS, pytest.mark.usefixtures("full_precision", "chains_of_fp32_are_cut")]


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
