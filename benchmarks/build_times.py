"""How long the libraries take to build and how large they are: `python benchmarks/build_times.py [--isolated]`.

Each figure is one run in a fresh copy of the project; the result goes to docs/data/build_times.json and, as a table, to
standard output. Nothing else should run on the machine. `--isolated` adds `pip install` with build isolation, which
downloads torch into a build environment first.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastgan import build

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "data" / "build_times.json"
ARCHITECTURES = "8.0;9.0"
LOAD = "from fastgan import library; library.load('cpu')"


def seconds(command: list[str], folder: Path, **environment: str) -> float:
    """Of one run; its output is shown only when it fails."""
    start = time.perf_counter()
    run = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return time.perf_counter() - start


def measure(folder: Path, isolated: bool) -> tuple[dict[str, float], dict[str, int]]:
    """({what: seconds}, {library: bytes})"""
    environment = {"TORCH_CUDA_ARCH_LIST": ARCHITECTURES, "MAX_JOBS": str(os.cpu_count())}
    environment |= {"FASTGAN_CACHE": str(folder / "cache"), "PYTHONPATH": str(folder), "FASTGAN_JIT": ""}
    wheel = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-q", "-w", str(folder / "wheels")]
    figures = {f"pip wheel --no-build-isolation (CPU and CUDA for {ARCHITECTURES})": 0.0}
    (first,) = figures
    figures[first] = seconds([*wheel, "--no-build-isolation"], folder, **environment)
    sizes = {}
    for name in build.LIBRARIES:
        built = folder / "build" / f"lib.{platform.system().lower()}-{platform.machine()}-cpython"
        for file in folder.glob(f"build/lib*/fastgan/{build.library_filename(name)}"):
            sizes[name] = file.stat().st_size
            built = file
        if not built.is_file():
            sys.exit(f"the {name} library was not built: {(built.with_suffix('.json')).name} tells why")
    load = [sys.executable, "-c", LOAD]
    figures["just in time, cold (CPU)"] = seconds(load, folder, **environment)
    figures["just in time, warm (CPU; with the import of torch)"] = seconds(load, folder, **environment)
    if isolated:
        shutil.rmtree(folder / "build")
        figures["pip wheel with build isolation (downloads torch)"] = seconds(wheel, folder, **environment)
    return figures, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isolated", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("fastgan", "csrc", "kernels"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "libfastgan_*", "__pycache__")
            )
        for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, folder)
        figures, sizes = measure(folder, arguments.isolated)
    cxx = build.find_cxx()
    said = {
        "command": "python benchmarks/build_times.py" + (" --isolated" if arguments.isolated else ""),
        "cores": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "compiler": build._version_line(cxx),
        "nvcc": ".".join(map(str, build.find_cuda(build.find_torch().cuda).version)),
        "seconds": {what: round(value, 1) for what, value in figures.items()},
        "bytes": sizes,
    }
    RESULT.write_text(json.dumps(said, indent=1) + "\n")
    for what, value in figures.items():
        print(f"| {what} | {value:.1f} s |")
    for library, size in sizes.items():
        print(f"| {build.library_filename(library)} | {size / 1e6:.2f} MB |")


if __name__ == "__main__":
    main()
