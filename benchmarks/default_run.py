"""Images per second of the default `python -m fastgan.train`, on eager operations and as it comes.

python benchmarks/default_run.py [--kimg 10] [--pairs 1] [--json F]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastgan.bench.machine import environment
from fastgan.bench.pairing import median_interval
from fastgan.errors import FastganError
from fastgan.files import check_place, replacing
from fastgan.train.log import read_log

BACKENDS = ("eager", "auto")


def images_per_second(backend: str, kimg: float) -> list[float]:
    """Of each report of a short run but the first, in which memory is still being mapped."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = {"backend": backend, "kimg": kimg, "report-kimg": kimg / 10, "out": run}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "fastgan.train", *arguments], check=True, stdout=subprocess.DEVNULL)
        return [entry["images_per_second"] for entry in read_log(run)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kimg", type=float, default=10.0, help="length of each run in thousands of images")
    parser.add_argument("--pairs", type=int, default=1, help="runs of each, in turns")
    parser.add_argument("--json", type=Path, help="write the data here")
    options = parser.parse_args()
    try:
        if options.json is not None:
            check_place(options.json, "--json")
    except FastganError as error:
        parser.error(str(error))
    rates: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(options.pairs):
        for backend in BACKENDS:
            rates[backend] += images_per_second(backend, options.kimg)
    for backend, values in rates.items():
        print(f"{backend:<6}{median_interval(values)} images/s")
    if options.json is not None:
        data = environment(torch.device("cpu"), "python benchmarks/default_run.py")
        rows = [{"backend": backend, "images_per_second": values} for backend, values in rates.items()]
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps({"environment": data, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
