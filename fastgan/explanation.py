"""`explain`: which backend each layer takes for an input, and why."""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.backends import Decision
from fastgan.errors import BackendError
from fastgan.nn.blocks import KINDS

# Operations that decide nothing themselves: which one does, and for which tensor.
_DECIDED_BY = {
    "conv_bn_act": ("bn_act", "the convolution's output"),
    "conv_transpose_bn_act": ("bn_act", "the convolution's output"),
    "gan_bce_generator": ("gan_bce", "the logits"),
}


class Layer(NamedTuple):
    """One fused operation that a module ran: the module's name, the input it met, and who ran it."""

    name: str
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    decision: Decision

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        head = f"{self.name or '(itself)'}: {self.operation} {shape} {self.dtype} {self.layout}"
        return f"{head} -> {self.decision.backend} ({self.decision.reason})"


def explain(module_or_operation: torch.nn.Module | str, input: Tensor, backend: str | None = None) -> list[Layer]:
    """Which backend each fused operation takes for `input`, and why: `print(*explain(net, x), sep="\\n")`.

    Args:
        module_or_operation: a module, of which a deep copy is run once without gradients, or an operation's
            name.
        input: the tensor it would be given, with the device, dtype and layout that matter. Where BatchNorm is
            synchronised, every process calls this.
        backend: as in the operations.

    Raises:
        BackendError: the forced backend cannot run, or the operation is unknown or decides nothing itself.
    """
    import_module("fastgan.ops")
    layers: list[Layer] = []
    names = [""]

    def note(operation: str, tensor: Tensor, decision: Decision) -> None:
        layout = backends.layout(tensor)
        name = ".".join(filter(None, (names[-1], backends.layer)))
        layers.append(Layer(name, operation, tuple(tensor.shape), tensor.dtype, layout, decision))

    if isinstance(module_or_operation, str):
        if module_or_operation in _DECIDED_BY:
            operation, tensor = _DECIDED_BY[module_or_operation]
            raise BackendError(
                f"{module_or_operation} decides nothing itself: explain {operation!r} with {tensor}, "
                "or the module that calls it"
            )
        if module_or_operation not in backends.operations:
            known = ", ".join(name for name in backends.operations if name not in _DECIDED_BY)
            raise BackendError(f"unknown operation {module_or_operation!r}; known: {known}")
        wanted = backends.requested(backend)
        note(module_or_operation, input, backends.decide(module_or_operation, input, wanted))
        return layers

    def enter(name: str) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            names.append(name)
            backends.enter_layer("")

        return begin

    def leave(*_: Any) -> None:
        names.pop()
        backends.enter_layer("")

    module = _copied(module_or_operation)
    backends.enter_layer("")
    for name, child in module.named_modules():
        # A hook would take the modules of a block out of it, which names itself; a ScriptModule refuses them.
        if type(child) not in KINDS and not isinstance(child, torch.jit.ScriptModule):
            child.register_forward_pre_hook(enter(name))
            child.register_forward_hook(leave)
    backends.record(note)
    try:
        with torch.no_grad(), backends.use_backend(backends.requested(backend)):
            module(input)
    finally:
        backends.record(None)
        backends.enter_layer("")
    return layers


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    """A deep copy, also where torch.nn.utils.weight_norm left a tensor that belongs to a graph, which has none."""
    values = [value for part in module.modules() for value in vars(part).values()]
    return deepcopy(module, {id(v): v.detach() for v in values if isinstance(v, Tensor) and not v.is_leaf})
