"""The CUDA forward convolution with its prologue and statistics, run thread by thread on the host."""

import pytest
import torch
import torch.nn.functional as F

from fastgan.ops import bn_act_eager as eager
from fastgan.tolerance import misses
from simt import DTYPES, run_clean, simt, to_input, to_output

# transposed, N, C, K, (H, W), kernel, stride, padding, dilation or output padding
CASES = [
    (False, 2, 8, 5, (5, 7), 4, 2, 1, 1),
    (False, 1, 40, 66, (3, 3), 3, 1, 1, 1),
    (False, 3, 16, 8, (9, 6), 3, 2, 2, 2),
    (False, 5, 24, 17, (4, 4), 4, 1, 0, 1),
    (False, 1, 8, 3, (6, 5), 1, 1, 0, 1),
    (True, 2, 8, 5, (3, 4), 4, 2, 1, 0),
    (True, 1, 40, 66, (1, 1), 4, 1, 0, 0),
    (True, 1, 16, 9, (3, 2), 3, 2, 1, 1),
    (True, 1, 8, 4, (2, 3), 2, 3, 0, 1),
]
HALVES = [torch.bfloat16, torch.float16]


def make(case, dtype):
    transposed, n, c, k, (h, w), size, *_ = case
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(n, c, h, w, generator=g) + 0.5).to(dtype)
    weight = torch.randn(k, c, size, size, generator=g) / (c * size * size) ** 0.5
    weight = weight.to(dtype)
    mean = torch.randn(c, generator=g)
    scale = torch.linspace(-1.5, 1.5, c)
    bias = torch.linspace(3, -2, c)  # far from 0, so that padding before the prologue would show
    return x, weight, (mean, scale, bias)


def reference(case, x, weight, prologue, slope):
    """Prologue, rounded to the dtype of the operand as the tensor cores take it; then the library's convolution."""
    transposed, *_, stride, padding, third = case
    z = x
    if prologue:
        mean, scale, bias = (t.to(eager.stat_dtype(x)).view(1, -1, 1, 1) for t in prologue)
        z = F.leaky_relu(scale * (x.to(mean.dtype) - mean) + bias, slope).to(x.dtype)
    if transposed:
        return F.conv_transpose2d(z, weight.transpose(0, 1), None, stride, padding, third)
    return F.conv2d(z, weight, None, stride, padding, third)


def run(case, x, weight, prologue, slope, seed):
    transposed, *_, stride, padding, third = case
    y = torch.empty_like(reference(case, x, weight, prologue, slope)).permute(0, 2, 3, 1).contiguous()
    mean, m2 = torch.empty(y.shape[-1]), torch.empty(y.shape[-1])
    run_clean(
        simt().conv,
        *(DTYPES[x.dtype], transposed, to_input(x.permute(0, 2, 3, 1).contiguous())),
        *(to_input(weight.permute(0, 2, 3, 1).contiguous()), tuple(map(to_input, prologue)), slope),
        *((stride, padding, third), to_output(y), to_output(mean), to_output(m2)),
        seed=seed,
    )
    return y.permute(0, 3, 1, 2), mean, m2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_prologue", [False, True])
def test_convolution_and_statistics(case, dtype, with_prologue):
    x, weight, prologue = make(case, dtype)
    prologue, slope = (prologue, 0.2) if with_prologue else ((), 1.0)
    y, mean, m2 = run(case, x, weight, prologue, slope, 0)
    own = reference(case, x, weight, prologue, slope)
    truth = reference(case, x.double(), weight.double(), prologue, slope)
    reason = misses(y, own, truth)
    assert reason is None, reason
    stored = y.contiguous()
    reason = misses((mean, m2), eager.stats(stored), eager.stats(stored.double()))
    assert reason is None, reason
    for first, second in zip((y, mean, m2), run(case, x, weight, prologue, slope, 4), strict=True):
        assert torch.equal(first, second)
