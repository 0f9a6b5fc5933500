"""gan_bce: the binary cross-entropy losses of a GAN from logits, with D(x) and D(G(z)), in one pass.
 With p = sigmoid(x) and target t, the mean over a batch of -t*log(p) - (1-t)*log(1-p) and its gradient (p -
t)/n. With targets 1 and 0 the two halves add up to -V(D, G) of Goodfellow et al., "Generative Adversarial
Nets", 2014, which the discriminator minimises. Computed from logits in fp32 (fp64 for fp64), so that logits
of +-100 are harmless; autocast does not change that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.backends import choose, chosen, count, define, is_plain
from fastgan.ops._library import direct, gradient_of_gradient, is_heard, register


def gan_bce(
    real_logits: Tensor | None,
    fake_logits: Tensor | None,
    *,
    real_target: float = 1.0,
    fake_target: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Both halves of the discriminator's loss, and what it believes.

    Args:
        real_logits, fake_logits: D's outputs before the sigmoid, of any shape; fp32, fp16, bf16 or fp64. One
            of them may be None.
        real_target, fake_target: in [0, 1]; 0.9 and 0 is one-sided label smoothing.
        backend: None (the best that is proved), "eager", "cpu", "triton" or "cuda".

    Returns:
        loss_real, loss_fake, D(x), D(G(z)): scalars in fp32 (fp64 for fp64 logits); D(x) and D(G(z)), the
        means of the sigmoids, are detached. None for an absent half. The losses are differentiable any number
        of times.
        Kept for backward: the logits and one fp32 number for each.

    Raises:
        ValueError: both halves are None, they differ in dtype or device, or are no floating tensors; a target is
            outside of [0, 1].
        BackendError: the backend that was asked for cannot run.
    """
    first = real_logits if real_logits is not None else fake_logits
    if first is None:
        raise ValueError("gan_bce: expected real_logits, fake_logits or both, got None and None")
    second = first if fake_logits is None else fake_logits
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and first.is_floating_point()):
        raise ValueError(f"gan_bce: logits must be floating tensors, got {_text(first)} and {_text(second)}")
    if not (0.0 <= real_target <= 1.0 and 0.0 <= fake_target <= 1.0):
        raise ValueError(
            f"gan_bce: targets must be in [0, 1], got real_target={real_target}, fake_target={fake_target}"
        )
    if second is not first and (second.dtype != first.dtype or second.device != first.device):
        raise ValueError(
            f"gan_bce: real_logits are {first.dtype} on {first.device}, "
            f"fake_logits {second.dtype} on {second.device}; expected the same"
        )
    choice = chosen("gan_bce", first, backend)
    if choice.definition or second.numel() == 0:
        count("eager", "gan_bce")
        loss_real, d_real = _half(real_logits, real_target)
        loss_fake, d_fake = _half(fake_logits, fake_target)
        return loss_real, loss_fake, d_real, d_fake
    real = None if real_logits is None else real_logits.contiguous()
    fake = None if fake_logits is None else fake_logits.contiguous()
    if choice.plain and not is_heard():
        losses = _Losses.apply(choice.run, real, fake, real_target, fake_target)
    else:
        stats, _, _ = torch.ops.fastgan.gan_bce(real, fake, real_target, fake_target, choice.asked)
        loss_real, loss_fake, d_real, d_fake = stats.unbind()
        losses = (loss_real, loss_fake, d_real.detach(), d_fake.detach())
    if real is not None and fake is not None:
        return losses
    return (losses[0], None, losses[2], None) if fake is None else (None, losses[1], None, losses[3])


