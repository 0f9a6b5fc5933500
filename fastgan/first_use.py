"""A kernel's first use on a GPU: compared with the definition on the real input, then trusted or disabled by name."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.tolerance import misses

# Arguments that a kernel changes, by position: it is compared on copies of them.
_IN_PLACE = {"update_running_stats": (0, 1), "block_constants": (4, 5), "convolve_block_constants": (11, 12)}
_VERIFY_ELEMENTS = 1 << 24
# The tests pool 64 sums; at a kernel's first use there may be 8, of which a right kernel's error was measured at up to
# 4.0 times PyTorch's own (fp16, [7, 1]). This is twice that. The planted bugs of tests/test_bn_act_triton.py were
# measured at 49 times and more where bf16 is stored, and at 300,000 times and more in fp32.
FACTOR = 8
NOT_YET = "not compared yet: a comparison needs the host, and a CUDA graph is being captured"

_verdicts: dict[tuple, str | None] = {}


def first_images(_: str, args: tuple) -> tuple:
    """The same arguments with the batch cut so that a comparison in fp64 stays within a few milliseconds and MB."""
    largest = max((a for a in args if isinstance(a, Tensor)), key=lambda a: a.numel())
    if largest.dim() < 2 or largest.numel() <= _VERIFY_ELEMENTS:
        return args
    keep = max(1, _VERIFY_ELEMENTS * largest.shape[0] // largest.numel())
    return tuple(a[:keep] if isinstance(a, Tensor) and a.shape == largest.shape else a for a in args)


class Comparison(NamedTuple):
    """How the kernels of a stem are compared with their definitions; each function gets the kernel's name first."""

    settle: Callable[[str, tuple], tuple] = lambda _, args: args
    """Arguments on which two right kernels must agree: no activation at its kink."""
    noise: Callable[[str, tuple], list[float]] = lambda _, args: []
    """The errors of each output that are let pass."""
    few: Callable[[str, tuple], tuple] = first_images
    """Arguments small enough for a comparison in fp64."""
    comparable: Callable[[str, Any], Any] = lambda _, result: result
    """What of a result is determined."""


AS_THEY_ARE = Comparison()
"""For kernels that agree on all arguments, in all that they return."""


def verdict(key: tuple, kernel: Callable[[str, str], Callable], comparison: Comparison, args: tuple) -> str | None:
    """Why the kernel of `key` (backend, name, dtype, layout, device) must not run; None: it agrees with the definition.
    `kernel(backend, name)` finds it. Remembered, so that only the first call compares, on its `args`."""
    return _verdicts[key] if key in _verdicts else _compare(key, kernel, comparison, args)


def _compare(key: tuple, kernel: Callable[[str, str], Callable], comparison: Comparison, args: tuple) -> str | None:
    backend, name, dtype, how, device = key
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return NOT_YET
    few = comparison.settle(name, comparison.few(name, args))

    def outcome(backend: str, args: tuple) -> list[Tensor]:
        return _outcome(kernel(backend, name), comparison, name, args)

    try:
        got = outcome(backend, few)
        truth = outcome("eager", tuple(a.double() if isinstance(a, Tensor) else a for a in few))
        own = outcome("eager", few)
        reason = misses(got, own, truth, FACTOR, floor=comparison.noise(name, few))
    except Exception as error:  # whatever a kernel raises, training goes on by the definition
        reason = f"{type(error).__name__}: {error}"
    _verdicts[key] = reason
    if reason is not None:
        warn_of(backend, name, f"{dtype}, {how}, {device}", reason)
    return reason


def _outcome(function: Callable, comparison: Comparison, name: str, args: tuple) -> list[Tensor]:
    """What `function` returns as far as it is determined, and what it makes of copies of the arguments it changes."""
    changed = [i for i in _IN_PLACE.get(name, ()) if args[i] is not None]
    args = tuple(a.clone() if i in changed else a for i, a in enumerate(args))
    result = comparison.comparable(name, function(*args))
    returned = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return [*returned, *(args[i] for i in changed)]


def warn_of(backend: str, name: str, where: str, reason: str) -> None:
    """Tell the user, once for each kernel and `where`, that it does not run."""
    warnings.warn(
        f"fastgan: kernel {name} of backend '{backend}' is disabled for {where}: {reason}. "
        "The eager definition runs instead; please report this.",
        RuntimeWarning,
        stacklevel=3,
    )


def disabled(backend: str, name: str, reason: str) -> str:
    """What an error says where the backend was asked for by name."""
    return f"kernel {name} of backend '{backend}' is disabled here: {reason}"
