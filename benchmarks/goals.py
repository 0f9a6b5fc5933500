"""What fastgan wants of a CPU, beside what was measured: the table of goals in docs/speed.md."""

import math
from functools import cache
from typing import NamedTuple

from fastgan.bench import results
from fastgan.bench.cases import measured_layers

STEPS = [  # (case, beside what, at least so many times as fast)
    ("DCGAN-64, batch 32, fp32", "stock", 2.0),
    ("DCGAN-64, batch 64, fp32", "stock", 2.0),
    ("DCGAN-64, batch 32, fp32", "the best other", 1.8),
    ("DCGAN-64, batch 64, fp32", "the best other", 1.8),
    ("DCGAN-64, batch 32, bf16", "the best other", 1.8),
    ("DCGAN-32, batch 64, fp32", "stock", 1.8),
    ("DCGAN-128, batch 32, fp32", "stock", 1.8),
]
MIDDLE_MEAN, MIDDLE, THIN = 1.75, 1.4, 4.0
# Thin layers have something to gain where the library runs below this share of a matrix product's peak. It was set as
# 60 GFLOP/s where the peak was 165, which is 0.36. The library runs four of their passes at up to 0.44, two at 0.6 or
# more; half way in between, no row drops out when the machine runs a little faster.
SLOW = 0.5
OPERATIONS = {"bn_act": 4.0, "gan_bce": 2.0}
COPY = 0.5  # of the bandwidth of a copy, for bn_act
KEPT = {"generator": 0.55, "discriminator": 0.72}  # of eager's bytes


class Goal(NamedTuple):
    what: str
    goal: float
    measured: float
    most: bool = False  # the goal is not to be passed
    limit: float | None = None  # what would be measured if the machine ran at its peak, where that is known

    def line(self) -> list[str]:
        reached = self.measured <= self.goal if self.most else self.measured >= self.goal
        said = f"at {'most' if self.most else 'least'} {self.goal:g}"
        limit = "-" if self.limit is None else f"{self.limit:.2f}"
        return [self.what, said, f"{self.measured:.2f}", limit, "yes" if reached else "**no**"]


def of_steps(rows: list[results.Row]) -> list[Goal]:
    by_case = {row["case"]: row for row in rows}
    found = []
    for case, beside, goal in STEPS:
        if (row := by_case.get(case)) is not None:
            name = results.best_other(row) if beside == "the best other" else beside
            found.append(Goal(f"step of {case}, times {beside}", goal, results.times_as_fast(row, name).median))
    for case, row in by_case.items():
        kept = row.get("kept_bytes", {})
        for network, goal in KEPT.items() if kept else ():
            share = kept["fastgan"][network] / kept["tuned"][network]
            found.append(Goal(f"{network} of {case}, bytes kept for backward beside eager's", goal, share, most=True))
    return found


@cache
def _fewest() -> dict[str, int]:
    """Channels on the narrower side of each layer; 0 for a matrix product."""
    return {
        name: 0 if layer.is_product() else min(layer.in_channels, layer.out_channels)
        for name, (_, layer) in measured_layers().items()
    }


def is_middle(row: dict) -> bool:
    """64 channels or more on either side, 4x4 kernels of stride 2."""
    return _fewest()[row["name"]] >= 64


def is_thin(row: dict) -> bool:
    """3 or 1 channels on one side, 4x4 kernels of stride 2."""
    return 1 <= _fewest()[row["name"]] <= 3


def of_layers(rows: list[dict], peaks: dict[str, float]) -> list[Goal]:
    """The middle layers, and the thin ones where the library is slow; `peaks` of `machine.peaks`."""
    middle, thin = [], []
    for row in rows:
        name, ratio = f"{row['name']}, {row['group']}", row["times_reference"][0]
        share = row["GFLOP/s"] / peaks["fp32 GFLOP/s"]
        if is_middle(row):
            middle.append((ratio, row["seconds"], name))
        elif is_thin(row) and share / ratio < SLOW:
            direct = row["group"] == "weight gradient"  # as many multiplications as in the definition, at the peak
            limit = ratio / share if direct else None
            thin.append(Goal(f"thin: {name}, times the library", THIN, ratio, limit=limit))
    if not middle:
        return thin
    mean = sum(ratio * seconds for ratio, seconds, _ in middle) / sum(seconds for _, seconds, _ in middle)
    below = [one for one in middle if one[0] < MIDDLE] or [min(middle)]
    each = [Goal(f"middle: {name}, times the library", MIDDLE, ratio) for ratio, _, name in below]
    return [Goal("middle layers, times the library, mean weighted by time", MIDDLE_MEAN, mean), *each, *thin]


def of_operations(rows: list[dict], peaks: dict[str, float]) -> list[Goal]:
    """Beside eager, with a limit where eager's time is compared to that of a call without a kernel and, of an operation
    that waits for memory, of its bytes at the bandwidth of a copy."""
    no_kernel = {
        (row["group"], row["name"]): row["times_reference"][0] for row in rows if row["provider"] == "no kernel"
    }
    found = []
    for row in rows:
        operation, _, what = row["group"].partition(" ")
        if what == "both" and operation in OPERATIONS and row["provider"] == "cpu":
            name, ratio = f"{operation}, {row['name']}, forward and backward", row["times_reference"][0]
            share = row["GB/s"] / peaks["copy GB/s"] if "GB/s" in row else None
            call = 1 / no_kernel.get((row["group"], row["name"]), math.inf)
            least = call + (share or 0) / ratio  # of eager's time
            limit = 1 / least if least else None
            found.append(Goal(f"{name}, times eager", OPERATIONS[operation], ratio, limit=limit))
            if share:
                found.append(Goal(f"{name}, share of a copy's bandwidth", COPY, share, limit=share * limit / ratio))
    return found
