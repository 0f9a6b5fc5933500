"""adam_ema: Adam or AdamW on all parameters of a network, and the EMA of the parameters, in one pass over memory.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015; Loshchilov and Hutter, "Decoupled Weight Decay
Regularization", 2019. Exactly torch's fused optimiser followed by `ema.lerp_(param, 1 - ema_decay)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.backends import choose, define, requested, run
from fastgan.ops._library import register


def adam_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ema_decay: float = 1.0,
    backend: str | None = None,
) -> None:
    """One optimiser step, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: one tensor of each per parameter, of one shape, dtype, device and
            strides; the kernels take fp32, the definition also fp64, fp16 and bf16. grads is only read.
        ema_params: likewise, or empty for no EMA.
        step: fp32 `[1]` on the parameters' device: how many updates there were, this one included. The caller
            adds 1 before; as a tensor it may live in a CUDA graph.
        lr, beta1, beta2, eps, weight_decay: Adam's; see `decoupled`.
        decoupled: AdamW (param *= 1 - lr * weight_decay) instead of Adam's L2 (grad += weight_decay * param).
        ema_decay: in [0, 1]; ema = ema_decay * ema + (1 - ema_decay) * param, with the updated parameter.
        backend: None (the best that is proved), "eager", "cpu", "triton" or "cuda".

    Not differentiable. Makes no copy of anything.

    Raises:
        ValueError: the lists differ in length, or a tensor differs from its parameter.
        BackendError: the backend that was asked for cannot run.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"ema_params": ema_params} if len(ema_params) else {}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adam_ema: {name} must have one tensor per parameter, {len(params)}, got {len(tensors)}")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape or tensor.dtype != param.dtype or tensor.device != param.device:
                raise ValueError(f"adam_ema: {name}[{i}] must be like params[{i}], {_text(param)}, got {_text(tensor)}")
    if not params:
        return
    torch.ops.fastgan.adam_ema(
        params, grads, exp_avgs, exp_avg_sqs, ema_params, step,
        lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay, requested(backend),
    )  # fmt: skip


def _text(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _definition(
    params, grads, exp_avgs, exp_avg_sqs, ema_params, step,
    lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay,
) -> None:  # fmt: skip
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    steps = [step.float().reshape(())] * len(params)
    fused(
        params, grads, exp_avgs, exp_avg_sqs, [], steps,
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if ema_params:
        torch._foreach_lerp_(ema_params, params, 1 - ema_decay)


define("adam_ema", {"adam_ema": _definition})


def _run(params, *rest) -> None:
    *args, backend = rest
    run(choose("adam_ema", params[0], backend), "adam_ema", params, *args)


register(
    "adam_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] ema_params, Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool decoupled, float ema_decay, str? backend) -> ()",
    _run,
    lambda *_: None,
)
