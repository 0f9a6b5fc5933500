"""Where the CPU kernels of bn_act, gan_bce and adam_ema are faster than eager PyTorch: writes measured_cpu.json.

python benchmarks/measured_cpu.py [--seconds 0.1] [--only PART_OF_A_NAME]

Each line is an input, forward and backward with every gradient (of adam_ema one update), turn by turn in one process:
the median over the rounds of eager's time over the kernel's, with its 95 % confidence interval. A row is written for
the least batch from which on the whole interval lies above 1 for every batch that was measured; what was not measured
stays eager. Rows of the operation, dtype and shapes that were measured are replaced, all others are kept.
"""

import argparse
import gc
import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

import fastgan
from fastgan.bench.pairing import Interval, interleave, ratio, seconds
from fastgan.files import replacing
from fastgan.ops import adam_ema, bn_act, gan_bce

TABLE = Path(fastgan.__file__).parent / "measured_cpu.json"
CPU = torch.device("cpu")
CHANNELS, SIZES, BATCHES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512), (4, 8, 16, 32, 64), (8, 32, 64)
LEAST, MOST = 1 << 10, 1 << 18  # values of an image: fewer are no network's, more take long
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SHORT = 1e-2  # seconds of one measurement at least: threads meet faster at some times than at others
LOGITS = (16, 64, 1024, 16384, 65536)
PARAMETERS, TENSORS = (1 << 10, 1 << 14, 1 << 18, 1 << 22), 8  # values of a network in all, and how they are spread


def bn_act_passes(shape: tuple[int, ...], layout: str):
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    weight, bias = (torch.randn(shape[1], requires_grad=True) for _ in range(2))
    gradient = torch.randn_like(x)

    def eager() -> object:
        z = F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True), 0.2)
        return torch.autograd.grad(z, (x, weight, bias), gradient)

    def kernel() -> object:
        z = bn_act(x, None, None, weight, bias, training=True, backend="cpu")
        return torch.autograd.grad(z, (x, weight, bias), gradient)

    return {"eager": eager, "kernel": kernel}


def gan_bce_passes(shape: tuple[int, ...], layout: str):
    logits = [torch.randn(shape, requires_grad=True) for _ in range(2)]

    def passes(backend: str):
        def run() -> object:
            real, fake, *_ = gan_bce(*logits, backend=backend)
            return torch.autograd.grad(real + fake, logits)

        return run

    return {"eager": passes("eager"), "kernel": passes("cpu")}


def adam_ema_passes(shape: tuple[int, ...], layout: str):
    tensors = [[torch.rand(shape[0] // TENSORS) for _ in range(TENSORS)] for _ in range(5)]

    def passes(backend: str):
        own, step = [[tensor.clone() for tensor in group] for group in tensors], torch.ones(1)

        def run() -> object:
            adam_ema(*own, step, lr=2e-4, beta1=0.5, ema_decay=0.999, backend=backend)
            return [tensor for group in own for tensor in group]

        return run

    return {"eager": passes("eager"), "kernel": passes("cpu")}


def cases() -> Iterator[tuple[str, str, list[tuple[int, ...]]]]:
    """(operation, layout, shapes that differ in N alone, least first)."""
    for layout, size, channels in product(LAYOUTS, SIZES, CHANNELS):
        if LEAST <= channels * size * size <= MOST:
            yield "bn_act", layout, [(batch, channels, size, size) for batch in BATCHES]
    yield "gan_bce", "contiguous", [(count,) for count in LOGITS]
    yield "adam_ema", "contiguous", [(count,) for count in PARAMETERS]


def measure(operation: str, layout: str, shape: tuple[int, ...], budget: float) -> Interval:
    torch.manual_seed(0)
    make = {"bn_act": bn_act_passes, "gan_bce": gan_bce_passes, "adam_ema": adam_ema_passes}[operation]
    passes = make(shape, layout)
    once = [max(seconds(run, 1, CPU) for run in passes.values()) for _ in range(5)][-1]  # the first ones warm up
    calls = max(1, int(SHORT / once))
    times = interleave(passes, max(9, min(60, int(budget / 2 / calls / once))), calls, CPU)
    return ratio(times["eager"], times["kernel"])


def row(operation: str, layout: str, found: list[tuple[tuple[int, ...], Interval]]) -> dict | None:
    """For the least batch from which on all are faster; None where the largest is not."""
    faster: list[tuple[tuple[int, ...], Interval]] = []
    for shape, interval in reversed(found):
        if interval.low <= 1:
            break
        faster.append((shape, interval))
    if not faster:
        return None
    return {
        "operation": operation,
        "dtype": "float32",
        "layout": layout,
        "shape": list(faster[-1][0]),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "backend": "cpu",
        "kernels": fastgan.backends.instruction_set(operation),
        "ratio": round(min(interval.median for _, interval in faster), 2),
    }


def _key(row: dict) -> tuple:
    return row["operation"], row["dtype"], row["layout"], tuple(row["shape"][1:]), row["capability"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="about as long each pair is measured")
    parser.add_argument("--only", default="", help="part of a line's name")
    arguments = parser.parse_args()
    if "FASTGAN_CPU" in os.environ:
        parser.error("FASTGAN_CPU is set: the table is for the kernels that run without it")
    gc.freeze()  # collections between rounds need not walk all of PyTorch
    table = json.loads(TABLE.read_text())
    rows: dict[tuple, dict] = {_key(one): one for one in table["rows"]}
    for operation, layout, shapes in cases():
        name = f"{operation} {layout} {'x'.join(map(str, shapes[0][1:]))}"
        if arguments.only not in name:
            continue
        found = [(shape, measure(operation, layout, shape, arguments.seconds)) for shape in shapes]
        print(f"{name:<32}" + "   ".join(f"{shape[0]}: {interval}" for shape, interval in found), flush=True)
        capability = torch.backends.cpu.get_cpu_capability()
        rows.pop((operation, "float32", layout, shapes[0][1:], capability), None)
        if (one := row(operation, layout, found)) is not None:
            rows[_key(one)] = one
        save(table["about"], rows)  # after each line: a run takes long


def save(about: str, rows: dict[tuple, dict]) -> None:
    lines = ",\n    ".join(json.dumps(rows[key]) for key in sorted(rows, key=str))
    with replacing(TABLE) as temporary:
        temporary.write_text(f'{{\n  "about": {json.dumps(about)},\n  "rows": [\n    {lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
