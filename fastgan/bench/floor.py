"""The least time that a training step could take here: its multiplications at the measured matrix peak, then its
operands once through memory at the measured bandwidth of a copy.

It is a floor for this way of computing: Winograd's F(4x4, 2x2) where the kernels use it, the convolutions of a step
that throws nothing away, BatchNorm and activation for nothing. Both parts are added, for a core that moves does not
multiply.
"""

import torch

from fastgan.bench.cases import Case, Layer, layers

WINOGRAD = 25 / 64  # multiplications left: 5 x 5 points for 4 x 4 outputs of 2 x 2 taps each
# Layers of up to so many channels on one side count as their definition. The pass that makes their large side needs a
# third fewer multiplications, which the floor leaves out: it is at most 1 % of a step.
THIN = 4
ADAM_BYTES = 28  # of a parameter in fp32: reads it, its gradient and two moments, writes all but the gradient


def passes(case: Case) -> list[tuple[Layer, int]]:
    """Each convolution of a step and how often it runs, in any of its three passes.

    The discriminator sees real images, fakes, and fakes again for the generator: three passes forward, three to the
    input (its first layer only the last time) and two to the weights. The generator has one of each.
    """
    generator, discriminator = layers(case)
    return [
        *((layer, 2 if index == 0 else 3) for index, layer in enumerate(generator)),
        *((layer, 6 if index == 0 else 8) for index, layer in enumerate(discriminator)),
    ]


def work(case: Case) -> dict[str, float]:
    """What a step has to compute and move: GFLOP of its convolutions by their definition, GFLOP that the kernels'
    algorithms leave of it, GB through memory."""
    found = {"definition GFLOP": 0.0, "GFLOP": 0.0, "GB": 0.0}
    for layer, times in passes(case):
        gflop = times * layer.gflop(case.batch_size)
        found["definition GFLOP"] += gflop
        found["GFLOP"] += gflop * (WINOGRAD if transforms(layer) else 1.0)
        found["GB"] += times * layer.gigabytes(case.batch_size, case.dtype.itemsize)
    parameters = sum(p.numel() for network in case.networks(torch.device("meta")) for p in network.parameters())
    found["GB"] += 1e-9 * ADAM_BYTES * parameters
    return found


def floor(work: dict[str, float], precision: str, peaks: dict[str, float]) -> dict[str, float]:
    """Seconds of multiplications and of memory for `work`, at the `peaks` of `machine.peaks`: of Winograd's products
    in fp32 or of the definition's in the step's own precision, whichever takes less."""
    products = min(work["GFLOP"] / peaks["fp32 GFLOP/s"], work["definition GFLOP"] / peaks[f"{precision} GFLOP/s"])
    return {"multiplications": products, "memory": work["GB"] / peaks["copy GB/s"]}


def transforms(layer: Layer) -> bool:
    """Whether Winograd's transforms apply and pay."""
    return (layer.kernel, layer.stride) == (4, 2) and min(layer.in_channels, layer.out_channels) > THIN
