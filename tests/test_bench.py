"""`python -m fastgan.bench`: its statistics, data and comparison; no time is asserted."""

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.bench import __main__ as command
from fastgan.bench import floor, memory, pairing, plot, results
from fastgan.bench.cases import CASES, Case, layers
from fastgan.bench.steps import providers
from fastgan.nn import Discriminator

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_gan_bce  # noqa: E402

CPU = torch.device("cpu")
TINY = Case("tiny", 16, 1, 4, 2, 2, 2, "fp32", 1.0)
RATES = {"fp32 GFLOP/s": 100.0, "bf16 GFLOP/s": 10.0, "copy GB/s": 10.0}


@pytest.fixture
def tiny_cases(monkeypatch):
    monkeypatch.setattr(
        results, "CASES", (TINY, TINY.__class__(**{**vars(TINY), "name": "tiny bf16", "precision": "bf16"}))
    )


def row(speed: float, noise: float = 0.0, kept: int = 100) -> dict:
    """Fastgan at `speed` times the stock step, each round off by up to `noise` of it."""
    off = [0.0, 1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.75, -0.75]
    times = {
        "stock": [1.0] * len(off),
        "tuned": [0.9] * len(off),
        "fastgan": [1 / (speed * (1 + noise * x)) for x in off],
    }
    return {"case": "tiny", "seconds": times, "kept_bytes": {"fastgan": {"generator": kept}}}


def test_quick_run_writes_complete_data_and_a_picture_of_it(tiny_cases, tmp_path, capsys):
    file, picture = tmp_path / "new.json", tmp_path / "new.png"
    arguments = ["--quick", "--options", "--profile", "--rounds", "6", "--json", str(file), "--plot", str(picture)]
    assert command.main(arguments) == 0
    data, said = results.read(file), capsys.readouterr().out
    assert data["environment"]["versions"]["torch"] == torch.__version__
    assert data["environment"]["kernels"] == torch.ops.fastgan_cpu.instruction_set()
    assert data["peaks"].keys() == RATES.keys()
    assert [measured["case"] for measured in data["rows"]] == ["tiny", "tiny bf16"]
    for measured in data["rows"]:
        assert measured["seconds"].keys() == providers(CPU, options=True).keys() - {"compiled"}
        assert all(len(times) == 6 and min(times) > 0 for times in measured["seconds"].values())
        assert measured["case"] in said
        shares = [taken["share"] for taken in measured["profile"]]
        assert shares[:-1] == sorted(shares[:-1], reverse=True)
        assert 0.5 < sum(shares) <= 1.001
        assert "fastgan_cpu::convolve" in {taken["name"] for taken in measured["profile"]}
    assert "times stock" in said
    assert "floor" in said
    assert plot.drawn_from(picture) == plot.digest(data["rows"])
    # Compared with itself the same data shows no regression; beside data twice as fast it does, and the exit says so.
    assert results.regressions(data["rows"], data["rows"]) == []
    faster = copy.deepcopy(data)
    for measured in faster["rows"]:
        measured["seconds"]["stock"] = [1e6 * t for t in measured["seconds"]["stock"]]
    results.save(faster, file)
    assert command.main(["--quick", "--rounds", "6", "--case", "bf16", "--compare", str(file)]) == 1
    assert "slower: tiny bf16" in capsys.readouterr().err


