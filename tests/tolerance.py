"""`assert_as_right_as_torch`: the tolerance rule of `fastgan.tolerance` as an assertion, shared by all
tests."""

import torch

from fastgan.tolerance import FACTOR, misses


def assert_as_right_as_torch(got, own, truth, what="", factor=FACTOR):
    """`got` (tensor or tuple) is at most twice as wrong against `truth` (fp64) as PyTorch's own result
    `own`."""
    reason = misses(got, own, truth, factor)
    assert reason is None, f"{what}: {reason}"


def assert_pooled_as_right_as_torch(draws: list[tuple[list, list, list]], factor: float = FACTOR) -> None:
    """The same of (got, own, truth), lists of tensors, of several draws together: of a tensor of few numbers PyTorch's
    own error is small by luck now and then."""
    for index, tensor in enumerate(draws[0][0]):
        if tensor.is_floating_point():
            triple = (torch.stack([draw[who][index] for draw in draws]) for who in range(3))
            assert_as_right_as_torch(*triple, f"tensor {index}", factor=factor)
