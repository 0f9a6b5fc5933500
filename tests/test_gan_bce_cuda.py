"""The CUDA kernel of gan_bce, run thread by thread on the host, against the definition."""

import pytest
import torch
from simt import DTYPES, run_clean, simt, to_input, to_output

import fastgan.ops  # noqa: F401  (defines the operations)
from fastgan import backends
from fastgan.tolerance import misses

SIZES = [
    (1, 1),
    (3, 600),
    (0, 33),
    (513, 0),
    (64, 64),
    (3, 6149),
]  # the last: one thread has four vectors, the next three


def logits(n, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 5
    x[:6] = torch.tensor([100.0, -100.0, 0.0, -0.0, 30.0, -30.0])[: x[:6].numel()]
    return x.to(dtype)


def run(real, fake, seed):
    stats = torch.empty(4)
    grads = torch.empty(real.numel()), torch.empty(fake.numel())
    given = (DTYPES[real.dtype], to_input(real), to_input(fake), 0.9, 0.1)
    run_clean(simt().gan_bce, *given, to_output(stats), *map(to_output, grads), seed=seed)
    return stats, *grads


def eager(real, fake):
    halves = [x if x.numel() else None for x in (real, fake)]
    return backends.kernel("eager", "gan_bce")(*halves, 0.9, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_halves_and_gradients(sizes, dtype):
    real, fake = logits(sizes[0], dtype, 0), logits(sizes[1], dtype, 1)
    got = run(real, fake, 0)
    reason = misses(got, eager(real, fake), eager(real.double(), fake.double()))
    assert reason is None, reason
    for first, second in zip(got, run(real, fake, 5), strict=True):
        assert torch.equal(first, second)


def test_addresses_that_are_no_multiple_of_16():
    real, fake = logits(34, torch.float16, 0)[1:], logits(33, torch.float16, 1)
    assert real.data_ptr() % 16 == 2
    for got, own in zip(run(real, fake, 0), run(real.clone(), fake, 0), strict=True):
        torch.testing.assert_close(got, own, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinity_and_nan_like_the_definition(value):
    real, fake = torch.tensor([value, 1.0]), torch.tensor([0.5])
    for got, own in zip(run(real, fake, 0), eager(real, fake), strict=True):
        torch.testing.assert_close(got, own, equal_nan=True)
