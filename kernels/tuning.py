"""The choice among configurations of a kernel that all give the same bits, by measurement on the card.

Only an elementwise kernel may be tuned: each element's result is independent of which program computes it. A
reduction's tile and warps decide the order of its additions, so those are fixed; a kernel that works in place, such as
that of the running statistics, would work several times. `gan_bce` is one program of a few thousand numbers, where
nothing but the launch counts. So tuning never changes a result, only who computes it.
"""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Configuration(NamedTuple):
    """Elements of a program's tile, and its warps."""

    tile: int
    warps: int


# Bandwidth decides, and what feeds it: bytes in flight per thread against threads in flight. The first is the default,
# 32 elements a thread; then half and a quarter of that for occupancy, and the same in larger blocks.
CONFIGURATIONS = (Configuration(4096, 4), Configuration(2048, 4), Configuration(1024, 4), Configuration(8192, 8))
WORTH_IT = 1 << 20  # below, a kernel takes about as long as its launch

_chosen: dict[tuple, Configuration] = {}


def choose(name: str, tensor: Tensor, run: Callable[[Configuration], None]) -> Configuration:
    """The fastest configuration of kernel `name` on `tensor`, measured once per device, dtype and power-of-two shape.

    The default where tuning is off (FASTGAN_AUTOTUNE=0, `torch.use_deterministic_algorithms(True)`, no card, a CUDA
    graph being captured) or cannot pay. `run` launches the kernel; it writes only its output, from its inputs.
    """
    if not _is_on(tensor):
        return CONFIGURATIONS[0]
    sizes = tuple(size.bit_length() for size in tensor.shape)
    key = (name, tensor.device, tensor.dtype, tensor.is_contiguous(), sizes)
    if key not in _chosen:
        times = {configuration: _milliseconds(run, configuration) for configuration in CONFIGURATIONS}
        _chosen[key] = min(times, key=lambda configuration: times[configuration])
    return _chosen[key]


def _is_on(tensor: Tensor) -> bool:
    return (
        tensor.numel() >= WORTH_IT
        and os.environ.get("FASTGAN_AUTOTUNE") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and _on_card(tensor)
    )


def _on_card(tensor: Tensor) -> bool:
    return tensor.is_cuda and type(tensor) is Tensor and not torch.cuda.is_current_stream_capturing()


def _milliseconds(run: Callable[[Configuration], None], configuration: Configuration) -> float:
    """The least of five runs after one for compiling; infinity where the configuration does not run."""
    try:
        run(configuration)
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(configuration)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return min(times)
    except Exception as error:  # such as too few registers on this card
        if configuration == CONFIGURATIONS[0]:
            raise
        warnings.warn(f"fastgan: {configuration} does not run here: {error}", RuntimeWarning, stacklevel=2)
        return float("inf")
