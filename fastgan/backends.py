"""Which backend runs an operation, why, and how a backend plugs in.

Backends: `eager` (PyTorch, the definition), `cpu` (C++), `triton`, `cuda` (C++/CUDA).

**The contract.** A backend supplies *kernels*: plain functions named after the split operations below, with
these argument lists. `triton` puts them in `kernels/STEM.py`; the C++ libraries register them as
`torch.ops.fastgan_cpu.NAME` and `torch.ops.fastgan_cuda.NAME`, loaded on first use by
`fastgan.library.load("cpu" | "cuda")`, which raises BackendError with the reason. Nothing else has to be
registered; a missing kernel is a backend that cannot run that operation. Stem `bn_act`
(y is [N, C] or [N, C, ...]; stat = fp32, or fp64 where y is fp64):

    bn_stats(Tensor y) -> (Tensor mean, Tensor m2)
    bn_act(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope) -> Tensor z
    bn_act_reduce(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope)
        -> (Tensor grad_weight, Tensor grad_bias)
    bn_act_backward(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope,
        Tensor? grad_weight, Tensor? grad_bias, int count) -> Tensor dy
    update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, int count,
        float momentum) -> ()                                      (optional: eager's stands in)

and stem `gan_bce` (one of real and fake may be None; logits of any shape, not empty):

    gan_bce(Tensor? real, Tensor? fake, float real_target, float fake_target)
        -> (Tensor stats[4], Tensor grad_real, Tensor grad_fake)
    stats = mean BCE(real), mean BCE(fake), mean sigmoid(real), mean sigmoid(fake); grad = d(mean
    BCE)/d(logits); all in the stat dtype, grads shaped like the logits; an absent half has zeros and a grad
    of 0 elements

A backend may also offer a whole operation as one kernel each way (cpu does: on small tensors calls cost more than
passes), with the arguments of the operations in `fastgan/ops/bn_act.py` and optional tensors in any dtype that these
take, of any stride; all three or none:

    bn_act_train(Tensor y, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,
        float momentum, float eps, float slope) -> (Tensor z, Tensor mean, Tensor var)
    bn_act_eval(Tensor y, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, float slope) -> Tensor z
    bn_act_grad(Tensor dz, Tensor y, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, float slope,
        bool training, bool needs_input, bool needs_affine) -> (Tensor dy, Tensor grad_weight, Tensor grad_bias)

What the caller guarantees: every tensor is on one device; y is dense and not empty: `y.is_contiguous()` or
(4-D) `y.is_contiguous(memory_format=torch.channels_last)`; dz has y's dtype and memory format; mean, invstd,
weight, bias and the two sums are contiguous [C] in the stat dtype, never absent (ones and zeros stand in);
logits are contiguous.
What the kernel guarantees: z and dy are like `torch.empty_like(y)`, sums and statistics are [C] in the stat
dtype; no synchronisation; the same bits every time; slope 0 is ReLU (-inf -> 0, NaN stays), slope 1 the
identity; count = 0 in bn_act_backward means frozen statistics (dy = weight*invstd*g; the sums are None),
else n = count.

**The choice** is made at run time by `choose`, from the tensor: on CPU a kernel is taken where the committed
table `measured_cpu.json` says that it is faster; on CUDA, Triton, and the first use of each kernel with a
dtype and layout is compared with the definition on the real input: a kernel that misses is disabled by
name, with a warning. `backend=`, `use_backend` and FASTGAN_BACKEND force a backend and raise
BackendError where it cannot run.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import first_use
from fastgan.errors import BackendError

BACKENDS = ("eager", "cpu", "triton", "cuda")
_DEVICES: dict[str, tuple[str, ...] | None] = {
    "eager": None,
    "cpu": ("cpu",),
    "triton": ("cuda",),
    "cuda": ("cuda",),
}
_DTYPES = {
    "eager": None,
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
_PREFERRED_ON_CUDA = ("triton",)
_OPTIONAL = frozenset({"update_running_stats"})

Kernel = Callable[..., Any]
operations: dict[str, dict[str, Kernel]] = {}
_stem_of: dict[str, str] = {}
_whole: dict[str, tuple[str, ...]] = {}
_by_elements: set[str] = set()
_comparisons: dict[str, first_use.Comparison] = {}


class Decision(NamedTuple):
    """The backend that an operation takes for one input, and why."""

    backend: str
    reason: str


def define(
    stem: str,
    kernels: dict[str, Kernel],
    comparison: first_use.Comparison = first_use.AS_THEY_ARE,
    whole: tuple[str, ...] = (),
    by_elements: bool = False,
) -> None:
    """Declare the split operations of a stem with their eager definitions (called once by
    `fastgan/ops/STEM.py`).

    `comparison` is how kernels are compared with them at their first use on CUDA. `whole` are kernels that stand for
    several split operations at once, where a backend has them. `by_elements`: its speed depends on the number of
    elements alone, and the table of what is faster on CPUs holds that as [N].
    """
    operations[stem] = kernels
    _stem_of.update(dict.fromkeys((*kernels, *whole), stem))
    _whole[stem] = whole
    if by_elements:
        _by_elements.add(stem)
    _comparisons[stem] = comparison


# --- what a backend can run -----------------------------------------------------------------------


@cache
def kernel(backend: str, name: str) -> Kernel:
    """The function of `backend` for the split operation `name`; BackendError says why there is none."""
    stem = _stem_of[name]
    if backend == "eager":
        return operations[stem][name]
    if backend == "triton":
        if find_spec("triton") is None:
            raise BackendError("backend 'triton': Triton is not installed; `pip install triton` (Linux, NVIDIA GPU)")
        module = f"fastgan.kernels.{stem}"
        found = getattr(import_module(module), name, None) if find_spec(module) else None
    else:
        module = f"fastgan.ops.{stem}_{backend}"  # where arguments have to be prepared for the library's operator
        if find_spec(module) and hasattr(import_module(module), name):
            return getattr(import_module(module), name)
        library = import_module("fastgan.library") if find_spec("fastgan.library") else None
        if library is None:
            raise BackendError(f"backend '{backend}': this build of fastgan has no C++ extension")
        library.load(backend)
        packet = getattr(getattr(torch.ops, f"fastgan_{backend}"), name, None)
        found = None if packet is None else packet.default
    if found is None and name in _OPTIONAL:
        return operations[stem][name]
    if found is None:
        raise BackendError(f"backend '{backend}' has no kernel for {name}")
    return found


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str, operation: str = "bn_act", device: str | None = None, dtype: Any = None) -> str | None:
    """Why `backend` cannot run `operation` here (None: it can). Without a device: on any device of this
    machine."""
    if backend not in BACKENDS:
        return f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}"
    devices = _DEVICES[backend]
    if backend == "triton" and _interpreted():
        devices = ("cuda", "cpu")
    if devices is not None and device not in (None, "meta", *devices):
        hint = " (TRITON_INTERPRET=1 runs it, slowly, on CPU tensors)" if backend == "triton" else ""
        return f"backend '{backend}' runs on {' or '.join(devices)} tensors, the input is on {device}{hint}"
    if devices == ("cuda",) and device is None and not torch.cuda.is_available():
        return f"backend '{backend}' needs a CUDA device, PyTorch {torch.__version__} finds none"
    dtypes = _DTYPES[backend]
    if dtypes is not None and dtype is not None and dtype not in dtypes:
        return f"backend '{backend}' takes {', '.join(map(str, dtypes))}, the input is {dtype}"
    try:
        for name in operations.get(operation, ()):
            kernel(backend, name)
    except BackendError as error:
        return str(error)
    return None


# --- the choice -----------------------------------------------------------------------------------

_forced: str | None = os.environ.get("FASTGAN_BACKEND") or None


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Force one backend for every operation in the block (the whole process, as autograd has threads of its
    own).

    Raises BackendError at once for an unknown name, and at the operation where the backend cannot run.
    """
    global _forced
    if backend is not None and backend not in BACKENDS:
        raise BackendError(why_not(backend))
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def requested(backend: str | None) -> str | None:
    """The backend that the call, `use_backend` or FASTGAN_BACKEND asks for, in this order; None: none of
    them."""
    return _forced if backend is None else backend


