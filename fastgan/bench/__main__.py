"""`python -m fastgan.bench`: how fast a training step is here, beside PyTorch's own; see `--help`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import fastgan.command
from fastgan.bench import plot, results
from fastgan.bench.machine import best_of, peaks
from fastgan.bench.pairing import MIN_ROUNDS
from fastgan.bench.profiling import top_operations
from fastgan.bench.steps import providers
from fastgan.devices import choose_device
from fastgan.errors import FastganError
from fastgan.files import check_place

NOISY = 0.1  # share of the processors that others may take


@dataclass
class BenchConfig:
    """Measure training steps: images per second, and how many times as fast as PyTorch's DCGAN example.

    All competitors take turns in one process. Ratios are medians over the rounds, with their 95 % confidence interval.
    """

    quick: bool = False
    """the two smallest cases, without torch.compile and without peak memory: a minute"""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N"""
    rounds: int = 9
    """how often each competitor takes its turn, at least 6"""
    case: str = ""
    """only cases whose name contains this, such as "DCGAN-64" or "batch 32, bf16" """
    compiled: bool = True
    """torch.compile too, which takes a minute or more to compile each case the first time"""
    memory: bool = True
    """measure the peak memory of each competitor too, in processes of their own"""
    options: bool = False
    """measure fastgan's options too: real and fake images apart, the discriminator's first convolution recomputed"""
    profile: bool = False
    """show too which operations of fastgan's step take most of its time"""
    json: Path | None = None
    """write the data, with machine, versions and commit, here, after each case"""
    plot: Path | None = None
    """draw the ratios into this PNG file"""
    compare: Path | None = None
    """an older --json file: exit with 1 where fastgan got slower beyond the noise of both"""
    debug: Annotated[bool, tyro.conf.arg(help="show tracebacks of errors")] = False


def checked_device(config: BenchConfig) -> torch.device:
    """The device; FastganError for the first value that cannot work, before anything is measured."""
    if config.rounds < MIN_ROUNDS:
        raise FastganError(f"--rounds: expected at least {MIN_ROUNDS}, which an interval needs; got {config.rounds}")
    for option, path in (("--json", config.json), ("--plot", config.plot)):
        if path is not None:
            check_place(path, option)
    return choose_device(config.device)


def bench(config: BenchConfig) -> list[str]:
    """Measure, print and, after each case, save; returns the regressions against `config.compare`."""
    device = checked_device(config)
    cases = results.select(config.case, config.quick)
    old = None if config.compare is None else results.read(config.compare)
    best = peaks(device)
    competitors = providers(device, config.options)
    if config.quick or not config.compiled:
        del competitors["compiled"]
    print("competitors: " + "; ".join(f"{name}: {provider.what}" for name, provider in competitors.items()))
    rows = []
    for case in cases:
        row = results.measure(case, device, competitors, config.rounds)
        if config.memory and not config.quick:
            row |= results.measure_memory(case, device, competitors)
        if config.profile:
            row["profile"] = top_operations(case, device)
        rows.append(row)
        best = best_of(best, peaks(device))
        print("\n" + "\n".join(lines(row, best)), flush=True)
        data = results.document(device, best, rows)
        if config.json is not None:
            results.save(data, config.json)
        if config.plot is not None:
            plot.draw(rows, data["environment"]["machine"], config.plot)
    print("\nmeasured peaks: " + ", ".join(f"{rate:.0f} {name}" for name, rate in best.items()))
    return [] if old is None else results.regressions(old["rows"], rows)


def lines(row: results.Row, peaks: dict[str, float]) -> list[str]:
    """What is printed of one case."""
    found = [row["case"]]
    for name in row["seconds"]:
        text = f"  {name:<20}{results.images_per_second(row, name):8.0f} images/s"
        text += f"{1e3 * results.step_seconds(row, name):9.1f} ms a step"
        if (peak := row.get("peak_bytes", {}).get(name)) is not None:
            text += f"{peak / 2**20:8.0f} MiB"
        if name != "stock":
            text += f"   {results.times_as_fast(row, 'stock', name)} times stock"
        found.append(text)
    other, floor = results.best_other(row), results.floor_seconds(row, peaks)
    found.append(f"  fastgan is {results.times_as_fast(row, other)} times as fast as {other}")
    found.append(
        f"  floor {1e3 * sum(floor.values()):.1f} ms ({1e3 * floor['multiplications']:.1f} multiplying, "
        f"{1e3 * floor['memory']:.1f} memory): {100 * results.floor_share(row, peaks):.0f} % of it reached, "
        f"{results.gflops(row):.0f} GFLOP/s by the convolutions' definition"
    )
    for network, kept in row.get("kept_bytes", {}).get("fastgan", {}).items():
        eager = row["kept_bytes"]["tuned"][network]
        found.append(f"  {network}: {kept / 2**20:.1f} MiB kept for backward, {kept / eager:.2f} of eager's")
    for taken in row.get("profile", []):
        found.append(
            f"  {taken['name']:<40}{1e3 * taken['seconds']:9.2f} ms in {taken['calls']:.0f} calls"
            f"{100 * taken['share']:6.1f} %"
        )
    if (row["others"] or 0.0) > NOISY:
        found.append(f"  others took {100 * row['others']:.0f} % of the processors: measure again on a quiet machine")
    found.append(f"  a run of {row['kimg']:.0f} kimg: {duration(results.run_seconds(row))}")
    return found


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(arguments: Sequence[str]) -> int:
    slower: list[str] = []
    code = fastgan.command.run_configured(
        BenchConfig, "python -m fastgan.bench", lambda config: slower.extend(bench(config)), arguments
    )
    for line in slower:
        print(f"slower: {line}", file=sys.stderr)
    return code or (1 if slower else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
