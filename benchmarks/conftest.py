"""What the benchmarks share: competitors, pairs, and the machine's peaks.

pytest benchmarks/ --benchmark-only [--device cuda] [--rows F.json] [-k PART_OF_A_NAME]

prints pytest-benchmark's table, then each competitor beside its reference: both took turns in one process, the ratio is
the median over the rounds with its 95 % confidence interval. `--quick` with `--benchmark-disable` only runs everything
once, small, as the tests do.
"""

import json
from pathlib import Path

import pytest
import torch

from fastgan.backends import BACKENDS
from fastgan.bench.machine import best_of, environment, peaks
from fastgan.bench.pairing import keep_freed_memory, median_interval, ratio, seconds
from fastgan.errors import FastganError
from fastgan.files import check_place, replacing

SECONDS = 1.0  # about as long each pair is measured
ROUNDS = (9, 200)
ROWS = pytest.StashKey[list]()
PEAKS = pytest.StashKey[dict]()
QUICK_BATCH = 2


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help=f"batches of {QUICK_BATCH}, without torch.compile")
    parser.addoption("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.addoption("--rows", metavar="FILE", help="write the pairs, with machine, versions and commit, as JSON")


def pytest_configure(config):
    keep_freed_memory()
    config.stash[ROWS] = []
    if file := config.getoption("rows"):
        try:
            check_place(Path(file), "--rows")
        except FastganError as error:
            raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc):
    """`provider` of an operation: eager as a newcomer writes it, eager tuned, torch.compile, and each backend. A module
    leaves some out by `WITHOUT`."""
    if "provider" in metafunc.fixturenames:
        device = torch.device(metafunc.config.getoption("device")).type
        backends = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[device]
        assert set(backends) <= set(BACKENDS)
        left_out = {*getattr(metafunc.module, "WITHOUT", ()), *(("compiled",) if _quick(metafunc.config) else ())}
        metafunc.parametrize("provider", [p for p in ("eager", "tuned", "compiled", *backends) if p not in left_out])


def _quick(config) -> bool:
    return config.getoption("quick")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def batch(request):
    """`batch(32)` is 32, or little with --quick."""
    return lambda size: QUICK_BATCH if _quick(request.config) else size


@pytest.fixture(scope="session")
def best(device, request) -> dict[str, float]:
    """The measured peaks of the machine."""
    return request.config.stash.setdefault(PEAKS, peaks(device))


@pytest.fixture
def pair(benchmark, request, device):
    """`pair(run, reference, gflop=..., gigabytes=...)` benchmarks `run`, with `reference` before each of its rounds."""

    def measure(run, reference, gflop: float = 0.0, gigabytes: float = 0.0) -> None:
        times: list[float] = []
        slowest = 0.0
        if benchmark.enabled:
            slowest = max(seconds(f, calls, device) for calls in (1, 1) for f in (run, reference))
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / 2 / slowest))) if slowest else 1

        def timed() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.pedantic(
            timed, setup=lambda: times.append(seconds(reference, 1, device)), rounds=rounds, warmup_rounds=1
        )
        if not benchmark.enabled:
            return
        own = benchmark.stats.stats.data
        given = dict(request.node.callspec.params)
        provider = given.pop("provider", given.pop("competitor", ""))
        row = {
            "group": benchmark.group,
            "name": ", ".join(str(getattr(v, "name", v)) for k, v in given.items() if k != "what"),
            "provider": provider,
            "seconds": median_interval(own).median,
            "times_reference": ratio(times[-rounds:], own),
        }
        if gflop:
            row["GFLOP/s"] = gflop / row["seconds"]
            row["share of peak"] = row["GFLOP/s"] / request.getfixturevalue("best")["fp32 GFLOP/s"]
        if gigabytes:
            row["GB/s"] = gigabytes / row["seconds"]
            row["share of copy"] = row["GB/s"] / request.getfixturevalue("best")["copy GB/s"]
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    return measure


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("beside the reference")
    width = max(len(row["name"]) for row in rows) + 10
    for index, row in enumerate(rows):
        if index == 0 or row["group"] != rows[index - 1]["group"]:
            terminalreporter.write_line(str(row["group"]))
        median, low, high = row["times_reference"]
        who = f"{row['name']} {row['provider']}"
        text = f"  {who:<{width}}{1e3 * row['seconds']:10.3f} ms  {median:5.2f} [{low:.2f}, {high:.2f}]"
        for rate, share in (("GFLOP/s", "share of peak"), ("GB/s", "share of copy")):
            if rate in row:
                text += f"{row[rate]:8.1f} {rate}, {100 * row[share]:3.0f} % of the measured peak"
        terminalreporter.write_line(text)
    if file := config.getoption("rows"):
        device = torch.device(config.getoption("device"))
        now = peaks(device)
        best = best_of(config.stash.get(PEAKS, now), now)
        data = {"environment": environment(device, "pytest"), "peaks": best, "rows": rows}
        with replacing(Path(file)) as temporary:
            temporary.write_text(json.dumps(data, indent=1) + "\n")
