"""Where a training step's time goes: its operations by the time that each takes itself."""

import os
import time

import torch
from torch.profiler import ProfilerActivity, profile

from fastgan.bench.cases import Case
from fastgan.bench.steps import providers

STEPS = 5
TOP = 10
OUTSIDE = "outside operations"  # Python, and a device that waits for it


def top_operations(case: Case, device: torch.device) -> list[dict[str, float | str]]:
    """The ten operations of fastgan's step that take most, those they call not counted, and what passes outside of all
    operations: name, calls a step, seconds a step, share of the step. The profiler itself takes time, mostly from
    small operations; so this is apart from what is measured."""
    step = providers(device)["fastgan"].step(case, device)
    for _ in range(2):
        step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports a missing GPU as an error
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        begin = time.perf_counter()
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        whole = (time.perf_counter() - begin) / STEPS
    key = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    taken = sorted(
        ((1e-6 * getattr(e, key) / STEPS, e.key, e.count / STEPS) for e in found.key_averages()), reverse=True
    )
    rest = max(0.0, whole - sum(seconds for seconds, _, _ in taken))
    rows = [*taken[:TOP], (rest, OUTSIDE, 1.0)]
    return [{"name": n, "calls": c, "seconds": s, "share": s / whole} for s, n, c in rows]
