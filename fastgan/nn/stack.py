"""ConvStack: a `nn.Sequential` of convolution, BatchNorm and activation that runs as one differentiable unit where a
backend can, with the activation deferred into the next convolution and one tensor kept per block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import groupby

import torch
from torch import Tensor, nn

from fastgan import backends
from fastgan.nn.blocks import Block, is_plain_module, parts, run_block, run_norm, why_apart
from fastgan.nn.unit import run_blocks


class ConvStack(nn.Sequential):
    """`nn.Sequential(Conv2d | ConvTranspose2d, [BatchNorm2d], [LeakyReLU | ReLU], ...)`, faster.

    Construction, `state_dict`, indexing and results are those of `nn.Sequential`; running statistics are updated once
    per forward. On CPU (float32 and, under autocast, bfloat16, with AVX2), and on CUDA where
    `fastgan.use_backend("triton")` asks for it (its convolutions are not measured against the library's yet), each run
    of blocks is one differentiable unit of fastgan's kernels: BatchNorm and activation are applied while the next
    convolution reads its input. Any other module, and a block whose modules have hooks, parametrisations or a type of
    their own, runs as it is; on other devices and dtypes and in compiled code each block runs as `conv_bn_act` or
    `conv_transpose_bn_act`.

    Under autocast to bfloat16 a CPU's kernels store that type; with AMX they multiply in it, else in float32, which is
    more precise and, where the library has no AMX either, faster than eager. (Where only the library has AMX, blocks
    are left to it.)

    `nn.SyncBatchNorm` (`nn.SyncBatchNorm.convert_sync_batchnorm`) normalises over all processes, on CPUs too.
    Differentiable any number of times: a gradient of the gradient is taken through the definition.
    `fastgan.use_backend("eager")` turns the kernels off.

    `recompute_first = True` (an attribute, False by default) saves memory for a little time where the stack runs as one
    unit: the first convolution's output, in a discriminator the largest tensor kept, is computed again for the backward
    pass instead of being kept for it.
    """

    recompute_first = False
    batches = 1

    def forward(self, input: Tensor) -> Tensor:
        if self.batches > 1 and len(input) % self.batches:
            raise ValueError(f"ConvStack: {self.batches} batches of one size expected, got {len(input)} images")
        for index, (name, part) in enumerate(parts(self)):
            if isinstance(part, list):
                input = _run_in_turn(part, input, self.recompute_first and index == 0, self.batches)
            else:
                input = _run_apart(name, part, input, self.batches)
        return input


@contextmanager
def as_batches(module: nn.Module, count: int) -> Iterator[None]:
    """Within it an input of `module` holds `count` batches of one size, one after the other: every `ConvStack` in it
    normalises each by its own statistics and updates the running ones in their order, as if they came one by one.

    Modules outside of stacks must treat each image by itself. On CPU kernels a convolution takes all batches at once;
    elsewhere they are taken apart.
    """
    stacks = [m for m in module.modules() if isinstance(m, ConvStack)]
    before = [stack.batches for stack in stacks]
    for stack in stacks:
        stack.batches = count
    try:
        yield
    finally:
        for stack, batches in zip(stacks, before, strict=True):
            stack.batches = batches


def _takes_batches(blocks: list[Block], input: Tensor) -> bool:
    """Whether one convolution may take several batches: the kernels know it, and no process waits for another."""
    return _backend_of(input) == "cpu" and not any(isinstance(block.norm, nn.SyncBatchNorm) for block in blocks)


def _cut(input: Tensor, batches: int) -> list[Tensor]:
    """The batches in `input`, as views of their own: modules that work in place refuse those of `chunk`."""
    size = len(input) // batches
    return [input[first : first + size] for first in range(0, len(input), size)]


def _run_apart(name: str, module: nn.Module, input: Tensor, batches: int) -> Tensor:
    """A module that is in no block, as it is, on one batch after the other; a stack takes them apart itself."""
    if batches > 1 and not isinstance(module, ConvStack):
        with as_batches(module, 1):
            # Copies: where it works in place, views would count as changed with each other.
            return torch.cat([_run_apart(name, module, batch.clone(), 1) for batch in _cut(input, batches)])
    if not torch.compiler.is_compiling() and (reason := why_apart(module)) is not None:
        backends.enter_layer(name)
        backends.note(type(module).__name__, input, backends.Decision("eager", f"runs as it is: {reason}"))
    if isinstance(module, nn.SyncBatchNorm) and is_plain_module(module, nn.SyncBatchNorm):
        return run_norm(module, input)
    return module(input)


def _run_in_turn(blocks: list[Block], input: Tensor, recompute_first: bool, batches: int) -> Tensor:
    """Blocks that follow each other, as units or by operations, whichever the tensor that reaches them allows."""
    why = why_unfused(input)
    if batches > 1 and not (why is None and _takes_batches(blocks, input)):
        return torch.cat([_run_in_turn(blocks, batch, recompute_first, 1) for batch in _cut(input, batches)])
    if why is None:
        return _run_as_units(blocks, input, recompute_first, batches)
    return _run_by_operations(blocks, input, why)


def _run_by_operations(blocks: list[Block], input: Tensor, why: str) -> Tensor:
    """`why`: the reason, for `explain`, why they are in no unit."""
    for block in blocks:
        if backends.is_recording() and backends.requested(None) != "eager":
            backends.enter_layer(block.name)
            backends.note("convolution", input, backends.Decision("eager", f"the library's: {why}"))
        input = run_block(block, input)
    return input


def _run_as_units(blocks: list[Block], input: Tensor, recompute_first: bool, batches: int) -> Tensor:
    """Every stretch of blocks that the kernels know as one unit, the blocks between by operations."""
    kernels = import_module(f"fastgan.nn.stack_{_backend_of(input)}")
    marked = [(block, kernels.why_not_block(block, input)) for block in blocks]
    for why, pairs in groupby(marked, lambda pair: pair[1]):
        stretch = [block for block, _ in pairs]
        run = partial(
            run_blocks, kernels, stretch, recompute_first=recompute_first and stretch[0] is blocks[0], batches=batches
        )
        if why is not None and batches == 1:
            input = _run_by_operations(stretch, input, why)
        elif why is not None:
            input = torch.cat([_run_by_operations(stretch, batch, why) for batch in _cut(input, batches)])
        elif kernels.BACKEND == "cpu" and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                input = run(input.to(torch.bfloat16))
        else:
            input = run(input)
    return input


def _backend_of(input: Tensor) -> str:
    """The backend that a request asks for, else the one that is measured faster on the input's device."""
    return backends.requested(None) or {"cpu": "cpu"}.get(input.device.type, "eager")


def why_unfused(input: Tensor) -> str | None:
    """Why the blocks of a stack run one by one on `input`; None: they run on a backend's kernels as one unit."""
    if torch.compiler.is_compiling():
        return "compiled code takes the modules as they are"
    backend = _backend_of(input)
    if input.is_cuda and backends.requested(None) is None:
        return "on CUDA the fused ones are not measured; ask for backend 'triton'"
    if backend not in ("cpu", "triton"):
        return f"backend {backend!r} has no fused stack"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if input.dim() != 4 or input.numel() == 0:
        return "the input is not a batch of images"
    if input.dtype == torch.float64 and backends.requested(None) is None:
        return f"float64 takes the kernels only where backend {backend!r} is asked for"
    return _why_not_cpu(input) if backend == "cpu" else _why_not_triton(input)


def _why_not_cpu(input: Tensor) -> str | None:
    if input.device.type != "cpu" or type(input) not in (Tensor, nn.Parameter):
        return "the input is not a plain CPU tensor"
    autocast = torch.is_autocast_enabled("cpu")
    if autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast to another dtype than bfloat16"
    from fastgan.nn import stack_cpu

    if (reason := stack_cpu.why_not()) is not None:
        return reason
    if autocast and backends.instruction_set(torch.bfloat16) != "amx" and torch.cpu._is_amx_tile_supported():
        return "the library multiplies in bfloat16 on AMX here, the kernels without"
    if input.dtype in (torch.float32, torch.float64) or (autocast and input.dtype == torch.bfloat16):
        return None
    return f"the kernels take float32 and, under autocast, bfloat16, the input is {input.dtype}"


def _why_not_triton(input: Tensor) -> str | None:
    from torch._subclasses.fake_tensor import FakeTensor

    if type(input) not in (Tensor, nn.Parameter, FakeTensor):
        return "the input is a tensor of another class"
    return backends.why_not("triton", "conv_bn_act", input.device.type, input.dtype)
