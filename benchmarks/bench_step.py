"""A whole training step: the stock example's, the tuned eager one and fastgan's.

pytest -o addopts= benchmarks/bench_step.py --benchmark-only --benchmark-group-by=param:case
`python -m fastgan.bench` measures the same interleaved, which is what to quote.
"""

import pytest
import torch

from fastgan.backends import use_backend
from fastgan.bench import CASES, own_step, stock_step

PROVIDERS = {"stock": (stock_step, "eager"), "tuned": (own_step, "eager"), "fastgan": (own_step, None)}


@pytest.mark.benchmark(group="step", min_rounds=3)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark, case, provider):
    make, backend = PROVIDERS[provider]
    step = make(case, torch.device("cpu"))
    real = torch.randn(case.batch_size, case.channels, case.image_size, case.image_size)
    if provider != "stock":
        real = real.contiguous(memory_format=torch.channels_last)
    with use_backend(backend):
        benchmark(step, real)
