"""The convolution kernels as DCGAN-64 at batch 64 launches them: recorded from the host functions on `meta` tensors, so
that what is compiled ahead of time is what a card would be given, tiles and specialisations included.
"""

from typing import Any, NamedTuple

import torch
from fastgan.kernels import conv_bn_act, conv_bn_act_constants, conv_bn_act_tiles, conv_bn_act_wgrad
from torch import Tensor

from fastgan.ops.conv_bn_act_eager import Geometry

MODULES = (conv_bn_act, conv_bn_act_wgrad, conv_bn_act_constants)
HALVES = Geometry((4, 4), (2, 2), (1, 1), (1, 1))
WHOLE = Geometry((4, 4), (1, 1), (0, 0), (1, 1))
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


class Launch(NamedTuple):
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict
    options: dict[str, int]


def _recorded(kernel, args: tuple, meta: dict[str, Any]) -> Launch:
    """A launch as Triton's own specialisation sees it: 1 and None are constants, multiples of 16 are known as such."""
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages") if name in meta}
    signature, constants, attributes = {}, dict(meta), {}
    annotated = {p.name: p.annotation_type for p in kernel.params}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = f"*{SHORT[value.dtype]}"
        else:
            signature[name] = annotated[name] or ("i32" if isinstance(value, int) else "fp32")
        if name in signature and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return Launch(kernel, signature, constants, attributes, options)


def launches(architecture: int) -> dict[str, Launch]:
    """Every kernel by what it does in which layer, with the tiles of the architecture."""
    conv_bn_act_tiles.capability = lambda _: architecture // 10
    seen: list[Launch] = []
    kept = {module: module.launch for module in MODULES}
    for module in MODULES:
        module.launch = lambda kernel, _, __, *args, **meta: seen.append(_recorded(kernel, args, meta))
    precision = torch.backends.cudnn.conv.fp32_precision
    found: dict[str, Launch] = {}

    def note(name: str) -> None:
        (found[name],) = seen
        seen.clear()

    try:
        _middle_layers(note)
        _other_dtypes(note)
        _ends(note)
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision
        for module, launch in kept.items():
            module.launch = launch
    return found


def _tensor(channels: int, size: int, dtype: torch.dtype) -> Tensor:
    empty = torch.empty(64, channels, size, size, dtype=dtype, device="meta")
    return empty.contiguous(memory_format=torch.channels_last)


def _constants(channels: int) -> Tensor:
    return torch.empty(4, channels, device="meta")


def _activation(channels: int, size: int, dtype=torch.float32) -> tuple:
    return _tensor(channels, size, dtype), None, _constants(channels), 0.2


def _gradient(channels: int, size: int, dtype=torch.float32) -> tuple:
    return _tensor(channels, size, dtype), _tensor(channels, size, dtype), _constants(channels), 1.0


def _convolve(operand: tuple, weight: tuple, geometry: Geometry, to_large: bool, size: int, statistics=False, out=None):
    """A convolution; with `statistics` and with `out`, the operand whose gradient it is, it leaves constants behind."""
    matrix = torch.empty(weight, dtype=operand[0].dtype, device="meta")
    where = (geometry, to_large, (size, size))
    if out is not None:
        y, _, constants, slope = out
        return conv_bn_act.convolve_block_gradient_constants(*operand, matrix, *where, y, constants, slope, 1024)
    if not statistics:
        return conv_bn_act.convolve(*operand, matrix, None, *where, False, None, None, 1.0)
    norm = (torch.empty(weight[1 if to_large else 0], device="meta"),) * 4
    return conv_bn_act.convolve_block_constants(*operand, matrix, None, *where, *norm, 1e-5, 0.1)


def _middle_layers(note) -> None:
    """64 -> 128 channels from 32 to 16 pixels, and the generator's layer that is its mirror image."""
    bf16 = torch.bfloat16
    large, small, weight = _activation(64, 32, bf16), _activation(128, 16, bf16), (128, 64, 4, 4)
    _convolve(large, weight, HALVES, False, 16, statistics=True)
    note("conv_fwd bf16")
    _convolve(_gradient(128, 16, bf16), weight, HALVES, True, 32, out=large)
    note("conv_dgrad bf16")
    _convolve(small, weight, HALVES, True, 32, statistics=True)
    note("conv_transpose_fwd bf16")
    _convolve(_gradient(64, 32, bf16), weight, HALVES, False, 16, out=small)
    note("conv_transpose_dgrad bf16")
    _weight_gradient(large, _gradient(128, 16, bf16))
    note("conv_wgrad bf16")


def _other_dtypes(note) -> None:
    """The two kernels that differ most, in fp16 and as the fp32 switch has it."""
    for name, dtype, precision in (("fp16", torch.float16, "ieee"), ("tf32", torch.float32, "tf32")):
        torch.backends.cudnn.conv.fp32_precision = precision
        _convolve(_activation(64, 32, dtype), (128, 64, 4, 4), HALVES, False, 16, statistics=True)
        note(f"conv_fwd {name}")
    _weight_gradient(_activation(64, 32), _gradient(128, 16))
    note("conv_wgrad tf32")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    _convolve(_activation(64, 32), (128, 64, 4, 4), HALVES, False, 16, statistics=True)
    note("conv_fwd fp32")


def _weight_gradient(large: tuple, small: tuple) -> None:
    matrix = torch.empty(small[0].shape[1], large[0].shape[1], 4, 4, device="meta")
    conv_bn_act.weight_gradient(*large, *small, matrix, HALVES)


def _ends(note) -> None:
    """What is special in bf16: few channels, images as large as the kernel, deep layers, and the O(C) kernels."""
    bf16 = torch.bfloat16
    image = (_tensor(3, 64, bf16), None, None, 1.0)
    _convolve(image, (64, 3, 4, 4), HALVES, False, 32)
    note("conv_fwd of 3 channels bf16")
    _convolve(_activation(64, 32, bf16), (64, 3, 4, 4), HALVES, True, 64)
    note("conv_transpose_fwd to 3 channels bf16")
    _weight_gradient(image, _gradient(64, 32, bf16))
    note("conv_wgrad of 3 channels bf16")
    _convolve((_tensor(100, 1, bf16), None, None, 1.0), (100, 512, 4, 4), WHOLE, True, 4, statistics=True)
    note("conv_transpose_fwd of one pixel bf16")
    _convolve(_activation(256, 8, bf16), (512, 256, 4, 4), HALVES, False, 4, statistics=True)
    note("conv_fwd of a deep layer bf16")
    parts, gamma = torch.empty(4, 128, 512, device="meta"), torch.empty(512, device="meta")
    by = conv_bn_act.block_constants(_tensor(512, 4, bf16), parts, gamma, gamma, gamma, gamma, 1e-5, 0.1)
    note("block_constants")
    conv_bn_act.block_gradient_constants(parts[:2], by, 1024)
    note("block_gradient_constants")
