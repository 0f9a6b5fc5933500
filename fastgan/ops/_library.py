"""Operations in the `fastgan::` namespace: schema, implementation, fake and autograd, all in Python."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastgan.errors import FastganError

LIBRARY = torch.library.Library("fastgan", "DEF")
direct: Any = SimpleNamespace()  # each operation without the dispatcher, for plain tensors where nothing `is_heard`


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    function: type[torch.autograd.Function] | None = None,
) -> None:
    """Define the operation `torch.ops.fastgan.NAME`, and `direct.NAME` beside it.

    Args:
        schema: `name(arguments) -> results`.
        implementation: picks the backend at run time; one function for every device.
        fake: the results' shapes, dtypes and strides, for compile, export and fake tensors.
        function: the autograd formula. Its forward takes `compute`, which has the schema's arguments and knows no
            autograd, before the arguments themselves. Without a formula the operation raises when it is
            differentiated: what it takes as constants is not constant.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgan::{name}", fake, lib=LIBRARY)
    operation = getattr(torch.ops.fastgan, name).default

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*args)

    def differentiable(compute: Callable, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return compute(*args)
        if function is not None:
            return function.apply(compute, *args)
        if True in [a.requires_grad for a in args if isinstance(a, Tensor)]:
            raise FastganError(
                f"fastgan::{name} is one half of an operation and cannot be differentiated: the "
                "statistics and sums that it takes depend on its input. Call fastgan.ops instead, or "
                "detach the arguments."
            )
        return compute(*args)

    LIBRARY.impl(name, partial(differentiable, below_autograd), "Autograd")
    setattr(direct, name, partial(differentiable, implementation))


_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


def is_heard() -> bool:
    """Whether a mode, transform or trace listens to what runs. Where none does and all tensors are plain, only autograd
    could listen in PyTorch's dispatcher to an operation: then `direct` is as good as `torch.ops.fastgan`, and saves two
    journeys from Python through C++ and back, which cost more than the rest of a call.
    """
    return torch.compiler.is_compiling() or _modes() > 0 or _transforms() or _tracing() is not None


def gradient_of_gradient(
    definition: Callable[..., Tensor],
    given: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """Differentiate an operation's gradient through its definition, once more or, with a graph, any number of
    times.

    Args:
        definition: the operation in differentiable PyTorch, of the inputs.
        given: the output's cotangent, then the inputs: what the gradient operation was given.
        cotangents: of the gradients by each input; None where that gradient was not asked for.
        wanted: for each of `given`, whether its gradient is needed.
        dtype: to compute in.
    """
    linked = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [None if t is None else _leaf(t, dtype, linked) for t in given]
        first, *inputs = leaves
        pairs = [(x, c.to(dtype)) for x, c in zip(inputs, cotangents, strict=True) if x is not None and c is not None]
        sources = [x for x, want in zip(leaves, wanted, strict=True) if x is not None and want]
        if not pairs or not sources:
            return [None for _ in given]
        gradients = _gradients([definition(*inputs)], [x for x, _ in pairs], [first], linked=True)
        second = iter(_gradients(gradients, sources, [c for _, c in pairs], linked))
    return [next(second).to(t.dtype) if t is not None and want else None for t, want in zip(given, wanted, strict=True)]


def _leaf(tensor: Tensor, dtype: torch.dtype, linked: bool) -> Tensor:
    """A tensor to differentiate by: tied to the caller's graph only where yet another derivative may be asked
    for."""
    copy = tensor.to(dtype, copy=True) if linked else tensor.detach().to(dtype)
    return copy if copy.requires_grad else copy.detach().requires_grad_()


def _gradients(outputs: Any, inputs: Any, cotangents: Any, linked: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=linked, allow_unused=True, materialize_grads=True
    )
