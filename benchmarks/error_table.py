"""Errors of the kernels beside PyTorch's own, against the fp64 definition: `FASTGAN_CPU=avx2 python
benchmarks/error_table.py` makes `docs/errors.md`, by the copies for AVX2, which most processors have.

On a machine without a card Triton's kernels run in the mended interpreter of `tests/interpreter.py`. The rows are
outputs of the public operations, forward and backward, so that PyTorch's own implementation is what a user would have
run: of the same dtype, on the same device.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import torch.nn.functional as F
from torch import Tensor
from triton_device import DEVICE

from fastgan import backends
from fastgan.ops import bn_act, conv_bn_act, conv_transpose_bn_act, gan_bce
from fastgan.tolerance import Errors, errors

COMMAND = "FASTGAN_CPU=avx2 python benchmarks/error_table.py"
PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
BACKENDS = ("cpu", "triton") if DEVICE == "cpu" else ("triton", "cuda")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def bn_act_results(x: Tensor, weight: Tensor, bias: Tensor, dz: Tensor, backend: str | None) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    if backend is None:
        z = F.leaky_relu(F.batch_norm(leaves[0], None, None, *leaves[1:], True), 0.2)
    else:
        z = bn_act(leaves[0], None, None, *leaves[1:], training=True, backend=backend)
    gradients = torch.autograd.grad(z, leaves, dz.to(z.dtype))
    return dict(zip(("z", "dx", "dweight", "dbias"), (z.detach(), *gradients), strict=True))


def convolution_results(public, definition):
    def results(x: Tensor, filters: Tensor, weight: Tensor, bias: Tensor, dz: Tensor, backend: str | None):
        leaves = [t.detach().requires_grad_() for t in (x, filters, weight, bias)]
        if backend is None:
            y = definition(leaves[0], leaves[1], stride=2, padding=1)
            z = F.leaky_relu(F.batch_norm(y, None, None, *leaves[2:], True), 0.2)
        else:
            norm = {"bn_weight": leaves[2], "bn_bias": leaves[3]}
            z = public(*leaves[:2], **norm, stride=2, padding=1, training=True, backend=backend)
        gradients = torch.autograd.grad(z, leaves, dz.to(z.dtype))
        return dict(zip(("z", "dx", "dfilters", "dweight", "dbias"), (z.detach(), *gradients), strict=True))

    return results


def gan_bce_results(real: Tensor, fake: Tensor, backend: str | None) -> dict[str, Tensor]:
    real, fake = (t.detach().requires_grad_() for t in (real, fake))
    if backend is None:
        one, zero = torch.ones_like(real), torch.zeros_like(fake)
        losses = [F.binary_cross_entropy_with_logits(x, t) for x, t in ((real, one), (fake, zero))]
    else:
        losses = [x for x in gan_bce(real, fake, backend=backend)[:2] if x is not None]
    gradients = torch.autograd.grad(losses[0] + losses[1], (real, fake))
    values = (losses[0].detach(), losses[1].detach(), *gradients)
    return dict(zip(("loss_real", "loss_fake", "dreal", "dfake"), values, strict=True))


def rows(wanted: tuple[str, ...] = BACKENDS):
    """(operation, output, dtype, layout, backend, its errors, PyTorch's) of the `wanted` backends."""
    for (name, dtype), backend in product(DTYPES.items(), wanted):
        if backends.why_not(backend, "bn_act", DEVICE, dtype) is not None:
            continue
        for layout, memory in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
            torch.manual_seed(0)
            x = (2 * torch.randn(8, 32, 12, 12) + 1).to(DEVICE, dtype).to(memory_format=memory)
            weight, bias, dz = torch.randn(32).to(DEVICE), torch.randn(32).to(DEVICE), torch.randn_like(x)
            args = (x, weight, bias, _settled(dz, x, weight, bias))
            yield from _compare("bn_act", bn_act_results, args, name, layout, backend)
            for public, definition in ((conv_bn_act, F.conv2d), (conv_transpose_bn_act, F.conv_transpose2d)):
                filters = (0.1 * torch.randn(32, 32, 4, 4)).to(DEVICE, dtype)
                y = definition(x.double(), filters.double(), stride=2, padding=1)
                args = (x, filters, weight, bias, _settled(torch.randn_like(y).to(dtype), y, weight, bias))
                results = convolution_results(public, definition)
                yield from _compare(public.__name__, results, args, name, layout, backend)
        torch.manual_seed(0)
        args = tuple((5 * torch.randn(1024)).to(DEVICE, dtype) for _ in range(2))
        yield from _compare("gan_bce", gan_bce_results, args, name, "any", backend)


def _settled(dz: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`dz` with 0 where rounding decides the sign of v: there either branch's gradient is right."""
    v = F.batch_norm(y.double(), None, None, weight.double(), bias.double(), True)
    return torch.where(v.abs() < 2 * torch.finfo(dz.dtype).eps ** 0.5, 0, dz)


def _compare(operation, results, args, dtype, layout, backend):
    got, own, truth = results(*args, backend), results(*args, None), results(*(a.double() for a in args), None)
    for output in got:
        mine, theirs = errors(got[output], truth[output]), errors(own[output], truth[output])
        yield operation, output, dtype, layout, backend, mine, theirs


def line(what: list[str], mine: Errors, own: Errors) -> str:
    numbers = (f"{value:.2e}" for value in (mine.rms, own.rms, mine.max, own.max))
    return f"| {' | '.join((*what, *numbers))} |"


def main() -> None:
    has_kernels = "cpu" in BACKENDS and backends.why_not("cpu", "bn_act", DEVICE, torch.float32) is None
    if has_kernels and torch.ops.fastgan_cpu.instruction_set() != "avx2":
        sys.exit(f"the page is of the copies for AVX2: run {COMMAND}")
    lines = [
        "# Errors of the kernels beside PyTorch's own",
        "",
        f"Made by `{COMMAND}`; do not edit. RMS and maximum error against the definition",
        "in fp64, of one input each, for the outputs of the public operations and their first gradients. PyTorch's are",
        f"those of {torch.__version__} in the same dtype on the same device, {DEVICE}"
        + (", where Triton's kernels run in the interpreter." if DEVICE == "cpu" else "."),
        f"Those of its sums depend on the number of threads, here {torch.get_num_threads()}; ours do not.",
        "The cpu rows are of the copies for AVX2; those for AVX-512 add in another order.",
        "What every run of the tests asks for is in [coverage.md](coverage.md).",
        "The convolution itself is the library's in both columns.",
        "",
        "| operation | output | dtype | layout | backend | RMS | PyTorch's RMS | max | PyTorch's max |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line(what, mine, own) for *what, mine, own in rows()]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
