"""How every Triton kernel is launched: on its tensor's device, and only where there is something to do."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *args: Any, **meta: Any) -> None:
    """Run `kernel` over `grid` programs on the device of `tensor` (under the interpreter that may be the CPU). Tensors
    without memory, meta and fake ones, have the shapes of its results already."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
