"""Arguments of the split operations of conv_bn_act, and whether a module of kernels is as right on them as PyTorch."""

from typing import NamedTuple

import fastgan.kernels.conv_bn_act as kernels
import fastgan.kernels.conv_bn_act_tiles as tiles
import fastgan.kernels.conv_bn_act_wgrad as wgrad_kernels
import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from fastgan import backends, first_use
from fastgan.ops.conv_bn_act_eager import Geometry
from fastgan.tolerance import misses

OPERANDS = ("plain", "activation", "leaky", "gradient")
EPILOGUES = ("store", "statistics", "backward", "leaky backward")


class Case(NamedTuple):
    """A convolution between a large side [images, G, height, width] and a small one with F channels."""

    to_large: bool = False
    kernel: tuple[int, int] = (4, 4)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    small_channels: int = 17
    large_channels: int = 3
    image: tuple[int, int, int] = (3, 9, 7)  # images, height, width of the large side
    operand: str = "activation"
    epilogue: str = "statistics"
    bias: bool = False
    dtype: torch.dtype = torch.float64
    slope: float = 0.2

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.kernel, self.stride, self.padding, self.dilation)

    @property
    def small_size(self) -> tuple[int, ...]:
        axes = zip(self.image[1:], *self.geometry, strict=True)
        return tuple((n + 2 * pad - (k - 1) * dil - 1) // stride + 1 for n, k, stride, pad, dil in axes)


def _draw(seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, at: float = 0.0) -> Tensor:
        tensor = (torch.randn(shape, generator=generator) + at).to(dtype)
        tensor = tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor
        return tensor.to(DEVICE)

    return draw


def _constants(channels: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[mu, s, beta, 1/std] or [A, B, C, mu]: beta and C far from 0, so that a mask in the wrong place shows."""
    draw = _draw(seed, torch.float64 if dtype == torch.float64 else torch.float32)
    rows = (draw(channels, at=3), draw(channels).abs() + 0.5, draw(channels, at=5), draw(channels).abs() + 1)
    return torch.stack(rows)


def convolve_arguments(case: Case, seed: int = 0) -> tuple:
    draw = _draw(seed, case.dtype)
    large = (case.image[0], case.large_channels, *case.image[1:])
    small = (case.image[0], case.small_channels, *case.small_size)
    value, result = (small, large) if case.to_large else (large, small)
    weight = draw(case.small_channels, case.large_channels, *case.kernel)
    bias = draw(result[1]) if case.bias else None
    out: tuple = (None, None, 1.0)
    if "backward" in case.epilogue:
        constants = _constants(result[1], seed + 1, case.dtype) if case.epilogue == "backward" else None
        out = (draw(*result, at=-3 if constants is not None else 0), constants, case.slope)
    return backends._comparisons["conv_bn_act"].settle(
        "convolve",
        (
            *_operand(case, value, seed + 2, case.operand), weight, bias, case.geometry, case.to_large, result[2:],
            case.epilogue == "statistics", *out,
        ),
    )  # fmt: skip


def finished(case: Case, arguments: tuple) -> tuple[str, tuple] | None:
    """The convolution that makes constants of its sums, with the arguments of `convolve`; None: it has no sums."""
    channels = arguments[4].shape[1 if case.to_large else 0]
    draw = _draw(7, torch.float64 if case.dtype == torch.float64 else torch.float32)
    if case.epilogue == "statistics":
        norm = (draw(channels), draw(channels), draw(channels), draw(channels).abs(), 1e-5, 0.3)
        return "convolve_block_constants", (*arguments[:9], *norm)
    if case.epilogue == "backward":
        count = 0 if case.bias else arguments[10].numel() // channels
        return "convolve_block_gradient_constants", (*arguments[:5], *arguments[6:9], *arguments[10:], count)
    return None


def weight_gradient_arguments(case: Case, seed: int = 0) -> tuple:
    """`case.operand` on the side that the forward reads, a gradient on the other, as in a block's backward."""
    large = (case.image[0], case.large_channels, *case.image[1:])
    small = (case.image[0], case.small_channels, *case.small_size)
    kinds = ("gradient", case.operand) if case.to_large else (case.operand, "gradient")
    weight = _draw(seed, case.dtype)(case.small_channels, case.large_channels, *case.kernel)
    return (
        *_operand(case, large, seed + 1, kinds[0]), *_operand(case, small, seed + 2, kinds[1]), weight, case.geometry,
    )  # fmt: skip


def _operand(case: Case, shape: tuple, seed: int, kind: str) -> tuple:
    draw = _draw(seed, case.dtype)
    value = draw(*shape)
    if kind == "plain":
        return value, None, None, 1.0
    if kind == "leaky":
        return value, None, None, case.slope
    constants = _constants(shape[1], seed + 1, case.dtype)
    return (value, draw(*shape), constants, 1.0) if kind == "gradient" else (value, None, constants, case.slope)


def verdict(module, name: str, several: list[tuple]) -> str | None:
    """Why the kernel of `module` misses, or None; over several arguments together, as a few channels may be lucky."""
    eager, comparison = backends.kernel("eager", name), backends._comparisons["conv_bn_act"]
    outcomes = []
    for args in several:
        wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
        runs = ((getattr(module, name), args), (eager, args), (eager, wide))
        outcomes.append([first_use._outcome(function, comparison, name, given) for function, given in runs])
    joined = []
    for runs in zip(*outcomes, strict=True):
        joined.append(tuple(torch.cat([t.flatten() for t in column]) for column in zip(*runs, strict=True)))
    return misses(*joined)


def finished_verdict(module, case: Case, several: list[tuple]) -> str | None:
    names, arguments = zip(*(finished(case, args) for args in several), strict=True)
    return verdict(module, names[0], list(arguments))


@pytest.fixture
def full_precision():
    """Of cuDNN's fp32 convolutions on a card, as of this processor's; TF32 has tests of its own."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture
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
