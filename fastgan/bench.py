"""`python -m fastgan.bench`: how fast a training step is here, beside PyTorch's own.

The stock step is that of PyTorch's DCGAN example (contiguous tensors, all gradients); the tuned one is fastgan's step
on eager operations with channels-last tensors and fused Adam. All run in one process, one after the other, again and
again; what is reported is the median of the ratios of neighbours.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from fastgan.backends import use_backend
from fastgan.command import run_command
from fastgan.errors import FastganError
from fastgan.nn import Discriminator, Generator
from fastgan.step import GanStep
from fastgan.versions import cpu_name, versions


@dataclass(frozen=True)
class Case:
    """One training step: images, widths and batch."""

    name: str
    image_size: int
    channels: int
    latent_dim: int
    g_channels: int
    d_channels: int
    batch_size: int


CASES = (
    Case("digits (the default run)", 32, 1, 16, 24, 16, 32),
    Case("DCGAN-32, 1 channel", 32, 1, 100, 64, 64, 64),
    Case("DCGAN-64, batch 32", 64, 3, 100, 64, 64, 32),
    Case("DCGAN-64, batch 64", 64, 3, 100, 64, 64, 64),
    Case("DCGAN-128", 128, 3, 100, 64, 64, 16),
)


@dataclass
class BenchConfig:
    """Measure a training step: fastgan beside eager PyTorch, images per second and ratios."""

    quick: bool = False
    """only the smallest cases, few repeats"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    repeats: int = 7
    """rounds in which each provider runs once"""
    case: str = ""
    """only cases whose name contains this"""
    json: Path | None = None
    """write the results, with machine and versions, here"""
    compare: Path | None = None
    """an older --json file: exit 1 where fastgan's ratio to the stock step fell beyond the noise of both"""
    debug: Annotated[bool, tyro.conf.arg(help="show tracebacks of errors")] = False


def stock_step(case: Case, device: torch.device) -> Callable[[Tensor], Any]:
    """The step of PyTorch's DCGAN example: every backward pass computes all gradients."""
    generator, discriminator = networks(case, device)
    optimizers = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in (generator, discriminator)]
    loss, (opt_g, opt_d) = nn.BCELoss(), optimizers
    ones, zeros = (torch.full((case.batch_size,), value, device=device) for value in (1.0, 0.0))

    def step(real: Tensor) -> None:
        opt_d.zero_grad()
        loss(discriminator(real).sigmoid(), ones).backward()
        fake = generator(torch.randn(case.batch_size, case.latent_dim, device=device))
        loss(discriminator(fake.detach()).sigmoid(), zeros).backward()
        opt_d.step()
        opt_g.zero_grad()
        loss(discriminator(fake).sigmoid(), ones).backward()
        opt_g.step()

    return step


def own_step(case: Case, device: torch.device) -> Callable[[Tensor], Any]:
    """fastgan's step with channels-last networks, as the trainer makes it."""
    generator, discriminator = networks(case, device)
    optimizers = []
    for network in (generator, discriminator):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizers.append(torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999), fused=True))
    return GanStep(generator, discriminator, optimizers[0], optimizers[1])


def networks(case: Case, device: torch.device) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator = Generator(case.image_size, case.channels, case.latent_dim, case.g_channels)
    return generator.to(device), Discriminator(case.image_size, case.channels, case.d_channels).to(device)


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds per step of each provider and the ratios of neighbours, medians with quartiles."""
    real = torch.randn(case.batch_size, case.channels, case.image_size, case.image_size, device=device)
    last = real.contiguous(memory_format=torch.channels_last)
    tuned = own_step(case, device)
    providers = {
        "stock": (stock_step(case, device), real, "eager"),
        "tuned": (tuned, last, "eager"),
        "fastgan": (own_step(case, device), last, None),
    }
    steps = max(1, round(0.1 / _seconds(*providers["fastgan"], 1, device)))
    for provider in providers.values():
        _seconds(*provider, 1, device)
    rounds = [{n: _seconds(*p, steps, device) for n, p in providers.items()} for _ in range(repeats)]
    result: dict[str, Any] = {"case": case.name, "batch_size": case.batch_size, "rounds": repeats, "steps": steps}
    for name in providers:
        result[f"{name}_seconds"] = statistics.median(r[name] for r in rounds)
    for name in ("stock", "tuned"):
        ratios = sorted(r[name] / r["fastgan"] for r in rounds)
        result[f"ratio_{name}"] = statistics.median(ratios)
        result[f"ratio_{name}_quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
    result["images_per_second"] = case.batch_size / result["fastgan_seconds"]
    return result


def _seconds(
    step: Callable[[Tensor], Any], real: Tensor, backend: str | None, steps: int, device: torch.device
) -> float:
    with use_backend(backend):
        begin = time.perf_counter()
        for _ in range(steps):
            step(real)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / steps


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "machine": machine,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python -m fastgan.bench", *sys.argv[1:]]),
    }


def regressions(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """Cases whose ratio to the stock step fell so far that the quartiles of the two no longer touch."""
    before = {row["case"]: row for row in old}
    return [
        f"{row['case']}: {before[row['case']]['ratio_stock']:.2f} -> {row['ratio_stock']:.2f} times the stock step"
        for row in new
        if row["case"] in before and row["ratio_stock_quartiles"][1] < before[row["case"]]["ratio_stock_quartiles"][0]
    ]


def bench(config: BenchConfig) -> int:
    cases = [c for c in (CASES[:2] if config.quick else CASES) if config.case in c.name]
    if not cases:
        raise FastganError(f"--case: expected a part of one of {', '.join(c.name for c in CASES)}; got {config.case!r}")
    device, rows = torch.device(config.device), []
    print(f"{'':26} {'images/s':>9} {'step':>9} {'stock':>9} {'tuned':>9}   times the speed of stock and tuned eager")
    for case in cases:
        row = measure(case, device, 3 if config.quick else config.repeats)
        rows.append(row)
        step, stock, tuned = (1e3 * row[f"{n}_seconds"] for n in ("fastgan", "stock", "tuned"))
        print(
            f"{case.name:26} {row['images_per_second']:9.0f} {step:6.1f} ms {stock:6.1f} ms {tuned:6.1f} ms   "
            f"{row['ratio_stock']:.2f} [{row['ratio_stock_quartiles'][0]:.2f}, {row['ratio_stock_quartiles'][1]:.2f}]  "
            f"{row['ratio_tuned']:.2f}",
            flush=True,
        )
    if config.json is not None:
        config.json.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
    if config.compare is None:
        return 0
    slower = regressions(json.loads(config.compare.read_text())["rows"], rows)
    print(*(f"slower: {line}" for line in slower), sep="\n")
    return 1 if slower else 0


def main() -> int:
    config = tyro.cli(BenchConfig, prog="python -m fastgan.bench")
    code = 0

    def run() -> None:
        nonlocal code
        code = bench(config)

    return run_command(run, debug=config.debug) or code


if __name__ == "__main__":
    sys.exit(main())
