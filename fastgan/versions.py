"""Versions and machine, as recorded in checkpoints, reports and benchmark data."""

import os
import platform
from functools import cache
from importlib import metadata

import torch

import fastgan


@cache
def versions() -> dict[str, str]:
    """What a result depends on besides its configuration."""
    packages = {name: _version(name) for name in ("triton", "numpy")}
    return {
        "fastgan": fastgan.__version__,
        "torch": torch.__version__,
        **packages,
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The device as a person knows it, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_name()}, {torch.get_num_threads()} threads on {cores} cores"
