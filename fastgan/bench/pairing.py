"""Comparing by pairs: the competitors take turns in one process, and what counts is the ratio within each round."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

MIN_ROUNDS = 6  # the fewest of which an interval between two holds the median with 95 % confidence


class Interval(NamedTuple):
    """A median and its confidence interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median and the interval between the order statistics that hold it with at least `confidence`.

    Free of assumptions on the distribution: the k-th smallest of n values lies above the true median with the
    probability that fewer than k of n fair coins show heads. With too few values it is the whole range.
    """
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0  # P(fewer than `rank` of the values lie below the median)
    while rank < n // 2 and 1 - 2 * (tail + math.comb(n, rank) / 2**n) >= confidence:
        tail += math.comb(n, rank) / 2**n
        rank += 1
    rank = max(rank, 1)
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])


def ratio(reference: Sequence[float], seconds: Sequence[float]) -> Interval:
    """How many times as fast as `reference` something is; both hold one time per round."""
    return median_interval([a / b for a, b in zip(reference, seconds, strict=True)])


def seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call, the device's work included."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / calls


def keep_freed_memory() -> None:
    """Lets glibc keep, for the rest of this process, what it frees of blocks below 32 MiB, the most that can be set.
    By default the end of its heap goes back to the system when it grows, and comes back page fault by page fault: a
    training step, whose tensors always have the same sizes, has none, but competitors that take turns with an operation
    have thousands, whichever of them meets that end. With another C library nothing happens."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        set_option(m_trim_threshold, 2**31 - 1)
        set_option(m_mmap_threshold, 2**25)


def interleave(
    competitors: Mapping[str, Callable[[], object]], rounds: int, calls: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call of each competitor in each round. The order turns by one from round to round, so that none
    always comes first; garbage is collected between rounds, not within. See `keep_freed_memory`, too."""
    keep_freed_memory()
    names = list(competitors)
    times: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            gc.collect()
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(seconds(competitors[name], calls, device))
    finally:
        (gc.enable if enabled else gc.disable)()
    return times
