"""How long the libraries take to build and how large they are: `python benchmarks/build_times.py [--isolated]`.

Each figure is one run in a fresh copy of the project; the result goes to docs/data/build_times.json and into the table
of docs/building.md. Nothing else should run on the machine. `--isolated` measures, instead, what build isolation adds:
`pip` makes a build environment with its own torch, and builds no library in it.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastgan import build

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "data" / "build_times.json"
PAGE = ROOT / "docs" / "building.md"
ARCHITECTURES = "8.0;9.0"
LOAD = "from fastgan import library; library.load('cpu')"
WHEEL, ISOLATED = "pip wheel . --no-build-isolation --no-deps", "pip wheel . --no-deps, no library"


def seconds(command: list[str], folder: Path, **environment: str) -> float:
    """Of one run; its output is shown only when it fails."""
    start = time.perf_counter()
    run = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return time.perf_counter() - start


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {what: round(value, 1) for what, value in figures.items()}


def pip_wheel(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-q", "-w", str(folder / "wheels")]


def measure(folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """({what: seconds}, {library: bytes})"""
    environment = {"TORCH_CUDA_ARCH_LIST": ARCHITECTURES, "MAX_JOBS": str(os.cpu_count())}
    environment |= {"FASTGAN_CACHE": str(folder / "cache"), "PYTHONPATH": str(folder), "FASTGAN_JIT": ""}
    figures = {WHEEL: seconds([*pip_wheel(folder), "--no-build-isolation"], folder, **environment)}
    sizes = {}
    for name in build.LIBRARIES:
        built = list(folder.glob(f"build/lib*/fastgan/{build.library_filename(name)}"))
        if not built:
            sys.exit(f"the {name} library was not built; `pip wheel . --no-build-isolation -v` tells why")
        sizes[name] = built[0].stat().st_size
    load = [sys.executable, "-c", LOAD]
    figures["just in time, cold"] = seconds(load, folder, **environment)
    figures["just in time, warm"] = seconds(load, folder, **environment)
    return figures, sizes


def measure_isolation(folder: Path) -> dict[str, float]:
    return {ISOLATED: seconds(pip_wheel(folder), folder, FASTGAN_BUILD_CPU="0", FASTGAN_BUILD_CUDA="0")}


MEANING = {
    WHEEL: f"the CPU library, and the CUDA library for {ARCHITECTURES}",
    ISOLATED: "what build isolation adds: an environment with a torch of its own, downloaded",
    "just in time, cold": "the CPU library at its first use, with the import of torch",
    "just in time, warm": "the same in the next process",
}


def table(said: dict) -> str:
    lines = ["| what | | |", "|---|---|---|"]
    lines += [f"| {what} | {MEANING[what]} | {value} s |" for what, value in said["seconds"].items()]
    names = [(build.library_filename(library), size) for library, size in said["bytes"].items()]
    lines += [f"| `{name}` | | {size / 1e6:.1f} MB |" for name, size in names]
    return "\n".join(lines)


def written(text: str, said: dict) -> str:
    """The page with the table in its place."""
    filled = f"<!-- build times -->\n\n{table(said)}\n\n<!-- end -->"
    return re.sub(r"<!-- build times -->.*?<!-- end -->", lambda _: filled, text, flags=re.S)


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
        if arguments.isolated:
            said = json.loads(RESULT.read_text())
            said["seconds"] |= rounded(measure_isolation(folder))
        else:
            figures, sizes = measure(folder)
            isolated = json.loads(RESULT.read_text())["seconds"].get(ISOLATED) if RESULT.is_file() else None
            said = {
                "command": "python benchmarks/build_times.py",
                "cores": os.cpu_count(),
                "torch": importlib.metadata.version("torch"),
                "compiler": build._version_line(build.find_cxx()),
                "nvcc": ".".join(map(str, build.find_cuda(build.find_torch().cuda).version)),
                "seconds": rounded(figures | ({ISOLATED: isolated} if isolated else {})),
                "bytes": sizes,
            }
    RESULT.write_text(json.dumps(said, indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), said), encoding="utf-8")
    print(table(said))


if __name__ == "__main__":
    main()
