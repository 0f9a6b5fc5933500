"""A whole training step of each competitor, beside the stock example's. `python -m fastgan.bench` lets all of them take
turns and adds memory and the floor: quote that."""

import dataclasses

import pytest

from fastgan.bench.cases import CASES
from fastgan.bench.floor import work
from fastgan.bench.steps import providers


@pytest.mark.parametrize("competitor", ["stock", "tuned", "compiled", "fastgan"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(pair, benchmark, batch, device, case, competitor):
    benchmark.group = f"step: {case.name}"
    quick = batch(case.batch_size) < case.batch_size
    if quick and (case != CASES[0] or competitor == "compiled"):
        pytest.skip("--quick: only the default run's step, and nothing is compiled")
    case = dataclasses.replace(case, batch_size=batch(case.batch_size))
    run, reference = (providers(device)[name].step(case, device) for name in (competitor, "stock"))
    pair(run, reference, gflop=work(case)["definition GFLOP"])
