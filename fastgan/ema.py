"""The exponential moving average of the generator, which is what people sample from."""

import copy

import torch
from torch import nn

from fastgan.errors import FastganError


class Ema:
    """Averages a module's parameters and running statistics over the images that it was trained on.

    Args:
        module: the network to follow; `Ema.module` is a copy in eval mode that needs no gradients.
        half_life_kimg: thousands of images after which a weight's past counts half (Karras et al., 2018,
            arXiv:1710.10196), above 0.
        ramp_up: at the start the half-life is at most this share of the images seen so far, so that the
            random initial weights do not linger (Karras et al., 2020, arXiv:2006.06676); 0 turns it off.

    Running statistics are averaged with the same weight as the parameters: those of the last step would belong to
    other weights than the averaged ones. Other buffers (counters, spectral normalisation's vectors) are copied.

    Raises:
        FastganError: a value out of range; parameters of 16 bits, in which an average of small steps stands still.
    """

    def __init__(self, module: nn.Module, half_life_kimg: float = 10.0, ramp_up: float = 0.05) -> None:
        if half_life_kimg <= 0:
            raise FastganError(f"half_life_kimg must be above 0, got {half_life_kimg}")
        if not 0 <= ramp_up <= 1:
            raise FastganError(f"ramp_up must be in [0, 1], got {ramp_up}")
        for name, parameter in module.named_parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise FastganError(f"Ema: {name} is {parameter.dtype}; expected fp32 parameters (use autocast)")
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.half_life = half_life_kimg * 1000
        self.ramp_up = ramp_up

    def decay(self, batch_size: int, images_seen: int) -> float:
        """The share of the average that stays after a step of `batch_size`, `images_seen` before it."""
        half_life = self.half_life
        if self.ramp_up:
            half_life = min(half_life, max(images_seen, batch_size) * self.ramp_up)
        return 0.5 ** (batch_size / half_life)

    def averages(self, module: nn.Module) -> dict[torch.Tensor, torch.Tensor]:
        """The average that belongs to each parameter of `module`."""
        return dict(zip(module.parameters(), self.module.parameters(), strict=True))

    @torch.no_grad()
    def update(self, module: nn.Module, batch_size: int, images_seen: int, *, parameters: bool = True) -> None:
        """Move the average towards `module` after it was trained on `batch_size` further images.

        Without `parameters` only what is none: the optimiser's step averaged them (`fastgan.optim.Adam.follow`).
        """
        share = 1.0 - self.decay(batch_size, images_seen)
        averages, currents = _running_statistics(self.module), _running_statistics(module)
        if parameters:
            averages, currents = [*self.module.parameters(), *averages], [*module.parameters(), *currents]
        if averages:
            torch._foreach_lerp_(averages, currents, share)
        done = {id(tensor) for tensor in averages}
        for average, current in zip(self.module.buffers(), module.buffers(), strict=True):
            if id(average) not in done:
                average.copy_(current)


def _running_statistics(module: nn.Module) -> list[torch.Tensor]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return [buffer for m in norms for buffer in (m.running_mean, m.running_var) if buffer is not None]
