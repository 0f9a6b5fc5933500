"""adam_ema: Adam or AdamW on all parameters of a network, and the EMA of the parameters, in one pass over memory.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015; Loshchilov and Hutter, "Decoupled Weight Decay
Regularization", 2019. Exactly torch's fused optimiser followed by `ema.lerp_(param, 1 - ema_decay)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import first_use
from fastgan.backends import choose, count, decide_on_cpu, define, kernel, requested
from fastgan.errors import BackendError
from fastgan.ops._library import register
from fastgan.tolerance import misses


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
            strides; without gaps in memory; the kernels take fp32 (the CPU's also fp64), the definition also fp16 and
            bf16. grads is only read.
        ema_params: likewise, or empty for no EMA.
        step: fp32 `[1]` on the parameters' device: how many updates there were, this one included. The caller
            adds 1 before; as a tensor it may live in a CUDA graph.
        lr, beta1, beta2, eps, weight_decay: Adam's; see `decoupled`.
        decoupled: AdamW (param *= 1 - lr * weight_decay) instead of Adam's L2 (grad += weight_decay * param).
        ema_decay: in [0, 1]; ema = ema_decay * ema + (1 - ema_decay) * param, with the updated parameter.
        backend: None (the best that is proved), "eager", "cpu", "triton" or "cuda".

    Not differentiable. Makes no copy of anything.

    Raises:
        ValueError: the lists differ in length, a tensor differs from its parameter, or a parameter has gaps in memory.
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
            if tensor.stride() != param.stride() and _strides(tensor) != _strides(param):
                raise ValueError(
                    f"adam_ema: {name}[{i}] must have the strides of params[{i}], {param.stride()}, "
                    f"got {tensor.stride()}"
                )
    for i, param in enumerate(params):
        # torch's fused kernel walks memory, gaps included, and says nothing.
        if not (param.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(param)):
            raise ValueError(
                f"adam_ema: params[{i}] must fill its memory without gaps, got shape {list(param.shape)} with strides "
                f"{param.stride()}; use a copy"
            )
    if not params:
        return
    torch.ops.fastgan.adam_ema(
        params, grads, exp_avgs, exp_avg_sqs, ema_params, step,
        lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay, requested(backend),
    )  # fmt: skip


def _text(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _strides(tensor: Tensor) -> list[int]:
    """Those that matter."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _definition(
    params, grads, exp_avgs, exp_avg_sqs, ema_params, step,
    lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay,
) -> None:  # fmt: skip
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    updates = step.float().reshape(())
    for dtype in dict.fromkeys(param.dtype for param in params):  # on CUDA a fused launch takes tensors of one
        of_one = [i for i, param in enumerate(params) if param.dtype == dtype]
        group, *rest = [[tensors[i] for i in of_one] for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
        fused(  # type: ignore[call-overload]
            group, *rest, [], [updates] * len(of_one),
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        if ema_params:
            torch._foreach_lerp_([ema_params[i] for i in of_one], group, 1 - ema_decay)


define("adam_ema", {"adam_ema": _definition}, by_elements=True)


# What the kernels take; anything else is the definition's.
_KERNEL_DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)}


def _decide(params: Sequence[Tensor], backend: str | None) -> str:
    first = params[0]
    if backend is None and first.device.type == "cpu":
        elements = sum(p.numel() for p in params)
        name = decide_on_cpu("adam_ema", first.dtype, "contiguous", (elements,)).backend
    else:
        name = choose("adam_ema", first, backend).decision.backend
    if name == "eager":
        return name
    if any(p.dtype not in _KERNEL_DTYPES[name] or p.dtype != first.dtype for p in params):
        if backend is None:
            return "eager"
        takes = " or ".join(str(dtype) for dtype in _KERNEL_DTYPES[name])
        got = ", ".join(sorted({str(p.dtype) for p in params}))
        raise BackendError(f"kernel adam_ema of backend '{name}' takes parameters of one dtype, {takes}, got {got}")
    return name


def _run(params, *rest) -> None:
    *args, backend = rest
    name = _decide(params, backend)
    if name != "eager" and params[0].is_cuda and (reason := _mistrust(name, params, *args)) is not None:
        if backend is not None:
            raise BackendError(first_use.disabled(name, "adam_ema", reason))
        name = "eager"
    count(name, "adam_ema")
    kernel(name, "adam_ema")(params, *args)


_verdicts: dict[tuple, str | None] = {}


def _mistrust(name: str, *args) -> str | None:
    """Why the kernel must not run: it missed the definition on copies of the arguments, asked once per device."""
    first = args[0][0]
    key = (name, first.device, first.dtype)
    if key not in _verdicts:
        if torch.cuda.is_current_stream_capturing():
            return first_use.NOT_YET
        got, own = _updated(name, args, None), _updated("eager", args, None)
        reason = _verdicts[key] = misses(got, own, _updated("eager", args, torch.float64))
        if reason is not None:
            first_use.warn_of(name, "adam_ema", str(first.device), reason)
    return _verdicts[key]


def _updated(name: str, args, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """The four kinds of state after the update of copies, each in one vector."""
    lists = [[t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in args[:5]]
    kernel(name, "adam_ema")(*lists, *args[5:])
    params, _, *states = lists
    return tuple(torch.cat([t.flatten() for t in tensors]) for tensors in (params, *states) if tensors)


register(
    "adam_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] ema_params, Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool decoupled, float ema_decay, str? backend) -> ()",
    _run,
    lambda *_: None,
)
