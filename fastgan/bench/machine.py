"""What a measurement belongs to, and what its machine can do at best."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgan import library
from fastgan.bench.cases import PRECISIONS
from fastgan.bench.pairing import seconds
from fastgan.errors import BackendError
from fastgan.versions import device_name, versions

_PLACES = ("--json", "--plot", "--rows", "--compare")


def environment(device: torch.device, program: str = "python -m fastgan.bench") -> dict[str, Any]:
    """Machine, versions, commit, and the command: `program` with this process's arguments, FASTGAN_CPU before it."""
    forced = os.environ.get("FASTGAN_CPU")
    program = f"FASTGAN_CPU={forced} {program}" if forced else program
    return {
        "machine": device_name(device),
        "device": device.type,
        "capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "versions": versions(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "kernels": _kernels() if device.type == "cpu" else None,
        "command": f"{program} {_measuring(sys.argv[1:])}".rstrip(),
    }


def _kernels() -> str | None:
    """The best instruction set of the kernels; None where the CPU library cannot be had."""
    try:
        library.load("cpu")
    except BackendError:
        return None
    return torch.ops.fastgan_cpu.instruction_set()


def _measuring(arguments: list[str]) -> str:
    """The arguments without the options that say where results lie, which are the machine's own."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return shlex.join(a for before, a in pairs if before not in _PLACES and a.partition("=")[0] not in _PLACES)


def _git(*arguments: str) -> str | None:
    """What git says of the source tree; None where fastgan was installed without one."""
    try:
        root = str(Path(__file__).parent)
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Others:
    """Which share of the processors anyone but this process takes, from when it is made: other processes, and the host
    of a virtual machine. More than a little, and what was measured is theirs too."""

    def __init__(self) -> None:
        self._before = self._now()

    def share(self) -> float | None:
        """From 0 to 1; None where the system does not tell."""
        now = self._now()
        if now is None or self._before is None:
            return None
        busy, idle, own = (b - a for a, b in zip(self._before, now, strict=True))
        return max(0.0, busy - own) / max(busy + idle, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all processors together: busy or taken away, idle, and busy for this process."""
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, idle, waiting, *rest = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
        return user + nice + system + sum(rest), idle + waiting, time.process_time()


def peaks(device: torch.device) -> dict[str, float]:
    """The measured peak rates: GFLOP/s of square matrix products by precision, and GB/s of a copy (read and write
    counted), each the best of several. About a second."""
    found = {f"{name} GFLOP/s": _matrix_gflops(dtype, device) for name, dtype in PRECISIONS.items()}
    source = torch.zeros(1 << 26 if device.type == "cpu" else 1 << 28, device=device)  # far more than caches hold
    target = torch.ones_like(source)
    found["copy GB/s"] = 2e-9 * source.nbytes / _best(lambda: target.copy_(source), device)
    return found


def best_of(*measured: dict[str, float]) -> dict[str, float]:
    """The best of several measurements of `peaks`: a machine shared with others shows its peak only now and then."""
    return {name: max(rates[name] for rates in measured) for name in measured[0]}


def _matrix_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """Of the best size among powers of two that take no longer than a tenth of a second."""
    rate, side = 0.0, 256
    while rate == 0.0 or 2e-9 * side**3 / rate < 0.1:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rate = max(rate, 2e-9 * side**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device))  # type: ignore[misc]
        side *= 2
    return rate


def _best(run: Callable[[], object], device: torch.device, budget: float = 0.2) -> float:
    """Fewest seconds that a call took within about `budget` seconds, at least three calls, after one to warm up."""
    first = seconds(run, 1, device)
    return min(seconds(run, 1, device) for _ in range(max(3, min(50, int(budget / first)))))
