"""What a training step of DCGAN moves and launches on a GPU, and the time a roofline allows: modelled, not measured.

    python benchmarks/traffic.py [--card a100] [--json F]

The counts come from the operations that really run: a step of `GanStep` on `meta` tensors, which have shapes and no
values, under a dispatch mode that sees every ATen operation and every Triton launch. How they are counted:

* Bytes: each operand of a launch is read once and each result written once, however often a kernel comes back to it
  (caches), as the last program of a launch does to the partial sums of the others; views and allocations cost
  nothing. Statistics must be complete before they are applied, so ATen's training
  BatchNorm reads its input twice, and its backward both operands twice (`READS`).
* Launches: one for an ATen operation (the least: cuDNN and ATen may take more), one for each gradient of a
  convolution, and each launch of our Triton kernels. An operation on lists of tensors is one for lists of one dtype
  and at most 30 tensors and 320 chunks of 65,536 elements, where torch's own launches end when it was built for CUDA
  12; the largest here has 19 and 196. `adam_ema` is what it is made of where no backend has a kernel for it, as on
  CUDA by default and under `use_backend("triton")`: torch's fused Adam, once for each dtype.
* Multiplications: those of a direct convolution; others are nothing beside them.
* The convolutions' weights, gradients and moments are bf16 like the activations: meta tensors know no autocast. With
  fp32 weights the optimiser's share doubles and casts are added, for all alike. BatchNorm's parameters are fp32.

The estimate: a launch takes the longer of its bytes over the bandwidth and its operations over the matrix rate; the
host takes `launch_cost` for each; the step takes the longer of both sums. Captured in a CUDA graph it has one launch.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan import GanStep, backends, optim
from fastgan.command import run_configured
from fastgan.errors import FastganError
from fastgan.nn import ConvStack, Discriminator, Generator
from fastgan.versions import versions

aten = torch.ops.aten


class Launch(NamedTuple):
    """One kernel: its name, bytes read and written, floating-point operations of a convolution (0: it is none)."""

    name: str
    read: int
    written: int
    operations: int = 0

    @property
    def moved(self) -> int:
        return self.read + self.written


# --- counting -----------------------------------------------------------------------------------------------------

# How often an operation must read its tensors of more than one dimension; once where it is not listed.
READS = {aten.native_batch_norm: 2, aten._native_batch_norm_legit: 2, aten.native_batch_norm_backward: 2}
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_}  # what they write they do not read
MODELS = {aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros_like, aten.ones_like, aten.full_like}  # read nothing
NOT_WRITTEN = {aten._fused_adam_: "grads", aten._fused_adamw_: "grads"}  # but where a GradScaler's factor is removed


def size(tensor: Tensor) -> int:
    """Bytes of memory that stand behind a tensor: no more than its storage where it is expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Count(TorchDispatchMode):
    """The launches of everything that runs on meta tensors, in order: `with Count.all() as count: ...`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._blank: dict[int, torch.UntypedStorage] = {}  # allocated, and not yet written
        self._alive: list[torch.UntypedStorage] = []  # so that no storage takes the identity of an older one
        self._operations = 0  # of the convolution whose kernel is about to be launched

    @classmethod
    @contextmanager
    def all(cls) -> "Iterator[Count]":
        """Count what runs in the block, Triton's launches among it."""
        count = cls()
        kernels = [m for name, m in sys.modules.items() if name.startswith("fastgan.kernels.") and hasattr(m, "launch")]
        with ExitStack() as stack:
            for module in kernels:
                stack.enter_context(patch.object(module, "launch", count.triton))
            stack.enter_context(patch.object(backends, "kernel", count._watched(backends.kernel)))
            stack.enter_context(count)
            yield count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func.namespace == "fastgan":
            with self:  # what the operation is made of counts, not itself
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        outputs, inputs = tensors(result), tensors((args, kwargs))
        if packet in ALLOCATIONS:
            for tensor in outputs:
                storage = tensor.untyped_storage()
                self._alive.append(storage)
                self._blank[storage._cdata] = storage
        elif packet is aten.convolution:
            self._convolution(inputs[0], inputs[1], outputs[0], [(inputs, outputs)], "convolution")
        elif packet is aten.convolution_backward:
            # As cuDNN does, and the meta function does not: gradients have the layout of what they are gradients of.
            models = (args[1], args[2], result[2])
            result = tuple(None if r is None else torch.empty_like(m) for r, m in zip(result, models, strict=True))
            self._convolution_backward(args, result)
        else:
            self._operation(func, args, kwargs, inputs, outputs)
        return result

    def _operation(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        changed = tensors(
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            if argument.name != NOT_WRITTEN.get(func.overloadpacket)
        )
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        written = [*changed, *(t for t in outputs if t.untyped_storage()._cdata not in known)]
        if not written:
            return  # a view
        overwritten = {id(tensor) for tensor in changed} if func.overloadpacket in OVERWRITES else set()
        times = READS.get(func.overloadpacket, 1)
        read = sum(size(t) * (times if t.dim() > 1 else 1) for t in inputs if id(t) not in overwritten)
        read = 0 if func.overloadpacket in MODELS else read
        self._note(str(func.overloadpacket), read, written)

    def _convolution_backward(self, args: Any, result: Any) -> None:
        gradient, input, weight = args[:3]
        parts = [((gradient, weight), result[0]), ((gradient, input), result[1]), ((gradient,), result[2])]
        for name, (inputs, output) in zip(("dgrad", "wgrad", "bias gradient"), parts, strict=True):
            if output is not None and name != "bias gradient":
                self._convolution(input, weight, gradient, [(inputs, [output])], name)
            elif output is not None:
                self._note(name, size(gradient), [output])

    def _convolution(self, input: Tensor, weight: Tensor, output: Tensor, moves: Any, name: str) -> None:
        # The side with fewer pixels is where each weight is multiplied once, transposed or not.
        pixels = min(input.shape[2:].numel(), output.shape[2:].numel())
        for inputs, outputs in moves:
            self._note(name, sum(map(size, inputs)), outputs, 2 * weight.numel() * input.shape[0] * pixels)

    def triton(self, kernel: Any, grid: Any, tensor: Tensor, *args: Any, **meta: Any) -> None:
        """In place of `fastgan.kernels.launch.launch`. What was allocated and not yet written is what it writes."""
        given = tensors((args, meta))
        written = [t for t in given if t.untyped_storage()._cdata in self._blank]
        read = sum(size(t) for t in given if t.untyped_storage()._cdata not in self._blank)
        operations, self._operations = self._operations, 0
        self._note(kernel.fn.__name__, read, written, operations)

    def _watched(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """`backends.kernel`, whose convolutions tell beforehand how much their launch multiplies."""

        def watched(backend: str, name: str) -> Callable[..., Any]:
            function = kernel(backend, name)

            def convolve(*args):  # (value, three more of the operand, weight, [bias,] geometry, to_large, size, ...)
                value, weight = args[0], args[4]
                to_large, size = args[6:8] if name == "convolve_block_gradient_constants" else args[7:9]
                pixels = value.shape[2:].numel() if to_large else torch.Size(size).numel()
                self._operations = 2 * weight.numel() * value.shape[0] * pixels
                return function(*args)

            def weight_gradient(*args):  # (large, three of its constants, small, three of its constants, weight, ...)
                large, small, weight = args[0], args[4], args[8]
                pixels = min(side.shape[2:].numel() for side in (large, small))
                self._operations = 2 * weight.numel() * large.shape[0] * pixels
                return function(*args)

            if name.startswith("convolve"):
                return convolve
            return weight_gradient if name == "weight_gradient" else function

        return watched

    def _note(self, name: str, read: int, written: Iterable[Tensor], operations: int = 0) -> None:
        distinct = {tensor.untyped_storage()._cdata: tensor for tensor in written if tensor.is_meta}
        for key, tensor in distinct.items():
            self._blank.pop(key, None)
            self._alive.append(tensor.untyped_storage())
        if distinct:  # else it ran on the host, such as a counter of steps
            self.launches.append(Launch(name, read, sum(map(size, distinct.values())), operations))


def tensors(tree: Any) -> list[Tensor]:
    """The distinct tensors in nested arguments, those on the host left out."""
    leaves = tree_leaves(tuple(tree) if isinstance(tree, Iterator) else tree)
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_meta}.values())


