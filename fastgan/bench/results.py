"""Measured cases as data: how they are taken, kept in JSON, read again and compared."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastgan.bench.cases import CASES, Case
from fastgan.bench.floor import floor, work
from fastgan.bench.machine import Others, environment
from fastgan.bench.memory import case_kept_bytes, peak_bytes
from fastgan.bench.pairing import Interval, interleave, ratio, seconds
from fastgan.bench.steps import Provider, providers
from fastgan.errors import FastganError
from fastgan.files import replacing

FORMAT = 1
ROUND_SECONDS = 0.2  # a competitor's turn lasts at least about this long

Row = dict[str, Any]


def measure(case: Case, device: torch.device, competitors: dict[str, Provider], rounds: int) -> Row:
    """Seconds per step of each competitor in each round, and the work that the step is."""
    steps = {name: provider.step(case, device) for name, provider in competitors.items()}
    for step in steps.values():
        seconds(step, 2, device)  # compiles, and lets libraries choose
    calls = max(1, round(ROUND_SECONDS / seconds(steps["fastgan"], 1, device)))
    others = Others()
    times = interleave(steps, rounds, calls, device)
    return {
        "case": case.name,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "kimg": case.kimg,
        "steps_per_round": calls,
        "seconds": times,
        "others": others.share(),
        "work": work(case),
    }


def measure_memory(case: Case, device: torch.device, competitors: Iterable[str]) -> Row:
    """Peak bytes of each competitor, each in a process of its own, without torch.compile, whose compiler would be what
    is measured; bytes kept for backward by eager and fastgan."""
    return {
        "peak_bytes": {name: peak_bytes(case, name, device) for name in competitors if name != "compiled"},
        "kept_bytes": {
            name: case_kept_bytes(case, device, providers(device)[name].backend) for name in ("tuned", "fastgan")
        },
    }


# --- what a row says ----------------------------------------------------------------------------------------------


def step_seconds(row: Row, name: str = "fastgan") -> float:
    return statistics.median(row["seconds"][name])


def images_per_second(row: Row, name: str = "fastgan") -> float:
    return row["batch_size"] / step_seconds(row, name)


def times_as_fast(row: Row, reference: str, name: str = "fastgan") -> Interval:
    return ratio(row["seconds"][reference], row["seconds"][name])


def best_other(row: Row) -> str:
    """The fastest competitor but stock and fastgan's own: what a user could have had by care alone."""
    others = [name for name in row["seconds"] if name != "stock" and not name.startswith("fastgan")]
    return min(others, key=lambda name: step_seconds(row, name))


def run_seconds(row: Row) -> float:
    """How long the steps of the whole run take that the case belongs to."""
    return 1e3 * row["kimg"] / images_per_second(row)


def floor_seconds(row: Row, peaks: dict[str, float]) -> dict[str, float]:
    """The least time that a step could take at `peaks`, in its parts."""
    return floor(row["work"], row["precision"], peaks)


def floor_share(row: Row, peaks: dict[str, float]) -> float:
    """The floor over the time taken: 1 is as fast as can be."""
    return sum(floor_seconds(row, peaks).values()) / step_seconds(row)


def gflops(row: Row) -> float:
    """GFLOP/s of the step, all of it, counting what the definition of its convolutions multiplies."""
    return row["work"]["definition GFLOP"] / step_seconds(row)


# --- data ---------------------------------------------------------------------------------------------------------


def document(device: torch.device, peaks: dict[str, float], rows: list[Row]) -> dict[str, Any]:
    return {"format": FORMAT, "environment": environment(device), "peaks": peaks, "rows": rows}


def save(data: dict[str, Any], path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """What `save` wrote, fit to be compared with; FastganError names a file that is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FastganError(f"{path}: not JSON ({error}); expected a file that --json wrote") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise FastganError(
            f"{path}: expected benchmark data of format {FORMAT}, got {found}; measure again with --json"
        )
    try:
        if not isinstance(rows := data["rows"], list):
            raise TypeError(f"rows are a list, not {type(rows).__name__}")
        regressions(rows, rows)  # whatever a comparison will look at
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise FastganError(f"{path}: not what --json wrote ({type(error).__name__}: {error}); measure again") from None
    return data


def regressions(old: list[Row], new: list[Row]) -> list[str]:
    """Cases in which fastgan got slower beside the stock step beyond the noise of both measurements, their confidence
    intervals lying apart; and networks that keep more bytes, which has no noise.

    Ratios to the stock step of the same process are compared, so a slower hour of the machine is not a regression.
    """
    before = {row["case"]: row for row in old}
    found = []
    for row in new:
        if row["case"] not in before:
            continue
        was, now = (times_as_fast(r, "stock") for r in (before[row["case"]], row))
        if now.high < was.low:
            found.append(f"{row['case']}: {was} -> {now} times the speed of the stock step")
        for network, kept in row.get("kept_bytes", {}).get("fastgan", {}).items():
            limit = before[row["case"]].get("kept_bytes", {}).get("fastgan", {}).get(network, kept)
            if kept > limit:
                found.append(f"{row['case']}: the {network} keeps {kept:,} bytes for backward, {limit:,} before")
    return found


def select(text: str, quick: bool) -> list[Case]:
    """The cases whose name contains `text`; `quick` leaves the smallest two."""
    chosen = [case for case in (CASES[:2] if quick else CASES) if text in case.name]
    if not chosen:
        known = "; ".join(case.name for case in (CASES[:2] if quick else CASES))
        raise FastganError(f"--case: expected a part of one of: {known}; got {text!r}")
    return chosen
