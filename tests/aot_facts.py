"""Where the ahead-of-time budget lies, and what exceeds it. Free of Triton: the compiling is `tests/aot.py`'s."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SCRIPT = Path(__file__).parent / "aot.py"
BUDGETS = Path(__file__).parent / "aot_budget"  # a file for each Triton: another compiler takes other registers
try:
    TRITON = ".".join(version("triton").split(".")[:2])
except PackageNotFoundError:
    TRITON = "none"
BUDGET = BUDGETS / f"{TRITON}.json"
NEWEST = max(BUDGETS.glob("*.json"), key=lambda path: [int(part) for part in path.stem.split(".")])


AT_LEAST = (
    "loads of 16 bytes", "stores of 16 bytes", "matrix instructions", "asynchronous copies", "ordered arrivals",
)  # fmt: skip


def excess(found: dict[str, int], budget: dict[str, int]) -> list[str]:
    """What is above its budget, or, of what is wanted, below it. A stack is a spill."""
    return [
        f"{key} {found[key]}, budget {limit}"
        for key, limit in budget.items()
        if (found[key] < limit if key in AT_LEAST else found[key] > limit)
    ]


def ordered_arrivals(ptx: str) -> int:
    """How often programs count themselves in, each time in an order in which the last one sees what the others stored
    (`kernels/conv_bn_act_arrivals.py`); -1 where one is out of order.

    Before the atomic, which releases and acquires at the scope of the device, a barrier and no access after it; after
    it a barrier before any load; and loads that follow bypass the first-level cache, or are of what no program wrote.
    """
    events = re.findall(r"^.*?\b(bar\.sync|atom\.global\S*|(?:ld|st)\.global\S*)", ptx, re.MULTILINE)
    found = [index for index, event in enumerate(events) if event.startswith("atom")]
    for index in found:
        loads = [event for event in events[index:] if event.startswith("ld")]
        if (
            not all(part in events[index].split(".") for part in ("gpu", "acq_rel"))
            or events[index - 1] != "bar.sync"
            or events[index + 1] != "bar.sync"
            or not any(".cg" in load for load in loads)
        ):
            return -1
    return len(found)


def loops_by_more_than_one(ttir: str) -> int:
    """How many loops count with 32 bits in steps that could pass 2^31 before they end: all but those by one."""
    loops = re.findall(r"scf\.for .* step (\S+) .*: i32", ttir)
    return sum(not re.fullmatch(r"%c1_i32(_\d+)?", step) for step in loops)


def longest_chain(ptx: str) -> int:
    """How many additions of fp32 numbers follow each other, each of the one before."""
    lengths: dict[str, int] = {}
    for what, target, sources in re.findall(r"^\s*(add\.f32|shfl\S*|mov\.b32)\s+(%\w+),(.*);", ptx, re.MULTILINE):
        before = max((lengths.get(name, 0) for name in re.findall(r"%\w+", sources)), default=0)
        lengths[target] = before + (what == "add.f32")
    return max(lengths.values(), default=0)
