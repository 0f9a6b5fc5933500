"""The competitors for a whole training step, from PyTorch's own example to fastgan."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan.backends import use_backend, why_not
from fastgan.bench.cases import Case
from fastgan.nn import Discriminator, Generator
from fastgan.optim import make_optimizer
from fastgan.step import GanStep

LEARNING_RATE = 2e-4


class Provider(NamedTuple):
    """One way to run a case's step: `make(case, device)` returns it ready to call, `backend` is forced around it."""

    make: Callable[[Case, torch.device], Callable[[], Any]]
    backend: str | None
    what: str

    def step(self, case: Case, device: torch.device) -> Callable[[], None]:
        """The step on the case's own images."""
        made = self.make(case, device)

        def run() -> None:
            with use_backend(self.backend):
                made()

        return run


def providers(device: torch.device, options: bool = False) -> dict[str, Provider]:
    """The competitors on `device` by name, the stock example first; backends that cannot run there are left out.
    `options` adds fastgan with each option that trades time and memory."""
    found = {
        "stock": Provider(stock, "eager", "the step of PyTorch's DCGAN example: contiguous tensors, every gradient"),
        "tuned": Provider(tuned, "eager", "eager, channels-last, no gradient that is thrown away, fused Adam"),
        "compiled": Provider(compiled, "eager", "the tuned step with both networks through torch.compile"),
        "fastgan": Provider(own, None, "fastgan as it comes"),
    }
    if device.type == "cuda":  # where one is taken by itself, and others can be asked for
        for backend in ("triton", "cuda"):
            if why_not(backend, device="cuda", dtype=torch.float32) is None:
                found[f"fastgan {backend}"] = Provider(own, backend, f"fastgan with the backend {backend} forced")
    if options:
        found["fastgan apart"] = Provider(apart, None, "fastgan, real and fake images as two batches")
        found["fastgan recomputing"] = Provider(recomputing, None, "fastgan, D's first convolution computed again")
    return found


def stock(case: Case, device: torch.device) -> Callable[[], Any]:
    """Every backward pass computes all gradients of the networks that it goes through."""
    generator, discriminator = (_plain(network) for network in case.networks(device))
    opt_g, opt_d = (torch.optim.Adam(n.parameters(), LEARNING_RATE, (0.5, 0.999)) for n in (generator, discriminator))
    ones, zeros = (torch.full((case.batch_size,), value, device=device) for value in (1.0, 0.0))
    real, loss = case.images(device), nn.BCELoss()

    def belief(images: Tensor) -> Tensor:
        with _precision(case, device):
            logits = discriminator(images)
        return logits.float().sigmoid()

    def step() -> None:
        opt_d.zero_grad()
        loss(belief(real), ones).backward()
        with _precision(case, device):
            fake = generator(torch.randn(case.batch_size, case.latent_dim, device=device))
        loss(belief(fake.detach()), zeros).backward()
        opt_d.step()
        opt_g.zero_grad()
        loss(belief(fake), ones).backward()
        opt_g.step()

    return step


def tuned(case: Case, device: torch.device) -> Callable[[], Any]:
    return _gan_step(case, device, *(_plain(network) for network in case.networks(device)))


def compiled(case: Case, device: torch.device) -> Callable[[], Any]:
    torch.compiler.reset()  # dynamo counts recompilations by code, over all cases, and would turn eager after a few
    generator, discriminator = (_plain(network) for network in case.networks(device))
    return _gan_step(case, device, generator, discriminator, wrap=torch.compile)


def own(case: Case, device: torch.device) -> Callable[[], Any]:
    return _gan_step(case, device, *case.networks(device))


def apart(case: Case, device: torch.device) -> Callable[[], Any]:
    return _gan_step(case, device, *case.networks(device), joint=False)


def recomputing(case: Case, device: torch.device) -> Callable[[], Any]:
    generator, discriminator = case.networks(device)
    discriminator.main.recompute_first = True
    return _gan_step(case, device, generator, discriminator)


def _plain(network: Generator | Discriminator) -> nn.Module:
    """The same modules in a plain `nn.Sequential`: nothing of fastgan in their way."""
    network.main = nn.Sequential(*network.main)  # type: ignore[assignment]
    return network


def _gan_step(case: Case, device: torch.device, generator, discriminator, wrap=lambda network: network, **options):
    """`GanStep` as the trainer makes it: channels-last, fused Adam."""
    networks = [network.to(memory_format=torch.channels_last) for network in (generator, discriminator)]
    optimizers = [make_optimizer(network.parameters(), lr=LEARNING_RATE) for network in networks]
    autocast = None if case.precision == "fp32" else case.dtype
    step = GanStep(*map(wrap, networks), *optimizers, latent_dim=case.latent_dim, autocast=autocast, **options)
    real = case.images(device).contiguous(memory_format=torch.channels_last)
    return lambda: step(real)


def _precision(case: Case, device: torch.device) -> AbstractContextManager:
    return nullcontext() if case.precision == "fp32" else torch.autocast(device.type, case.dtype)