# --- what is counted ----------------------------------------------------------------------------------------------


class Provider(NamedTuple):
    """`backend`: forced for the operations; `unit`: whether a stack is one unit; `optimizer`: of both networks."""

    backend: str
    unit: bool
    optimizer: Callable[..., torch.optim.Optimizer]


def _foreach(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 2e-4, (0.5, 0.999), foreach=True)


def _own(parameters: Any) -> torch.optim.Optimizer:
    return optim.make_optimizer(parameters, lr=2e-4)


BF16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
PROVIDERS = {
    "eager": Provider("eager", False, _foreach),
    "bn_act": Provider("triton", False, _own),
    "fused": Provider("triton", True, _own),
}


@contextmanager
def running(provider: Provider) -> Iterator[None]:
    """Within it networks run as `provider` has it."""
    if provider.unit and find_spec("fastgan.nn.stack_triton") is None:
        raise FastganError("this version has no fused stack for Triton (fastgan/nn/stack_triton.py)")
    import fastgan.kernels.bn_act
    import fastgan.kernels.gan_bce  # noqa: F401  so that their launches can be seen

    with ExitStack() as stack:
        stack.enter_context(backends.use_backend(provider.backend))
        # torch's check of fused optimisers' devices knows no meta tensors.
        stack.enter_context(patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_: None))
        if not provider.unit:
            stack.enter_context(patch("fastgan.nn.stack.why_unfused", lambda input: "counted block by block"))
        yield


