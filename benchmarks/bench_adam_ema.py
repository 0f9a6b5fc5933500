"""Adam on all parameters of the 64-pixel generator and their moving average: beside Adam as a newcomer calls it and a
loop of `lerp_`. Tuned is torch's fused Adam and its foreach `lerp_`."""

import pytest
import torch

from fastgan.backends import use_backend, why_not
from fastgan.nn import Generator
from fastgan.ops import adam_ema

WITHOUT = ("compiled",)
DECAY = 0.999
RATES = {"lr": 2e-4, "betas": (0.5, 0.999)}


def update(provider: str, device: torch.device):
    """One update by `provider`, of parameters and gradients of its own."""
    parameters = [p.detach().to(device).clone() for p in Generator().parameters()]
    average = [p.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    if provider in ("eager", "tuned"):
        optimizer = torch.optim.Adam(parameters, **RATES, **({"fused": True} if provider == "tuned" else {}))

        def run() -> None:
            optimizer.step()
            if provider == "tuned":
                torch._foreach_lerp_(average, parameters, 1 - DECAY)
            else:
                for mean, parameter in zip(average, parameters, strict=True):
                    mean.lerp_(parameter, 1 - DECAY)

        return run
    if reason := why_not(provider, "adam_ema", device.type, torch.float32):
        pytest.skip(reason)
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    gradients, count = [p.grad for p in parameters], torch.zeros(1, device=device)
    beta1, beta2 = RATES["betas"]

    def own() -> None:
        count.add_(1)
        with use_backend(provider):
            adam_ema(
                parameters, gradients, *moments, average, count, lr=RATES["lr"], beta1=beta1, beta2=beta2,
                ema_decay=DECAY,
            )  # fmt: skip

    return own


def test_adam_ema(pair, benchmark, device, provider):
    benchmark.group = "adam_ema"
    run, reference = update(provider, device), update("eager", device)
    size = sum(p.nbytes for p in Generator().parameters())
    pair(run, reference, gigabytes=9e-9 * size)  # reads five tensors, writes four
