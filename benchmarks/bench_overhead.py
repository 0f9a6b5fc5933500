"""What a call of each public operation costs beyond the same work written by hand, on tensors of a few hundred numbers.

pytest -o addopts= benchmarks/bench_overhead.py --benchmark-only --benchmark-group-by=param:operation
`python benchmarks/bench_overhead.py` prints the difference, paired in one process, which is what to quote.

By hand: with backend "eager" the functions of torch that the definition calls; with "cpu" the same C++ kernels, called
from the least `torch.autograd.Function` that differentiates once. The difference is everything that fastgan adds in
Python: checks, the choice of the backend, the way to it, counting. Neither torch's own dispatch nor the kernels count.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F

from fastgan import library
from fastgan.ops import bn_act, conv_bn_act, gan_bce, gan_bce_generator

CPU = torch.ops.fastgan_cpu
Y = torch.randn(4, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
WEIGHT, BIAS = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
MEAN, VAR = torch.zeros(8), torch.ones(8)
FILTER = torch.randn(8, 8, 3, 3)
REAL, FAKE = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
DZ = torch.randn_like(Y)


class BnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, eps, slope):
        mean, m2 = CPU.bn_stats.default(y)
        var = m2 / (y.numel() // y.shape[1])
        invstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(y, weight, bias, mean, invstd)
        ctx.slope = slope
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return CPU.bn_act.default(y, mean, invstd, weight, bias, slope), mean, var

    @staticmethod
    def backward(ctx, dz, _mean, _var):
        y, weight, bias, mean, invstd = ctx.saved_tensors
        args = (dz, y, mean, invstd, weight, bias, ctx.slope)
        sums = CPU.bn_act_reduce.default(*args)
        return CPU.bn_act_backward.default(*args, *sums, y.numel() // y.shape[1]), *sums, None, None


class GanBce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, real, fake, real_target, fake_target):
        stats, *grads = CPU.gan_bce.default(real, fake, real_target, fake_target)
        ctx.save_for_backward(*grads)
        return stats

    @staticmethod
    def backward(ctx, dstats):
        real, fake = ctx.saved_tensors
        return real * dstats[0], fake * dstats[1], None, None


def eager_bn_act(y):
    return F.leaky_relu(F.batch_norm(y, MEAN, VAR, WEIGHT, BIAS, True, 0.1, 1e-5), 0.2, inplace=True)


def cpu_bn_act():
    z, mean, var = BnAct.apply(Y, WEIGHT, BIAS, 1e-5, 0.2)
    MEAN.mul_(0.9).add_(mean, alpha=0.1)
    VAR.mul_(0.9).add_(var, alpha=0.1 * 64 / 63)
    return z


def eager_half(x, sign):
    return -F.logsigmoid(x if sign > 0 else -x).mean(), x.detach().sigmoid().mean()


def cpu_gan_bce():
    loss_real, loss_fake, d_real, d_fake = GanBce.apply(REAL, FAKE, 1.0, 0.0).unbind()
    return loss_real, loss_fake, d_real.detach(), d_fake.detach()


def backward_of(output, *inputs) -> Callable[[], object]:
    return lambda: torch.autograd.grad(output, inputs, DZ if output.dim() else None, retain_graph=True)


def pairs() -> dict[str, tuple[Callable, Callable]]:
    """{operation: (the public function, the same by hand)}"""
    library.load("cpu")
    norm = (MEAN, VAR, WEIGHT, BIAS)
    return {
        "bn_act eager": (lambda: bn_act(Y, *norm, training=True, backend="eager"), lambda: eager_bn_act(Y)),
        "bn_act default": (lambda: bn_act(Y, *norm, training=True), lambda: eager_bn_act(Y)),
        "bn_act cpu": (lambda: bn_act(Y, *norm, training=True, backend="cpu"), cpu_bn_act),
        "bn_act cpu backward": (
            backward_of(bn_act(Y, None, None, WEIGHT, BIAS, training=True, backend="cpu"), Y, WEIGHT, BIAS),
            backward_of(cpu_bn_act(), Y, WEIGHT, BIAS),
        ),
        "conv_bn_act eager": (
            lambda: conv_bn_act(Y, FILTER, *norm, padding=1, training=True, backend="eager"),
            lambda: eager_bn_act(F.conv2d(Y, FILTER, padding=1)),
        ),
        "gan_bce eager": (
            lambda: gan_bce(REAL, FAKE, backend="eager"),
            lambda: (eager_half(REAL, 1), eager_half(FAKE, -1)),
        ),
        "gan_bce cpu": (lambda: gan_bce(REAL, FAKE, backend="cpu"), cpu_gan_bce),
        "gan_bce cpu backward": (
            backward_of(sum(gan_bce(REAL, FAKE, backend="cpu")[:2]), REAL, FAKE),
            backward_of(sum(cpu_gan_bce()[:2]), REAL, FAKE),
        ),
        "gan_bce_generator eager": (lambda: gan_bce_generator(FAKE, backend="eager"), lambda: eager_half(FAKE, 1)),
    }


@pytest.mark.benchmark(group="overhead")
@pytest.mark.parametrize("written", ["fastgan", "by hand"])
@pytest.mark.parametrize("operation", pairs())
def test_overhead(benchmark, operation, written):
    benchmark(pairs()[operation][written == "by hand"])


def microseconds(call: Callable, times: int = 20) -> float:
    start = perf_counter()
    for _ in range(times):
        call()
    return (perf_counter() - start) / times * 1e6


def main(rounds: int = 200) -> None:
    torch.set_num_threads(1)
    print(f"{'microseconds a call':24} fastgan  by hand  added: median (quartiles), least")
    for name, (public, by_hand) in pairs().items():
        found = [(microseconds(public), microseconds(by_hand)) for _ in range(rounds)][rounds // 10 :]
        ours, theirs = (list(column) for column in zip(*found, strict=True))
        added = sorted(a - b for a, b in found)
        quartiles = f"({added[len(added) // 4]:.1f} to {added[3 * len(added) // 4]:.1f}), {min(ours) - min(theirs):.1f}"
        print(f"{name:24} {median(ours):7.1f} {median(theirs):8.1f}  {median(added):6.1f} {quartiles}")


if __name__ == "__main__":
    main()