@pytest.mark.slow
def test_full_run_has_every_competitor_and_its_memory(tiny_cases, tmp_path):
    file = tmp_path / "new.json"
    assert command.main(["--rounds", "6", "--case", "bf16", "--json", str(file)]) == 0
    (measured,) = results.read(file)["rows"]
    assert measured["seconds"].keys() == providers(CPU).keys() == measured["peak_bytes"].keys() | {"compiled"}
    assert all(size is None or size > 0 for size in measured["peak_bytes"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "nothing"], "DCGAN-64, batch 32, fp32"),
        (["--rounds", "5"], "at least 6"),
        (["--device", "gpu"], "cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "finds"),
        (["--json", "missing/new.json"], "missing is not a folder"),
        (["--plot", "missing/new.png"], "missing is not a folder"),
        (["--json", "text.json/new.json"], "text.json is not a folder"),
        (["--json", "."], "--json: expected the name of a file, got the folder ."),
        (["--json", ""], "--json: expected the name of a file, got the folder ."),
        (["--plot", "."], "--plot: expected the name of a file, got the folder ."),
        (["--compare", "missing.json"], "missing.json: No such file"),
        (["--compare", "text.json"], "text.json: not JSON"),
        (["--compare", "list.json"], "list.json: expected benchmark data of format 1, got None"),
        (["--compare", "empty.json"], "empty.json: not what --json wrote (KeyError: 'rows')"),
        (["--compare", "number.json"], "number.json: not what --json wrote (TypeError: rows are a list, not int)"),
        (["--compare", "row.json"], "row.json: not what --json wrote (KeyError: 'stock')"),
        (["--compare", "rounds.json"], "rounds.json: not what --json wrote (ValueError: "),
    ],
)
def test_bad_arguments_end_with_2_before_anything_is_measured(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("no data")
    (tmp_path / "list.json").write_text(json.dumps([]))
    shorter = {"case": "tiny", "seconds": {"stock": [1.0, 1.0], "fastgan": [1.0]}}
    for name, given in {
        "empty": {},
        "number": {"rows": 3},
        "row": {"rows": [{"case": "tiny", "seconds": {}}]},
        "rounds": {"rows": [shorter]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"format": results.FORMAT, **given}))
    monkeypatch.setattr(command, "peaks", lambda device: pytest.fail("it measured"))
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_what_was_measured_is_kept_when_a_later_case_fails(tiny_cases, tmp_path, monkeypatch):
    file, picture = tmp_path / "new.json", tmp_path / "new.png"
    measure = results.measure

    def broken(case, *others):
        if case.precision == "bf16":
            raise KeyboardInterrupt
        return measure(case, *others)

    monkeypatch.setattr(results, "measure", broken)
    assert command.main(["--quick", "--rounds", "6", "--json", str(file), "--plot", str(picture)]) == 130
    rows = results.read(file)["rows"]
    assert [measured["case"] for measured in rows] == ["tiny"]
    assert plot.drawn_from(picture) == plot.digest(rows)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "its process ended with SIGKILL"),
        ("raise MemoryError('no more')", "its process ended with exit code 1. MemoryError: no more"),
    ],
)
def test_a_process_that_dies_costs_its_own_figure_alone(code, message, monkeypatch, capsys):
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _, **options: run([sys.executable, "-c", code], **options))
    assert results.measure_memory(TINY, CPU, ["stock"])["peak_bytes"] == {"stock": None}
    assert f"no peak memory of stock in tiny: {message}" in capsys.readouterr().err


def test_unknown_options_end_with_2():
    with pytest.raises(SystemExit) as stop:
        command.main(["--fast"])
    assert stop.value.code == 2


class TestComparison:
    def test_beyond_noise_is_a_regression(self):
        assert results.regressions([row(2.0, 0.05)], [row(1.7, 0.05)])

    def test_within_noise_is_none(self):
        assert not results.regressions([row(2.0, 0.05)], [row(1.95, 0.05)])
        assert not results.regressions([row(2.0, 0.3)], [row(1.7, 0.3)])

    def test_faster_is_none(self):
        assert not results.regressions([row(2.0, 0.05)], [row(2.5, 0.05)])

    def test_more_bytes_kept_are_one(self):
        assert "101 bytes" in results.regressions([row(2.0)], [row(2.0, kept=101)])[0]

    def test_a_slower_hour_of_the_machine_is_none(self):
        slower = row(2.0, 0.05)
        slower["seconds"] = {name: [3 * t for t in times] for name, times in slower["seconds"].items()}
        assert not results.regressions([row(2.0, 0.05)], [slower])

    def test_cases_without_a_counterpart_are_left_out(self):
        assert not results.regressions([], [row(1.0)])


