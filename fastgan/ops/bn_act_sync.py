"""bn_act with statistics over several processes (torch.distributed): the split operations of
`fastgan/ops/bn_act.py` with one collective between them.

Forward, an all-gather of each process's (mean, m2, n), combined in rank order, so that every process gets the same
bits. Backward, an all-reduce of the 2C sums; the gradients of weight and bias stay local, to be averaged with all
others by whoever trains. Batches may differ in size, and be empty on some processes.

Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.backends import Decision, choose, note
from fastgan.ops.bn_act import parameters
from fastgan.ops.bn_act_eager import apply, dense, like, stat_dtype


def combine(mean: Tensor, m2: Tensor, n: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared deviations and count `[1]` over all processes, from this one's.

    The count stays on the device. A process without values gives n = 0 and finite numbers.
    """
    own = torch.cat([mean, m2, mean.new_full((1,), float(n))])
    gathered = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(gathered, own, group=group)
    means, m2s, counts = gathered.view(-1, len(own)).split([len(mean), len(mean), 1], 1)
    count = counts.sum(0)
    # Chan's rule for all parts at once, from the first mean on: sum(n*mean)/n would lose digits where |mean| >> std.
    shift = means - means[0]
    offset = (counts * shift).sum(0) / count
    return means[0] + offset, (m2s + counts * (shift - offset).square()).sum(0), count


def total(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `sums` over all processes, in a new tensor."""
    sums = sums.clone()
    dist.all_reduce(sums, group=group)
    return sums


@torch.compiler.disable(reason="the collectives of synchronised BatchNorm run as they are")
def bn_act_sync(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    negative_slope: float,
    group: dist.ProcessGroup,
    backend: str | None,
) -> Tensor:
    """`bn_act` in training with a `process_group`; arguments as there, checked there."""
    z, mean, unbiased_var = _Synchronised.apply(dense(input), weight, bias, eps, negative_slope, group, backend)
    update_running(running_mean, running_var, mean, unbiased_var, momentum)
    return z


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, unbiased_var: Tensor, momentum: float
) -> None:
    """Not by the operation `update_running_stats`: it takes the count as a number, for which the host would wait."""
    if running_mean is not None and running_var is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(unbiased_var, alpha=momentum)


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, eps, slope, group, backend):
        backend = backend if input.numel() else "eager"
        decision, run, *_ = choose("bn_act", input, backend)
        note(
            "bn_act",
            input,
            Decision(decision.backend, f"{decision.reason}; over {dist.get_world_size(group)} processes"),
        )
        mean = m2 = input.new_zeros(input.shape[1], dtype=stat_dtype(input))
        if input.numel():
            mean, m2 = run("bn_stats", input)
        mean, m2, n = combine(mean, m2, input.numel() // input.shape[1], group)
        invstd = torch.rsqrt(m2 / n + eps)
        ctx.save_for_backward(input, weight, bias, mean, invstd, n)
        ctx.constants = (eps, slope, group, backend)
        unbiased_var = m2 / (n - 1)
        ctx.mark_non_differentiable(mean, unbiased_var)
        ctx.set_materialize_grads(False)
        return run("bn_act", input, mean, invstd, *parameters(input, weight, bias), slope), mean, unbiased_var

    @staticmethod
    def backward(ctx, dz, _mean, _var):
        input, weight, bias, mean, invstd, n = ctx.saved_tensors
        eps, slope, group, backend = ctx.constants
        needed = ctx.needs_input_grad[:3]
        if dz is None:  # on no process, as all run the same code: nobody waits for this one's sums
            return (None,) * 7
        if torch.is_grad_enabled():
            return *_linked_gradients(dz, input, weight, bias, n, eps, slope, group, needed), *[None] * 4
        dz = like(dz, input)
        run = choose("bn_act", input, backend).run
        args = (dz, input, mean, invstd, *parameters(input, weight, bias), slope)
        local = run("bn_act_reduce", *args)
        dy = None
        if needed[0]:
            # Divided by n here, where it is on the device; the kernel divides by a number.
            shares = total(torch.stack(local), group) / n
            dy = run("bn_act_backward", *args, *shares.unbind(), 1)
        affine = (s.to(p.dtype) if need else None for s, p, need in zip(local, (weight, bias), needed[1:], strict=True))
        return dy, *affine, *[None] * 4


# --- the definition, for gradients of gradients -------------------------------------------------------------------


class _Total(torch.autograd.Function):
    """`total`. So is its gradient: every process's loss depends on the sum."""

    @staticmethod
    def forward(ctx, sums, group):
        ctx.group = group
        return total(sums, group)

    @staticmethod
    def backward(ctx, gradient):
        return _Total.apply(gradient, ctx.group), None


def definition(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: Tensor | int,
    eps: float,
    slope: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """The operation in differentiable PyTorch, `n` values per channel in all."""
    others = [d for d in range(y.dim()) if d != 1]
    shape = (1, -1, *[1] * (y.dim() - 2))
    wide = y.to(stat_dtype(y))
    mean = _Total.apply(wide.sum(others), group) / n
    var = _Total.apply((wide - mean.view(shape)).square().sum(others), group) / n
    ones, zeros = parameters(y, None, None)
    return apply(
        y, mean, torch.rsqrt(var + eps), ones if weight is None else weight, zeros if bias is None else bias, slope
    )


def _linked_gradients(dz, input, weight, bias, n, eps, slope, group, needed) -> list[Tensor | None]:
    with torch.enable_grad():
        output = definition(input, weight, bias, n, eps, slope, group)
        sources = [t for t, need in zip((input, weight, bias), needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, sources, dz, create_graph=True))
    return [next(found) if need else None for need in needed]