def layout(tensor: Tensor) -> str:
    """`channels_last`, `contiguous` or `strided`. [N, C] and [N, C, 1, 1] count as channels-last: C is
    innermost."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return "contiguous" if tensor.shape[1] == 1 else "channels_last"
    if tensor.is_contiguous():
        return "channels_last" if tensor.dim() == 2 else "contiguous"
    return "strided"


class Measured(NamedTuple):
    """A row of the committed table, of a shape beyond its N."""

    smallest: int  # the N from which on the kernel is faster
    backend: str
    kernels: str  # the `instruction_set` that was measured
    ratio: float  # at least, eager's time over the kernel's


@cache
def _measured() -> dict[tuple, Measured]:
    """The committed table for this machine's vector instructions: what was measured faster than eager on
    CPU."""
    rows = json.loads((Path(__file__).parent / "measured_cpu.json").read_text())["rows"]
    capability = torch.backends.cpu.get_cpu_capability()
    table: dict[tuple, Measured] = {}
    for row in rows:
        if row["capability"] == capability and row["ratio"] > 1:
            key = (row["operation"], row["dtype"], row["layout"], tuple(row["shape"][1:]))
            old = table.get(key)
            if old is None or row["shape"][0] < old.smallest:
                table[key] = Measured(row["shape"][0], row["backend"], row["kernels"], row["ratio"])
    return table


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def is_plain(first: Tensor, *others: Tensor | None) -> bool:
    """Whether these tensors are themselves and have memory: no fake, meta or traced one."""
    return _PLAIN.issuperset(map(type, (first, *others))) and not first.is_meta


class Choice(NamedTuple):
    """A decision, and how to carry it out."""

    decision: Decision
    run: Callable[..., Any]  # (name of a kernel, *its arguments), counted
    asked: str | None  # the backend that was asked for
    definition: bool  # the plain PyTorch expression runs, without the custom operation's wrapping
    whole: tuple[Callable[..., Any], ...]  # the backend's whole kernels for the operation, counted, if it has them
    dense: bool  # the tensor is contiguous or channels-last
    single: bool  # it has one value per channel
    plain: bool  # it `is_plain`


_choices: dict[tuple, Choice] = {}
_recorder: Callable[[str, Tensor, Decision], None] | None = None


def choose(operation: str, tensor: Tensor, backend: str | Choice | None = None) -> Choice:
    """What runs `operation` (a stem) on `tensor`, remembered; `backend` forces one and raises BackendError if it cannot
    run. A choice that was made already is returned as it is."""
    if isinstance(backend, Choice):
        return backend
    where = tensor.is_cpu or tensor.device  # a device costs more to make than to have
    key = (operation, backend, where, tensor.dtype, tensor.shape, tensor.stride(), type(tensor))
    return _choices.get(key) or _remember(tensor, key)


def _remember(tensor: Tensor, key: tuple) -> Choice:
    operation, backend, *_ = key
    if len(_choices) > 4096:
        _choices.clear()
    decision = decide(operation, tensor, backend)
    name = decision.backend if tensor.numel() else "eager"  # no kernel takes an empty tensor
    plain = is_plain(tensor)
    _choices[key] = Choice(
        decision,
        runner_of(name, tensor, forced=backend is not None),
        backend,
        definition=name == "eager",
        whole=_whole_kernels(operation, name) if plain and tensor.is_cpu else (),
        dense=layout(tensor) != "strided",
        single=_is_single(tensor),
        plain=plain,
    )
    return _choices[key]


def _whole_kernels(operation: str, backend: str) -> tuple[Callable[..., Any], ...]:
    try:
        return tuple(_counted(backend, name) for name in _whole[operation])
    except (BackendError, KeyError):
        return ()


def _counted(backend: str, name: str) -> Callable[..., Any]:
    found, key = kernel(backend, name), (backend, name)

    def call(*args: Any) -> Any:
        _counts[key] += 1
        return found(*args)

    return call


def _is_single(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.numel() == tensor.shape[1]


def chosen(operation: str, tensor: Tensor, backend: str | None) -> Choice:
    """`choose` for a call of a public function: by what is `requested`, and seen by `explain`. Traced code decides at
    run time instead, inside the operation, unless eager is forced."""
    asked = requested(backend)
    if torch.compiler.is_compiling():
        return Choice(_AT_RUN_TIME, _undecided, asked, asked == "eager", (), False, _is_single(tensor), False)
    choice = choose(operation, tensor, asked)
    if _recorder is not None:
        _recorder(operation, tensor, choice.decision)
    return choice


_AT_RUN_TIME = Decision("", "decided at run time")


def _undecided(*_: Any) -> None:
    raise AssertionError("traced code runs no kernel")


_SETS = ("plain", "avx2", "avx512", "amx")
# Which of them the CPU kernels have copies for, of convolutions by dtype and of what else has more than the usual ones;
# a thin convolution is one in fp32 that AMX leaves to the others.
_USUAL, _WIDE = ("plain", "avx2"), ("plain", "avx2", "avx512")
_COPIES: dict[torch.dtype | str, tuple[str, ...]] = {
    "bn_act": _WIDE,
    "gan_bce": _WIDE,
    "thin convolution": _WIDE,
    torch.float32: _SETS,
    torch.bfloat16: _SETS,
    torch.float64: _USUAL,
}


def instruction_set(of: torch.dtype | str) -> str:
    """The copy of the CPU kernels that runs, of convolutions in a dtype or of another operation: plain, avx2, avx512 or
    amx; of convolutions, "plain" is none. Their library is loaded."""
    best = _SETS.index(torch.ops.fastgan_cpu.instruction_set())
    copies = _COPIES.get(of, _USUAL)
    return [copy for copy in copies if _SETS.index(copy) <= best][-1]


layer = ""


def enter_layer(name: str) -> None:
    """The name of the layer whose operations come next, for `explain`."""
    global layer
    layer = name


def record(recorder: Callable[[str, Tensor, Decision], None] | None) -> None:
    """Let `explain` see every choice as it is made (None: no more)."""
    global _recorder
    _recorder = recorder


def is_recording() -> bool:
    """Whether `explain` is listening."""
    return _recorder is not None


def note(operation: str, tensor: Tensor, decision: Decision) -> None:
    """Let `explain` see a choice that was not made by `choose`."""
    if _recorder is not None:
        _recorder(operation, tensor, decision)


def decide(operation: str, tensor: Tensor, backend: str | None) -> Decision:
    device = tensor.device.type
    if backend is not None:
        reason = why_not(backend, operation, device, tensor.dtype)
        if reason is not None:
            raise BackendError(f"{operation}: {reason}")
        return Decision(backend, f"forced{_copy(backend, operation)}")
    if device == "cpu":
        if operation in _by_elements:
            return decide_on_cpu(operation, tensor.dtype, "contiguous", (tensor.numel(),))
        return decide_on_cpu(operation, tensor.dtype, layout(tensor), tuple(tensor.shape))
    reasons = []
    for candidate in _PREFERRED_ON_CUDA if device == "cuda" else ():
        reason = why_not(candidate, operation, device, tensor.dtype)
        if reason is None:
            return Decision(candidate, "first choice on CUDA; each kernel is compared with the definition at first use")
        reasons.append(reason)
    return Decision("eager", "; ".join(reasons) or f"no other backend runs on {device} tensors")


def _copy(backend: str, operation: str) -> str:
    return f"; {instruction_set(operation)} kernels" if backend == "cpu" else ""


def decide_on_cpu(operation: str, dtype: torch.dtype, how: str, shape: tuple[int, ...]) -> Decision:
    """What the committed table says for an input of this dtype, layout and shape."""
    key = (operation, str(dtype).removeprefix("torch."), how, shape[1:])
    row = _measured().get(key)
    if row is None:
        return Decision("eager", "no kernel is measured faster than eager for this shape on CPU")
    least = f"{row.smallest} elements" if operation in _by_elements else f"batch {row.smallest}"
    if shape[0] < row.smallest:
        return Decision("eager", f"'{row.backend}' is measured faster only from {least} on")
    reason = why_not(row.backend, operation, "cpu", dtype)
    if reason is None and row.backend == "cpu" and (found := instruction_set(operation)) != row.kernels:
        reason = f"its {row.kernels} kernels were measured faster, those that run here are {found}"
    if reason is not None:
        return Decision("eager", reason)
    faster = f"measured {row.ratio:.2f} times as fast as eager for this shape, from {least} on"
    return Decision(row.backend, faster + _copy(row.backend, operation))


# --- running a kernel -----------------------------------------------------------------------------

_counts: Counter[tuple[str, str]] = Counter()


def counts() -> dict[tuple[str, str], int]:
    """How often each kernel ran in this process: {(backend, kernel): times}."""
    return dict(_counts)


def reset_counts() -> None:
    _counts.clear()


def count(backend: str, name: str) -> None:
    """Note one run of `name` by `backend`; `run` does it for kernels, the operations for their eager
    definitions."""
    _counts[backend, name] += 1


def run(backend: str, name: str, *args: Any) -> Any:
    """Run the split operation `name` by `backend`."""
    _counts[backend, name] += 1
    return kernel(backend, name)(*args)


_run_by = {backend: partial(run, backend) for backend in BACKENDS}


def runner_of(backend: str, tensor: Tensor, forced: bool) -> Callable[..., Any]:
    """`run` by `backend`, on CUDA comparing each kernel with the definition at its first use with the device, dtype and
    layout of `tensor`."""
    if backend == "eager" or not _is_compared(tensor):
        return _run_by[backend]
    return partial(_run_compared, backend, forced, (tensor.dtype, layout(tensor), tensor.device))


def _is_compared(tensor: Tensor) -> bool:
    return tensor.is_cuda and is_plain(tensor)  # a fake tensor has no values to compare


def _run_compared(backend: str, forced: bool, of: tuple, name: str, *args: Any) -> Any:
    """A kernel that missed gives way to eager, or where the backend was `forced` raises BackendError."""
    verdict = first_use.verdict((backend, name, *of), kernel, _comparisons[_stem_of[name]], args)
    if verdict is not None and forced:
        raise BackendError(first_use.disabled(backend, name, verdict))
    return run(backend if verdict is None else "eager", name, *args)
