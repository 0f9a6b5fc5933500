"""Errors of the Triton kernels beside PyTorch's own, against the fp64 definition: `python benchmarks/error_table.py`.

On a machine without a card the kernels run in the mended interpreter of `tests/interpreter.py`. The rows are outputs of
the public operations, forward and backward, so that PyTorch's own implementation is what a user would have run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import torch.nn.functional as F
from torch import Tensor
from triton_device import DEVICE

from fastgan.ops import bn_act, gan_bce
from fastgan.tolerance import errors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def bn_act_results(x: Tensor, weight: Tensor, bias: Tensor, dz: Tensor, backend: str | None) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    if backend is None:
        z = F.leaky_relu(F.batch_norm(leaves[0], None, None, *leaves[1:], True), 0.2)
    else:
        z = bn_act(leaves[0], None, None, *leaves[1:], training=True, backend=backend)
    gradients = torch.autograd.grad(z, leaves, dz.to(z.dtype))
    return dict(zip(("z", "dx", "dweight", "dbias"), (z.detach(), *gradients), strict=True))


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


def rows():
    """(operation, output, dtype, layout, errors of Triton, errors of PyTorch)"""
    for name, dtype in DTYPES.items():
        for layout, memory in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
            torch.manual_seed(0)
            x = (2 * torch.randn(8, 32, 12, 12) + 1).to(DEVICE, dtype).to(memory_format=memory)
            weight, bias, dz = torch.randn(32).to(DEVICE), torch.randn(32).to(DEVICE), torch.randn_like(x)
            v = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
            args = (x, weight, bias, torch.where(v.abs() < 1e-4, 0, dz))
            yield from _compare("bn_act", bn_act_results, args, name, layout)
        torch.manual_seed(0)
        args = tuple((5 * torch.randn(1024)).to(DEVICE, dtype) for _ in range(2))
        yield from _compare("gan_bce", gan_bce_results, args, name, "any")


def _compare(operation, results, args, dtype, layout):
    got, own, truth = results(*args, "triton"), results(*args, None), results(*(a.double() for a in args), None)
    for output in got:
        yield operation, output, dtype, layout, errors(got[output], truth[output]), errors(own[output], truth[output])


def main() -> None:
    print(f"Triton on {DEVICE}" + (" (interpreter)" if DEVICE == "cpu" else "") + f", PyTorch {torch.__version__}\n")
    print("| operation | output | dtype | layout | Triton RMS | PyTorch RMS | Triton max | PyTorch max |")
    print("|---|---|---|---|---|---|---|---|")
    for operation, output, dtype, layout, mine, own in rows():
        numbers = " | ".join(f"{value:.2e}" for value in (mine.rms, own.rms, mine.max, own.max))
        print(f"| {operation} | {output} | {dtype} | {layout} | {numbers} |")


if __name__ == "__main__":
    main()
