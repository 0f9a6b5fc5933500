"""The CUDA kernels in numbers: the tables in `docs/cuda.md`.

`python tests/cuda_table.py` writes it from the planted bugs of `csrc/simt/selftest.cu` as the runtime reports them, the
mutation score and the resource budget; `tests/test_cuda_table.py` fails when it is out of date.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import mutations
from simt import simt
from test_simt import PLANTED

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "cuda.md"
BUDGET = HERE / "cuda_budget.json"
HEAD = """# The CUDA kernels, proved without a GPU

Made by `python tests/cuda_table.py`; do not edit. The kernels of `csrc/cuda` run thread by thread on the host, in the
runtime of `csrc/simt`, and are compiled ahead of time by nvcc. Neither is a graphics card: order of threads, memory
and speed there are the card's own, and `pytest -m gpu` asks it.

## What the host runtime reports

Each kernel of [selftest.cu](../csrc/simt/selftest.cu) has one bug planted and a mended twin, which must not be reported
([test_simt.py](../tests/test_simt.py)). Shown is the first report of it with the threads in order; a report
also names the kernel and how often it came.

| planted in | reported as | message | at | block | thread |
|---|---|---|---|---|---|
"""
MUTANTS = """
## What is noticed when it is taken away

Each barrier, bounds check and mask of `csrc/cuda`, one at a time, against the tests of its operation
([mutations.py](../tests/mutations.py), which also lists what is no guard and why; the test that noticed each is in
[mutation_score.json](../tests/mutation_score.json)).

| file | mutants | noticed | equivalent |
|---|---|---|---|
"""
RESOURCES = """
## What each kernel takes

Compiled by nvcc {nvcc}, no kernel with spills: registers of a thread, bytes of shared memory of a block, and the share
of a multiprocessor's threads that fit at once, over the dtypes of the kernel. The limits that
[test_cuda_aot.py](../tests/test_cuda_aot.py) holds each build to are these, dtype by dtype, in
[cuda_budget.json](../tests/cuda_budget.json).

| file | kernel | {architectures} |
|---|---|{rule}|
"""


def reports() -> list[str]:
    rows = []
    for kernel in PLANTED:
        simt().set_seed(0)
        simt().selftest(kernel, True)
        first = next(r for r in simt().take_reports() if r["kind"] == PLANTED[kernel])
        block, thread = (f"({', '.join(map(str, first[what]))})" for what in ("block", "thread"))
        at = next(place for place in first["where"].split(", ") if place.startswith("selftest.cu"))
        rows.append(f"| `{kernel}` | {first['kind']} | {first['message']} | {at} | {block} | {thread} |")
    return rows


def mutants() -> list[str]:
    by_file = defaultdict(list)
    for key, noticed_by in mutations.load_score().items():
        by_file[key.partition(":")[0]].append(noticed_by)
    rows = []
    for file, results in by_file.items():
        missed = results.count(mutations.NOT_NOTICED)
        rows.append(f"| {file} | {len(results)} | {len(results) - missed} | {missed} |")
    listed = [f"* `{key}`: {reason}" for key, reason in mutations.EQUIVALENT.items()]
    return [*rows, "", "Equivalent, each with its reason:", "", *listed]


def spread(values: list[float], scale: int = 1) -> str:
    low, high = (round(scale * f(values)) for f in (min, max))
    return str(low) if low == high else f"{low} to {high}"


def resources(kernels: dict, architectures: list[str]) -> list[str]:
    rows = []
    for file, of_file in kernels.items():
        grouped = defaultdict(list)
        for name, found in of_file.items():
            grouped[re.sub(r"<?\b(__half|__nv_bfloat16|float)\b>?", "", name)].append(found)
        for name, over_dtypes in grouped.items():
            cells = []
            for architecture in architectures:
                columns = zip(*(f[architecture] for f in over_dtypes if architecture in f), strict=True)
                cell = [spread(values, scale) for values, scale in zip(columns, (1, 1, 100), strict=False)]
                cells.append(f"{cell[0]}; {cell[1]}; {cell[2]} %" if cell else "-")
            rows.append(f"| {file} | `{name}` | {' | '.join(cells)} |")
    return rows


def page() -> str:
    budget = json.loads(BUDGET.read_text())
    architectures = sorted(
        {a for of_file in budget["kernels"].values() for found in of_file.values() for a in found},
        key=lambda name: int(name.removeprefix("sm_")),
    )
    head = RESOURCES.format(
        nvcc=budget["nvcc"], architectures=" | ".join(architectures), rule="|".join(["---"] * len(architectures))
    )
    parts = [HEAD + "\n".join(reports()), MUTANTS + "\n".join(mutants())]
    return "\n".join([*parts, head + "\n".join(resources(budget["kernels"], architectures))]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
