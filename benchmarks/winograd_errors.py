"""What Winograd's algorithm costs in digits: which fast convolutions could run on bf16 products, such as AVX-512's
`vdpbf16ps`, within the rule of tolerance, and what its points leave in fp32. `python benchmarks/winograd_errors.py`
computes the tables of docs/speed.md and writes them there (a minute).

The rule lets a kernel err twice as much as PyTorch. Winograd's F(2x2, 2x2) in bf16 is granted three times PyTorch's RMS
error, if that is said where users look; its maximum is held to the rule.

Everything is plain PyTorch. The operands of a 4x4 stride-2 convolution are bf16, as autocast makes them; Winograd's
transforms are computed in fp32 and rounded to bf16 once, where the product takes them; products are summed in fp32, and
the result is rounded to bf16. Beside it stands PyTorch's own bf16 convolution, both against the definition in fp64.
"""

import itertools
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.tolerance import FACTOR, Errors, errors, misses, ulp

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
CHANNELS = (64, 128, 256, 512)
SIDE, IMAGES = 8, 4  # of the convolution's result
GRANTED = 3.0  # times PyTorch's RMS error, to F(2x2, 2x2) alone
PASSES, BY_GRANT, REFUSED = "", " *granted*", " **no**"  # the marks of the table, from right to wrong
TAPS = 2  # a 4x4 stride-2 convolution is one of 2x2 taps over the four parities of its input


class Map(NamedTuple):
    """F(outputs, 2) in one dimension: out = At [(G w) * (Bt d)]."""

    outputs: int
    to_points: list[list[float]]  # Bt
    weight: list[list[float]]  # G
    from_points: list[list[float]]  # At


def at_points(*points: float) -> Map:
    """F(n, 2) at n points and infinity, by interpolation (Toom and Cook). In its simplest form: what is short in one of
    the factors could as well be in the other."""

    def product(roots: list[float]) -> list[float]:  # of x - root: coefficients, the constant one first
        found = [1.0]
        for root in roots:
            found = [low - root * high for low, high in zip([0.0, *found], [*found, 0.0], strict=True)]
        return found

    count = len(points)
    others = [[q for q in points if q != p] for p in points]
    scales = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    return Map(
        count,
        [*([*product(rest), 0.0] for rest in others), product(list(points))],
        [*([1 / scale, p / scale] for p, scale in zip(points, scales, strict=True)), [0.0, 1.0]],
        [[*(p**power for p in points), float(power == count - 1)] for power in range(count)],
    )


DIRECT = Map(1, [[1, 0], [0, 1]], [[1, 0], [0, 1]], [[1, 1]])
F2 = Map(2, [[1, -1, 0], [0, 1, 0], [0, -1, 1]], [[1, 0], [1, 1], [0, 1]], [[1, 1, 0], [0, 1, 1]])
F4 = at_points(0.375, -0.375, 1.25, -1.25)  # as in csrc/cpu/winograd.h
USUAL = at_points(0.0, 1.0, -1.0, 0.5)


class Algorithm(NamedTuple):
    name: str
    rows: Map
    columns: Map
    terms: int = 1  # bf16 numbers that stand for a transformed weight
    operands: torch.dtype = torch.bfloat16  # of the products
    granted: bool = False  # GRANTED holds

    def products(self) -> float:
        """Multiplications beside the definition's."""
        share = 1.0
        for one in (self.rows, self.columns):
            share *= len(one.to_points) / (TAPS * one.outputs)
        return share * self.terms


ALGORITHMS = (
    Algorithm("direct", DIRECT, DIRECT),
    Algorithm("F(2, 2) along columns", DIRECT, F2),
    Algorithm("F(2x2, 2x2)", F2, F2, granted=True),
    Algorithm("F(2x2, 2x2), weights of two terms", F2, F2, terms=2),
    Algorithm("F(4x4, 2x2)", F4, F4),
    Algorithm("F(4x4, 2x2), fp32 products: ours", F4, F4, operands=torch.float32),
)
POINTS = {
    "0, 1, -1, 1/2 and infinity": Algorithm("usual", USUAL, USUAL, operands=torch.float32),
    "3/8, -3/8, 5/4, -5/4 and infinity: ours": Algorithm("ours", F4, F4, operands=torch.float32),
}
RUN = 64  # products that are summed before they are added to the others, as in csrc/cpu/gemm.h


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def tiles(padded: Tensor, algorithm: Algorithm) -> Tensor:
    """[N, C, tile, tile, i, j] of the input of a 2x2 convolution."""
    for dimension, one in ((2, algorithm.rows), (3, algorithm.columns)):
        padded = padded.unfold(dimension, one.outputs + TAPS - 1, one.outputs)
    return padded


