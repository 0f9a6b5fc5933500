"""Registration of operations in the `fastgan::` namespace: schema, implementation, fake, autograd, all in
Python."""

from collections.abc import Callable
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