class TestPairing:
    @pytest.mark.parametrize("n", [6, 9, 20])
    def test_interval_holds_the_median_as_often_as_it_says(self, n):
        random = np.random.default_rng(0)
        held = 0
        for _ in range(2000):
            interval = pairing.median_interval(list(random.lognormal(size=n)))
            held += interval.low <= 1.0 <= interval.high
        assert held / 2000 > 0.94

    def test_interval_is_no_wider_than_needed(self):
        assert pairing.median_interval(range(9)) == (4, 1, 7)  # [0, 8] would hold it with 99.6 %

    def test_drift_of_the_machine_cancels(self):
        drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
        assert pairing.ratio([3 * d for d in drift], drift) == (3, 3, 3)

    def test_competitors_take_turns_and_each_begins(self):
        order: list[str] = []
        names = "abc"
        competitors = {name: (lambda name=name: order.append(name)) for name in names}
        times = pairing.interleave(competitors, 3, 1, CPU)
        assert "".join(order) == "abcbcacab"
        assert {name: len(t) for name, t in times.items()} == dict.fromkeys(names, 3)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such thresholds")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_kept(kept):
    """Three blocks of 20 MB, all freed: what is resident afterwards."""
    program = f"""
import ctypes
from fastgan.bench.memory import _status
from fastgan.bench.pairing import keep_freed_memory
if {kept}:
    keep_freed_memory()
size, libc = 20_000_000, ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = _status("VmRSS")
blocks = [libc.malloc(size) for _ in range(3)]
for block in blocks:
    ctypes.memset(block, 1, size)
for block in blocks:
    libc.free(block)
print(_status("VmRSS") - before)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=plain, check=True)
    assert (int(done.stdout) > 40_000_000) == kept, done.stdout


class TestFloor:
    def test_layers_are_those_of_the_networks(self):
        stock = next(case for case in CASES if case.name == "DCGAN-64, batch 32, fp32")
        generator, discriminator = layers(stock)
        assert [layer.name for layer in discriminator][1] == "D2 64-128 to 16x16"
        assert generator[-1].gflop(32) == pytest.approx(2e-9 * 32 * 32 * 32 * 16 * 64 * 3)
        for layer in (*generator, *discriminator):
            output = layer.module()(torch.empty(1, layer.in_channels, layer.input_size, layer.input_size))
            assert output.shape == (1, layer.out_channels, layer.output_size, layer.output_size)

    def test_step_has_the_flops_that_torch_counts(self):
        from torch.utils.flop_counter import FlopCounterMode

        step = providers(CPU)["tuned"].step(TINY, CPU)
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        assert floor.work(TINY)["definition GFLOP"] == pytest.approx(1e-9 * counter.get_total_flops(), rel=1e-6)

    def test_floor_is_less_than_the_definition_at_peak_and_grows_with_slower_machines(self):
        work = floor.work(CASES[5])
        now, slower = (floor.floor(work, "fp32", {k: v / by for k, v in RATES.items()}) for by in (1, 2))
        assert 0 < now["multiplications"] < work["definition GFLOP"] / RATES["fp32 GFLOP/s"]
        assert slower["memory"] == pytest.approx(2 * now["memory"])

    def test_slow_16_bits_do_not_raise_the_floor(self):
        work = floor.work(CASES[6])
        assert floor.floor(work, "bf16", RATES) == floor.floor(work, "fp32", RATES)


def test_bytes_kept_are_those_of_the_saved_tensors():
    discriminator, images = Discriminator(16, 1, 2), torch.rand(4, 1, 16, 16)
    # The images, each convolution's output (LeakyReLU works in place on the first), z and two statistics of BatchNorm.
    shapes = [(1, 16, 16), (2, 8, 8), (4, 4, 4), (4, 4, 4)]
    expected = sum(4 * 4 * int(np.prod(shape)) for shape in shapes) + 2 * 4 * 4
    assert memory.kept_bytes(discriminator, images, "eager") == expected


def test_benchmarks_run():
    """Each once, small and untimed: they are still written for the code as it is."""
    options = ["--quick", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", str(BENCHMARKS), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize("one", [bench_gan_bce.definition, bench_gan_bce.operation, bench_gan_bce.nothing])
def test_competitors_of_gan_bce_return_all_that_it_is(one):
    """A compiler that sees D(x) and D(G(z)) dropped does not compute them."""
    torch.manual_seed(0)
    logits = [torch.randn(16, requires_grad=True) for _ in range(2)]
    loss, *numbers = one(*logits)
    assert [number.requires_grad for number in (loss, *numbers)] == [True, True, True, False, False]
    assert all(gradient.shape == (16,) for gradient in torch.autograd.grad(loss, logits))
    if one is not bench_gan_bce.nothing:
        torch.testing.assert_close([loss, *numbers], [*bench_gan_bce.definition(*logits)])


def test_benchmarks_that_cannot_be_written_are_not_measured(tmp_path):
    options = ["--collect-only", "--rows", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "pytest", str(BENCHMARKS), *options], capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--rows: expected the name of a file, got the folder {tmp_path}" in done.stderr


def test_run_length_comes_from_the_images_per_second():
    measured = {**row(2.0), "batch_size": 10, "kimg": 3.0}
    assert results.images_per_second(measured) == 10 / statistics.median(measured["seconds"]["fastgan"])
    assert results.run_seconds(measured) == pytest.approx(3000 / 20)
    assert [command.duration(s) for s in (90, 600, 36000)] == ["90 s", "10 min", "10.0 h"]
