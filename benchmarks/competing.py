"""One operation and its three passes for each competitor. The step's competitors are in `fastgan.bench.steps`."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastgan.backends import BACKENDS, use_backend, why_not

PASSES = ("forward", "backward", "both")


def passes(
    stem: str,
    provider: str,
    what: str,
    definition: Callable[..., Tensor | tuple[Tensor, ...]],
    operation: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
) -> Callable[[], object]:
    """`what` of `PASSES` as `provider` runs it: the `definition` in plain PyTorch for eager, tuned and compiled, else
    `operation` with that backend forced. All `inputs` get gradients, of the first of several results; images are
    channels-last but for eager."""
    backend = provider if provider in BACKENDS and provider != "eager" else "eager"
    if reason := why_not(backend, stem, inputs[0].device.type, inputs[0].dtype):
        pytest.skip(reason)
    layout = torch.contiguous_format if provider == "eager" else torch.channels_last
    leaves = [t.detach().clone(memory_format=layout if t.dim() == 4 else torch.preserve_format) for t in inputs]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    function = operation if backend != "eager" else torch.compile(definition) if provider == "compiled" else definition

    def forward() -> Tensor | tuple[Tensor, ...]:
        with use_backend(backend):
            return function(*leaves)

    results = forward()
    gradient = torch.ones_like(_first(results))

    def backward(results: Tensor | tuple[Tensor, ...] = results, keep: bool = True) -> object:
        with use_backend(backend):
            return torch.autograd.grad(_first(results), leaves, gradient, retain_graph=keep)

    return {"forward": forward, "backward": backward, "both": lambda: backward(forward(), keep=False)}[what]


def _first(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]