def networks(image_size: int, width: int = 64) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        made = Generator(image_size, 3, 100, width), Discriminator(image_size, 3, width)
    for network in made:
        halve(network)
    return made


def halve(network: nn.Module) -> None:
    """bf16 and channels-last convolutions, as they are under autocast; BatchNorm keeps fp32."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]


def step_launches(provider: Provider, image_size: int, batch_size: int, width: int = 64) -> list[Launch]:
    """Those of one training step, not the first: by then the optimisers have their moments."""
    generator, discriminator = networks(image_size, width)
    optimizers = [provider.optimizer(network.parameters()) for network in (generator, discriminator)]
    step = GanStep(generator, discriminator, *optimizers, latents=lambda n: torch.empty(n, 100, **BF16))
    real = torch.empty(batch_size, 3, image_size, image_size, **BF16)
    real = real.contiguous(memory_format=torch.channels_last)
    with running(provider):
        step(real)
        with Count.all() as count:
            step(real)
    return count.launches


def bytes_kept(provider: Provider, network: nn.Module, input: Tensor) -> int:
    """What the forward pass keeps for the backward pass, parameters and buffers left out."""
    kept: dict[int, Tensor] = {}
    own = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with running(provider), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(input)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


class Beside(NamedTuple):
    """What a block of convolution, BatchNorm and LeakyReLU moves in a step beside what its bare convolution does: reads
    and writes of an activation, and bytes that do not grow with the batch (partial sums of the weight's gradient)."""

    passes: float
    constant: int


def beside_convolutions(provider: Provider) -> Beside:
    """Of blocks of 3x3 convolutions, whose activations are all of one size: per image, and what all images share."""

    def moved(images: int, blocks: int, normalised: bool) -> int:
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers.append(nn.Conv2d(64, 64, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(64), nn.LeakyReLU(0.2, inplace=True)] if normalised else []
        stack = ConvStack(*layers).to("meta")
        halve(stack)
        input = torch.empty(images, *shape, **BF16, requires_grad=True)
        input = input.contiguous(memory_format=torch.channels_last)
        with running(provider if normalised else PROVIDERS["eager"]), Count.all() as count:
            stack(input).backward(torch.empty_like(input))
        return sum(launch.moved for launch in count.launches)

    def of_a_block(images: int) -> int:
        block, bare = (moved(images, 4, with_norm) - moved(images, 3, with_norm) for with_norm in (True, False))
        return block - bare

    shape, images = (64, 64, 64), 64
    once, twice = of_a_block(images), of_a_block(2 * images)
    return Beside((twice - once) / (2 * images * torch.Size(shape).numel()), 2 * once - twice)


# --- the estimate -------------------------------------------------------------------------------------------------


class Card(NamedTuple):
    """Bytes and dense bf16 operations per second, and where the figures are from."""

    bandwidth: float
    rate: float
    source: str


CARDS = {
    "a100": Card(2.039e12, 312e12, "NVIDIA's data sheet of the A100 80GB SXM"),
    "h100": Card(3.35e12, 989e12, "NVIDIA's data sheet of the H100 SXM, without sparsity"),
}


@dataclass
class TrafficConfig:
    """Count what a DCGAN step moves and launches, and estimate its time on a card: modelled, not measured."""

    sizes: tuple[int, ...] = (64, 128, 256)
    """pixels on a side"""
    batches: tuple[int, ...] = (32, 128)
    """images per step"""
    card: str = "h100"
    """whose bandwidth and matrix rate are taken: a100 or h100, from their data sheets"""
    bandwidth: float | None = None
    """bytes per second, in place of the card's"""
    rate: float | None = None
    """floating-point operations per second, in place of the card's"""
    launch_cost: float = 5e-6
    """seconds of the host for a launch: an assumption, for no data sheet has it"""
    json: Path | None = None
    """write the counts and estimates here"""
    debug: bool = False
    """show tracebacks of errors"""


def estimate(launches: Sequence[Launch], card: Card, launch_cost: float) -> dict[str, float]:
    """Modelled seconds: of the device, of the host that launches, and of the step, as it is and as a CUDA graph."""
    device = sum(max(one.moved / card.bandwidth, one.operations / card.rate) for one in launches)
    host = launch_cost * len(launches)
    return {"device": device, "host": host, "step": max(device, host), "graph": max(device, launch_cost)}


def count(config: TrafficConfig, card: Card) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for image_size in config.sizes:
        for batch_size in config.batches:
            for name, provider in PROVIDERS.items():
                launches = step_launches(provider, image_size, batch_size)
                elsewhere = [launch for launch in launches if not launch.operations]
                generator, discriminator = networks(image_size)
                images = torch.empty(batch_size, 3, image_size, image_size, **BF16)
                kept = [
                    bytes_kept(provider, generator, torch.empty(batch_size, 100, **BF16)),
                    bytes_kept(provider, discriminator, images),
                ]
                next(m for m in discriminator.modules() if isinstance(m, ConvStack)).recompute_first = True
                kept.append(bytes_kept(provider, discriminator, images))
                rows.append({
                    "image_size": image_size,
                    "batch_size": batch_size,
                    "provider": name,
                    "launches": len(launches),
                    "launches_by_kind": dict(Counter(launch.name for launch in launches).most_common()),
                    "bytes_read": sum(launch.read for launch in launches),
                    "bytes_written": sum(launch.written for launch in launches),
                    "bytes_elsewhere": sum(launch.moved for launch in elsewhere),
                    "operations": sum(launch.operations for launch in launches),
                    "bytes_kept_generator": kept[0],
                    "bytes_kept_discriminator": kept[1],
                    "bytes_kept_discriminator_first_recomputed": kept[2],
                    "modelled_seconds": estimate(launches, card, config.launch_cost),
                })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]], card: Card, launch_cost: float, console: Console) -> None:
    table = Table(title="modelled, not measured", caption=(
        f"a card with {card.bandwidth / 1e12:g} TB/s and {card.rate / 1e12:g} TFLOP/s ({card.source}), "
        f"{launch_cost * 1e6:g} us a launch (assumed)"
    ))  # fmt: skip
    for column in ("DCGAN, batch", "step by", "launches", "read GB", "written GB", "outside conv. GB", "kept G, D",
                   "step ms", "as a graph ms"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("DCGAN, batch", "step by") else "right")
    for row in rows:
        first = next(r for r in rows if r["image_size"] == row["image_size"] and r["batch_size"] == row["batch_size"])
        kept = [row[key] / first[key] for key in ("bytes_kept_generator", "bytes_kept_discriminator")]
        seconds = row["modelled_seconds"]
        table.add_row(
            f"{row['image_size']}, {row['batch_size']}" if row is first else "", row["provider"],
            str(row["launches"]), f"{row['bytes_read'] / 1e9:.2f}", f"{row['bytes_written'] / 1e9:.2f}",
            f"{row['bytes_elsewhere'] / 1e9:.2f}", f"{kept[0]:.2f}x, {kept[1]:.2f}x",
            f"{seconds['step'] * 1e3:.2f}", f"{seconds['graph'] * 1e3:.2f}",
        )  # fmt: skip
    console.print(table)
    found = {name: beside_convolutions(provider) for name, provider in PROVIDERS.items()}
    passes = ", ".join(f"{name} {of.passes:.2f} and {of.constant / 1e6:.1f} MB" for name, of in found.items())
    console.print(f"passes over an activation per block, bare convolutions left out, and bytes beside: {passes}")


def traffic(config: TrafficConfig) -> None:
    if config.card not in CARDS:
        raise FastganError(f"--card: expected one of {', '.join(CARDS)}; got {config.card!r}")
    card = CARDS[config.card]
    if config.bandwidth is not None or config.rate is not None:
        card = Card(config.bandwidth or card.bandwidth, config.rate or card.rate, "as given")
    rows = count(config, card)
    show(rows, card, config.launch_cost, Console(highlight=False, width=120))
    if config.json is not None:
        passes = {name: beside_convolutions(provider)._asdict() for name, provider in PROVIDERS.items()}
        content = {
            "kind": "modelled from counted operations; nothing was measured on a GPU",
            "card": card._asdict(),
            "config": {key: value for key, value in asdict(config).items() if key not in ("json", "debug")},
            "versions": versions(),
            "beside_convolutions_per_block": passes,
            "rows": rows,
        }
        config.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_configured(TrafficConfig, "python benchmarks/traffic.py", traffic, sys.argv[1:]))