def gan_bce_generator(
    fake_logits: Tensor, *, saturating: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The generator's loss: -log D(G(z)), or with `saturating` the minimax log(1 - D(G(z))), which it
    minimises.

    Both are the fake half of `gan_bce`: with target 1, or the negative of that with target 0.

    Args, errors: as in `gan_bce`.

    Returns:
        loss and D(G(z)) (detached): scalars in fp32 (fp64 for fp64 logits).
    """
    target = 0.0 if saturating else 1.0
    _, loss, _, d_fake = gan_bce(None, fake_logits, fake_target=target, backend=backend)
    assert loss is not None
    assert d_fake is not None
    return (-loss if saturating else loss), d_fake


def _text(logits: object) -> str:
    return str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__


def _stat_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _half(logits: Tensor | None, target: float) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The definition: mean loss and mean sigmoid of one half, in plain PyTorch."""
    if logits is None:
        return None, None
    dtype = _stat_dtype(logits)
    x = logits if logits.dtype == dtype else logits.to(dtype)  # asking first is quicker than what changes nothing
    return bce(x, target), x.detach().sigmoid().mean()


def bce(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) against one `target` in [0, 1] for all, in plain PyTorch."""
    if target in (0.0, 1.0):
        return -F.logsigmoid(logits if target else -logits).mean()
    return -(target * F.logsigmoid(logits) + (1.0 - target) * F.logsigmoid(-logits)).mean()


def _some(real: Tensor | None, fake: Tensor | None) -> Tensor:
    some = fake if real is None else real
    assert some is not None
    return some


def _definition(real: Tensor | None, fake: Tensor | None, real_target: float, fake_target: float) -> Tensor:
    """[loss_real, loss_fake, D(x), D(G(z))]; zeros for an absent half."""
    some = _some(real, fake)
    zero = some.new_zeros((), dtype=_stat_dtype(some))
    losses, means = zip(_half(real, real_target), _half(fake, fake_target), strict=True)
    return torch.stack([zero if value is None else value for value in (*losses, *means)])


def _eager(real: Tensor | None, fake: Tensor | None, real_target: float, fake_target: float):
    grads = []
    for x, target in ((real, real_target), (fake, fake_target)):
        if x is None:
            some = _some(real, fake)
            grads.append(some.new_empty(0, dtype=_stat_dtype(some)))
        else:
            grads.append((x.to(_stat_dtype(x)).sigmoid() - target) / x.numel())
    return _definition(real, fake, real_target, fake_target), *grads


define("gan_bce", {"gan_bce": _eager}, by_elements=True)


# --- fastgan::gan_bce and its gradient ------------------------------------------------------------


def _forward(real, fake, real_target, fake_target, backend):
    return choose("gan_bce", _some(real, fake), backend).run("gan_bce", real, fake, real_target, fake_target)


def _forward_fake(real, fake, real_target, fake_target, backend):
    first = _some(real, fake)
    dtype = _stat_dtype(first)
    grads = (first.new_empty(0, dtype=dtype) if x is None else torch.empty_like(x, dtype=dtype) for x in (real, fake))
    return first.new_empty(4, dtype=dtype), *grads


def _backward(dstats, grad_real, grad_fake, real, fake, real_target, fake_target):
    """The stored gradients times the losses' cotangents, in the logits' dtype."""
    halves = ((real, grad_real, dstats[0]), (fake, grad_fake, dstats[1]))
    return tuple(g.new_empty(0) if x is None else _narrowed(d * g, x) for x, g, d in halves)


def _narrowed(gradient: Tensor, logits: Tensor) -> Tensor:
    return gradient if gradient.dtype == logits.dtype else gradient.to(logits.dtype)


def _backward_fake(dstats, grad_real, grad_fake, real, fake, real_target, fake_target):
    halves = ((real, grad_real), (fake, grad_fake))
    return tuple(g.new_empty(0) if x is None else torch.empty_like(x) for x, g in halves)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, real, fake, real_target, fake_target, backend):
        stats, grad_real, grad_fake = compute(real, fake, real_target, fake_target, backend)
        ctx.save_for_backward(grad_real, grad_fake, real, fake)
        ctx.targets = real_target, fake_target
        ctx.mark_non_differentiable(grad_real, grad_fake)
        ctx.set_materialize_grads(False)
        return stats, grad_real, grad_fake

    @staticmethod
    def backward(ctx, dstats, _real, _fake):
        if dstats is None:
            return (None,) * 6
        grads = torch.ops.fastgan.gan_bce_grad(dstats, *ctx.saved_tensors, *ctx.targets)
        return (
            None,
            *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[1:3], strict=True)),
            None,
            None,
            None,
        )


class _Losses(torch.autograd.Function):
    """`_Forward` without the dispatcher: each loss is an output of its own, and nothing is taken apart afterwards."""

    @staticmethod
    def forward(ctx, run, real, fake, real_target, fake_target):
        stats, grad_real, grad_fake = run("gan_bce", real, fake, real_target, fake_target)
        ctx.save_for_backward(grad_real, grad_fake, real, fake)
        ctx.targets = real_target, fake_target
        losses = stats.unbind()
        ctx.mark_non_differentiable(*losses[2:])
        ctx.set_materialize_grads(False)
        return losses

    @staticmethod
    def backward(ctx, dreal, dfake, *_):
        grad_real, grad_fake, real, fake = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a gradient of this gradient
            zero = grad_real.new_zeros((), dtype=_stat_dtype(_some(real, fake)))
            dstats = torch.stack([zero if d is None else d for d in (dreal, dfake, None, None)])
            plain = is_plain(dstats, real, fake) and not is_heard()
            ops = direct if plain else torch.ops.fastgan
            grads = ops.gan_bce_grad(dstats, grad_real, grad_fake, real, fake, *ctx.targets)
            return None, *(g if x is not None else None for g, x in zip(grads, (real, fake), strict=True)), None, None
        _, needs_real, needs_fake, *_ = ctx.needs_input_grad
        return (
            None,
            _narrowed(dreal * grad_real, real) if needs_real and dreal is not None else None,
            _narrowed(dfake * grad_fake, fake) if needs_fake and dfake is not None else None,
            None,
            None,
        )


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, dstats, grad_real, grad_fake, real, fake, real_target, fake_target):
        ctx.save_for_backward(dstats, real, fake)
        ctx.targets = real_target, fake_target
        ctx.set_materialize_grads(False)
        return compute(dstats, grad_real, grad_fake, real, fake, real_target, fake_target)

    @staticmethod
    def backward(ctx, *cotangents):
        dstats, real, fake = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (1, 4, 5)]

        def definition(real, fake):
            return _definition(real, fake, *ctx.targets)

        d, r, f = gradient_of_gradient(definition, (dstats, real, fake), cotangents, wanted, dstats.dtype)
        return None, d, None, None, r, f, None, None


register(
    "gan_bce(Tensor? real_logits, Tensor? fake_logits, float real_target, float fake_target, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _Forward,
)
register(
    "gan_bce_grad(Tensor grad_stats, Tensor grad_real, Tensor grad_fake, Tensor? real_logits, "
    "Tensor? fake_logits, float real_target, float fake_target) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    _Backward,
)
