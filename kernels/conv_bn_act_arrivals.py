"""How the last of several programs is found, so that it can finish what all of them have begun: without a launch of its
own, and in an order of additions that does not depend on which one comes last.

Every program stores its part, then counts itself in. The one that finds all others counted combines the parts, its own
among them, in the order of their numbers. In two stages, by groups and then over the groups: no program reads more than
about the square root of all parts alone while the others are gone.

Why it sees what the others stored: `bar.sync` orders the stores of a program's threads before the one thread that
counts; its increment releases them at the scope of the device and acquires what the others released; the barrier that
hands its result to the program's threads orders their loads after it. The loads bypass the first-level cache. The
interpreter runs one program after the other and shows none of this; `tests/test_aot.py` reads it in the PTX.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@triton.jit
def _comes_last(counter, expected):
    """Whether this program is the last of `expected` to call it; the counter is then 0 again, for the next launch."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


def group_of(parts: int) -> int:
    """How many of `parts` programs are combined at once, twice: the power of two from their square root on."""
    return triton.next_power_of_2(math.isqrt(max(0, parts - 1)) + 1)


_counters: dict[tuple, Tensor] = {}


def counters(like: Tensor, size: int) -> Tensor:
    """At least `size` zeros that a launch may count with: one set for each stream, whose launches follow one another.

    A graph under capture gets a set of its own, zeroed whenever it is replayed.
    """
    if isinstance(like, FakeTensor) or not (like.is_cuda or like.is_meta):
        return torch.zeros(size, dtype=torch.int32, device=like.device)
    stream = None
    if like.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.int32, device=like.device)
        stream = torch.cuda.current_stream(like.device).cuda_stream
    key = (like.device, stream)
    found = _counters.get(key)
    if found is None or found.numel() < size:
        found = _counters[key] = torch.zeros(max(size, 4096), dtype=torch.int32, device=like.device)
    return found