def rounded(value: Tensor, algorithm: Algorithm, terms: int = 1) -> Tensor:
    """As the products see it, a sum of `terms` numbers."""
    kept = torch.zeros_like(value)
    for _ in range(terms):
        kept = kept + (value - kept).to(algorithm.operands).float()
    return kept


def transform(value: Tensor, rows: list[list[float]], columns: list[list[float]]) -> Tensor:
    return torch.einsum("pi,qj,...ij->...pq", matrix(rows), matrix(columns), value)


def forward(d: Tensor, w: Tensor, algorithm: Algorithm) -> Tensor:
    """[N, K, H, W] of the 2x2 convolution of d [N, C, H + 1, W + 1] with w [K, C, 2, 2]."""
    rows, columns = algorithm.rows, algorithm.columns
    v = rounded(transform(tiles(d, algorithm), rows.to_points, columns.to_points), algorithm)
    u = rounded(transform(w, rows.weight, columns.weight), algorithm, algorithm.terms)
    runs = zip(v.split(RUN, 1), u.split(RUN, 1), strict=True)
    m = sum(torch.einsum("nctspq,kcpq->nktspq", *run) for run in runs)
    out = transform(m, rows.from_points, columns.from_points)
    n, k, down, across, height, width = out.shape
    return out.permute(0, 1, 2, 4, 3, 5).reshape(n, k, down * height, across * width)


def weight_gradient(d: Tensor, g: Tensor, algorithm: Algorithm) -> Tensor:
    """[K, C, 2, 2] from d and the result's gradient g [N, K, H, W]: the transposed maps."""
    rows, columns = algorithm.rows, algorithm.columns
    v = rounded(transform(tiles(d, algorithm), rows.to_points, columns.to_points), algorithm)
    g = g.unfold(2, rows.outputs, rows.outputs).unfold(3, columns.outputs, columns.outputs)
    transposed = [list(map(list, zip(*one.from_points, strict=True))) for one in (rows, columns)]
    u = rounded(transform(g, *transposed), algorithm, algorithm.terms)
    m = torch.einsum("nctspq,nktspq->kcpq", v, u)
    back = [list(map(list, zip(*one.weight, strict=True))) for one in (rows, columns)]
    return transform(m, *back)


# --- the 4x4 stride-2 convolution in terms of 2x2 ones -------------------------------------------------------------


def parities(x: Tensor) -> Tensor:
    """[N, 4C, H + 1, W + 1] of [N, C, 2H, 2W]: padded by one, its four parities side by side."""
    return F.pixel_unshuffle(F.pad(x, (1, 1, 1, 1)), 2)


def taps(w: Tensor) -> Tensor:
    """[K, 4C, 2, 2] of [K, C, 4, 4]."""
    return F.pixel_unshuffle(w, 2)


