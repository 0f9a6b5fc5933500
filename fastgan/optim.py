"""Optimisers by name, one pass over memory for all parameters, and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastgan import backends
from fastgan.errors import FastganError
from fastgan.ops.adam_ema import adam_ema

OPTIMIZERS = ("adam", "adamw", "sgd")
DECAYS = ("none", "cosine")


class Adam(torch.optim.Adam):
    """`torch.optim.Adam(fused=True)` by `fastgan.ops.adam_ema`, which can average the parameters in the same pass.

    Its state_dict is that of `torch.optim.Adam`, in both directions.

    Args:
        params, lr, betas, eps, weight_decay, decoupled_weight_decay: torch.optim.Adam's; with the last, AdamW.
    """

    _together: bool | None = None  # whether all parameters have had the same number of updates; None: to be seen
    _averages: dict[Tensor, Tensor] | None = None
    _decay = 1.0

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=decoupled_weight_decay
        )

    def follow(self, averages: dict[Tensor, Tensor], decay: float) -> None:
        """In the next step, once: average = decay * average + (1 - decay) * parameter, for each pair of `averages`."""
        self._averages, self._decay = averages, decay

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._together = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update; a parameter without a gradient stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        averages, self._averages = self._averages or {}, None
        left = dict(averages)
        for group in self.param_groups:
            for param in self._update(group, averages):
                left.pop(param, None)
        if left:
            torch._foreach_lerp_(list(left.values()), list(left), 1 - self._decay)
        return loss

    def _update(self, group: dict, averages: dict[Tensor, Tensor]) -> list[Tensor]:
        """Update the parameters of a group; returns those whose averages were updated with them."""
        started = sum(bool(self.state.get(param)) for param in group["params"])
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)  # type: ignore[attr-defined]
        if not params:
            return []
        if len(params) < len(group["params"]) or 0 < started < len(group["params"]):
            self._together = False
        elif self._together is None:
            self._together = started == 0 or len({float(step) for step in steps}) == 1
        scale, infinite = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # of torch's GradScaler
        beta1, beta2 = group["betas"]
        numbers = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        numbers |= {"weight_decay": group["weight_decay"]}
        decoupled = group["decoupled_weight_decay"]
        if not self._together or scale is not None or infinite is not None:
            adam(
                params, grads, exp_avgs, exp_avg_sqs, [], steps, **numbers, amsgrad=False, maximize=False, fused=True,
                grad_scale=scale, found_inf=infinite, decoupled_weight_decay=decoupled,
            )  # fmt: skip
            return []
        torch._foreach_add_(steps, 1)
        ema = [averages[param] for param in params if param in averages]
        ema = ema if len(ema) == len(params) else []
        adam_ema(
            params, grads, exp_avgs, exp_avg_sqs, ema, steps[0], **numbers, decoupled=decoupled,
            ema_decay=self._decay if ema else 1.0, backend=_backend(params[0]),
        )  # fmt: skip
        return params if ema else []


def _backend(param: Tensor) -> str | None:
    """A backend that is forced for the networks and has no kernel for the optimiser leaves it to the definition."""
    forced = backends.requested(None)
    if forced is None or backends.why_not(forced, "adam_ema", param.device.type, param.dtype) is None:
        return forced
    return "eager"


def make_optimizer(
    parameters: Iterable[Tensor],
    name: str = "adam",
    *,
    lr: float,
    betas: tuple[float, float] = (0.5, 0.999),
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """`adam`, `adamw` or `sgd` over `parameters`: `Adam` of this module, or torch's fused SGD.

    Args:
        lr: step size, above 0.
        betas: of Adam and AdamW. 0.5 is DCGAN's choice; the 0.9 of classifiers lets G and D chase each other.
        momentum: of SGD.
        weight_decay: added to the gradient by `adam` and `sgd`, decoupled in `adamw`.
    """
    if lr <= 0:
        raise FastganError(f"learning rate must be above 0, got {lr}")
    if name in ("adam", "adamw"):
        decoupled = name == "adamw"
        return Adam(parameters, lr, betas, weight_decay=weight_decay, decoupled_weight_decay=decoupled)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    raise FastganError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")


def lr_scale(kimg: float, *, total_kimg: float, warmup_kimg: float = 0.0, decay: str = "none") -> float:
    """The factor on the learning rate after `kimg` thousand images: linear warm-up, then constant or a half cosine.

    A pure function of the position, so that nothing of it needs saving. In [0, 1]: 0 is the cosine's end, and the
    first step of a warm-up counts as 1e-3 kimg, so that it moves.
    """
    if decay not in DECAYS:
        raise FastganError(f"lr_decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if kimg < warmup_kimg:
        return min(max(kimg, 1e-3) / warmup_kimg, 1.0)
    if decay == "none" or total_kimg <= warmup_kimg:
        return 1.0
    progress = min((kimg - warmup_kimg) / (total_kimg - warmup_kimg), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
