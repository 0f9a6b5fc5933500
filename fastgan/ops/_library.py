"""Registration of operations in the `fastgan::` namespace: schema, implementation, fake, autograd, all in
Python."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.errors import FastganError

LIBRARY = torch.library.Library("fastgan", "DEF")


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    function: type[torch.autograd.Function] | None = None,
) -> None:
    """Define an operation.

    Args:
        schema: `name(arguments) -> results`.
        implementation: picks the backend at run time; one function for every device.
        fake: the results' shapes, dtypes and strides, for compile, export and fake tensors.
        function: the autograd formula, whose forward calls `below_autograd`. Without one the operation
            raises when it
            is differentiated: what it takes as constants is not constant.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgan::{name}", fake, lib=LIBRARY)
    operation = getattr(torch.ops.fastgan, name).default

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            if function is None:
                raise FastganError(
                    f"fastgan::{name} is one half of an operation and cannot be differentiated: the "
                    "statistics and sums that it takes depend on its input. Call fastgan.ops instead, or "
                    "detach the arguments."
                )
            return function.apply(*args)
        return below_autograd(operation, *args)

    LIBRARY.impl(name, autograd, "Autograd")


def below_autograd(operation: Callable, *args: Any) -> Any:
    """Call an operation's implementation, past its autograd formula."""
    with torch._C._AutoDispatchBelowAutograd():
        return operation(*args)


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