def phases(g: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The input gradient's four phases, each a 2x2 convolution of g [N, K, H, W], padded where it looks."""
    found = []
    for y, x in itertools.product((0, 1), repeat=2):
        window = F.pad(g, (1 - x, x, 1 - y, y))
        # Row 2i + y of the input meets kernel rows 3 - y - 2a of results i - 1 + y + a (a = 0, 1).
        turned = w[:, :, [3 - y, 1 - y]][:, :, :, [3 - x, 1 - x]]
        found.append((window, turned.transpose(0, 1)))
    return found


def passes(x: Tensor, w: Tensor, g: Tensor, algorithm: Algorithm) -> dict[str, Tensor]:
    """Forward, input gradient and weight gradient of the 4x4 stride-2 convolution, rounded to bf16."""
    y = forward(parities(x), taps(w), algorithm)
    each = [forward(d, turned, algorithm) for d, turned in phases(g, w)]
    dx = torch.stack(each, 2).flatten(1, 2)  # [N, 4C, H, W], phases innermost
    dw = F.pixel_shuffle(weight_gradient(parities(x), g, algorithm), 2)
    return {"forward": y, "input gradient": F.pixel_shuffle(dx, 2), "weight gradient": dw}


def own(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    """PyTorch's, in the operands' dtype."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        g, x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return {"forward": F.conv2d(x, w, stride=2, padding=1), "input gradient": dx, "weight gradient": dw}


def mark(algorithm: Algorithm, got: Tensor, theirs: Tensor, truth: Tensor) -> str:
    """Whether the rule, or what is granted beside it, lets a result through."""
    if misses(got, theirs, truth) is None:
        return PASSES
    mine, other = errors(got, truth), errors(theirs, truth)
    most = Errors(GRANTED * other.rms, FACTOR * other.max + ulp(truth.abs().max().item(), got.dtype))
    return BY_GRANT if algorithm.granted and mine.rms <= most.rms and mine.max <= most.max else REFUSED


def measured(channels: int) -> dict[str, dict[str, tuple[float, float, str]]]:
    """Of each algorithm and pass: RMS and maximum error beside PyTorch's, and its mark."""
    torch.manual_seed(channels)
    x = F.leaky_relu(torch.randn(IMAGES, channels, 2 * SIDE, 2 * SIDE), 0.2).bfloat16()
    w = (0.02 * torch.randn(channels, channels, 4, 4)).bfloat16()
    g = torch.randn(IMAGES, channels, SIDE, SIDE).bfloat16()
    truth, theirs = own(x.double(), w.double(), g.double()), own(x, w, g)
    found: dict[str, dict[str, tuple[float, float, str]]] = {}
    for algorithm in ALGORITHMS:
        found[algorithm.name] = {}
        for name, result in passes(x.float(), w.float(), g.float(), algorithm).items():
            got = result.bfloat16()
            mine, other = errors(got, truth[name]), errors(theirs[name], truth[name])
            said = mark(algorithm, got, theirs[name], truth[name])
            found[algorithm.name][name] = (mine.rms / other.rms, mine.max / other.max, said)
        print(channels, algorithm.name, found[algorithm.name], flush=True)
    return found


def measured_points(channels: int) -> dict[str, tuple[float, float]]:
    """RMS and maximum error in fp32, forward, beside PyTorch's, for each choice of points."""
    torch.manual_seed(channels)
    x, w = torch.randn(IMAGES, channels, 2 * SIDE, 2 * SIDE), 0.02 * torch.randn(channels, channels, 4, 4)
    truth = F.conv2d(x.double(), w.double(), stride=2, padding=1)
    layout = torch.channels_last
    theirs = F.conv2d(x.contiguous(memory_format=layout), w.contiguous(memory_format=layout), stride=2, padding=1)
    other, found = errors(theirs, truth), {}
    for points, algorithm in POINTS.items():
        mine = errors(forward(parities(x), taps(w), algorithm), truth)
        found[points] = (mine.rms / other.rms, mine.max / other.max)
    print(channels, found, flush=True)
    return found


def points_table() -> str:
    every = [measured_points(channels) for channels in CHANNELS]
    lines = [["points", *(f"{channels} channels" for channels in CHANNELS)], ["---", *["---:"] * len(CHANNELS)]]
    lines += [[points, *(f"{found[points][0]:.2f}, {found[points][1]:.2f}" for found in every)] for points in POINTS]
    return as_table(lines)


def as_table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table() -> str:
    """The largest ratios over the numbers of channels."""
    every = [measured(channels) for channels in CHANNELS]
    heads = ["products", "multiplications", "forward", "input gradient", "weight gradient"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for algorithm in ALGORITHMS:
        line = [algorithm.name, f"{algorithm.products():.2f}"]
        for name in heads[2:]:
            rms, top, marks = zip(*(found[algorithm.name][name] for found in every), strict=True)
            worst = max(marks, key=(PASSES, BY_GRANT, REFUSED).index)
            line.append(f"{max(rms):.2f}, {max(top):.2f}{worst}")
        lines.append(line)
    return as_table(lines)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, content in (("bf16", table()), ("points", points_table())):
        filled = f"<!-- winograd {name} -->\n\n{content}\n\n<!-- end -->"
        page = re.sub(rf"<!-- winograd {name} -->.*?<!-- end -->", lambda _, filled=filled: filled, page, flags=re.S)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
