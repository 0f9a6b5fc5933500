"""What a call of each public operation costs beyond the same work written by hand, on tensors of a few hundred numbers.

pytest -o addopts= benchmarks/bench_overhead.py --benchmark-only --benchmark-group-by=param:operation
`python benchmarks/bench_overhead.py` prints the difference, paired in one process, which is what to quote.

**Added Python** is a call of the public function minus the same work by hand, median over pairs of calls that follow
each other. By hand is the shortest Python that runs the same kernels with the same arguments and results, ready for one
backward: with backend "eager" the functions of torch.nn.functional that the definition stands for, in its order; with
"cpu" the same C++ operators, called from the least `torch.autograd.Function` that can be differentiated once. Kernels,
allocations and autograd's own work are thus in both columns, and what is left is fastgan's: checks, the choice of the
backend, the way to it, counting, version counters, what second gradients need.

Rows named "or eager" have PyTorch's own functions on the right: what it costs, or saves, to take the CPU kernels on a
tensor so small that only calls count. Below stand the floors, costs of torch that both columns of the "cpu" rows have:
of entering and leaving a custom function that computes nothing, and of calling an operator.
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
OUTPUT = torch.empty_like(DZ)


class BnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, running_mean, running_var, momentum, eps, slope):
        z, mean, var = CPU.bn_act_train.default(y, weight, bias, running_mean, running_var, momentum, eps, slope)
        ctx.save_for_backward(y, weight, bias, mean, var)
        ctx.constants = eps, slope
        return z

    @staticmethod
    def backward(ctx, dz):
        return *CPU.bn_act_grad.default(dz, *ctx.saved_tensors, *ctx.constants, True, True, True), *[None] * 5


class GanBce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, real, fake, real_target, fake_target):
        stats, *grads = CPU.gan_bce.default(real, fake, real_target, fake_target)
        ctx.save_for_backward(*grads)
        losses = stats.unbind()
        ctx.mark_non_differentiable(*losses[2:])
        ctx.set_materialize_grads(False)
        return losses

    @staticmethod
    def backward(ctx, dreal, dfake, *_):
        real, fake = ctx.saved_tensors
        return dreal * real, dfake * fake, None, None


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias):
        ctx.save_for_backward(y, weight, bias)
        return OUTPUT

    @staticmethod
    def backward(ctx, dz):
        return ctx.saved_tensors


def eager_bn_act(y, mean=MEAN, var=VAR):
    return F.leaky_relu(F.batch_norm(y, mean, var, WEIGHT, BIAS, True, 0.1, 1e-5), 0.2, inplace=True)


def cpu_bn_act():
    return BnAct.apply(Y, WEIGHT, BIAS, MEAN, VAR, 0.1, 1e-5, 0.2)


def eager_half(x, sign):
    return -F.logsigmoid(x if sign > 0 else -x).mean(), x.detach().sigmoid().mean()


def eager_gan_bce():
    (loss_real, d_real), (loss_fake, d_fake) = eager_half(REAL, 1), eager_half(FAKE, -1)
    return loss_real, loss_fake, d_real, d_fake


def cpu_gan_bce():
    return GanBce.apply(REAL, FAKE, 1.0, 0.0)


def backward_of(output, *inputs) -> Callable[[], object]:
    return lambda: torch.autograd.grad(output, inputs, DZ if output.dim() else None, retain_graph=True)


def pairs() -> dict[str, tuple[Callable, Callable]]:
    """{operation: (the public function, the same by hand)}"""
    library.load("cpu")
    cpu = lambda: bn_act(Y, MEAN, VAR, WEIGHT, BIAS, training=True, backend="cpu")  # noqa: E731
    cpu_losses = lambda: gan_bce(REAL, FAKE, backend="cpu")  # noqa: E731
    cpu_backward = backward_of(cpu(), Y, WEIGHT, BIAS)
    cpu_losses_backward = backward_of(sum(cpu_losses()[:2]), REAL, FAKE)
    return {
        "bn_act eager": (
            lambda: bn_act(Y, MEAN, VAR, WEIGHT, BIAS, training=True, backend="eager"), lambda: eager_bn_act(Y),
        ),
        "bn_act default": (lambda: bn_act(Y, MEAN, VAR, WEIGHT, BIAS, training=True), lambda: eager_bn_act(Y)),
        "bn_act cpu": (cpu, cpu_bn_act),
        "bn_act cpu backward": (cpu_backward, backward_of(cpu_bn_act(), Y, WEIGHT, BIAS)),
        "conv_bn_act eager": (
            lambda: conv_bn_act(Y, FILTER, MEAN, VAR, WEIGHT, BIAS, padding=1, training=True, backend="eager"),
            lambda: eager_bn_act(F.conv2d(Y, FILTER, padding=1)),
        ),
        "conv_bn_act cpu": (
            lambda: conv_bn_act(Y, FILTER, MEAN, VAR, WEIGHT, BIAS, padding=1, training=True, backend="cpu"),
            lambda: BnAct.apply(F.conv2d(Y, FILTER, padding=1), WEIGHT, BIAS, MEAN, VAR, 0.1, 1e-5, 0.2),
        ),
        "gan_bce eager": (lambda: gan_bce(REAL, FAKE, backend="eager"), eager_gan_bce),
        "gan_bce cpu": (cpu_losses, cpu_gan_bce),
        "gan_bce cpu backward": (cpu_losses_backward, backward_of(sum(cpu_gan_bce()[:2]), REAL, FAKE)),
        "gan_bce_generator eager": (lambda: gan_bce_generator(FAKE, backend="eager"), lambda: eager_half(FAKE, 1)),
        "bn_act cpu, or eager": (cpu, lambda: eager_bn_act(Y)),
        "bn_act cpu backward, or eager": (
            cpu_backward,
            backward_of(eager_bn_act(Y, MEAN.clone(), VAR.clone()), Y, WEIGHT, BIAS),  # which nobody changes meanwhile
        ),
        "gan_bce cpu, or eager": (cpu_losses, eager_gan_bce),
        "gan_bce cpu backward, or eager": (
            cpu_losses_backward, backward_of(sum(eager_gan_bce()[:2]), REAL, FAKE),
        ),
    }  # fmt: skip


def floors() -> dict[str, Callable]:
    """{what torch itself takes time for: a call of it}"""
    arguments = (Y.detach(), WEIGHT.detach(), BIAS.detach(), MEAN, VAR, 1e-5, 0.2)
    return {
        "custom function, forward": lambda: Nothing.apply(Y, WEIGHT, BIAS),
        "custom function, backward": backward_of(Nothing.apply(Y, WEIGHT, BIAS), Y, WEIGHT, BIAS),
        "operator bn_act_eval": lambda: CPU.bn_act_eval.default(*arguments),
        "operator gan_bce": lambda: CPU.gan_bce.default(REAL, FAKE, 1.0, 0.0),
    }


@pytest.mark.benchmark(group="overhead")
@pytest.mark.parametrize("written", ["fastgan", "by hand"])
@pytest.mark.parametrize("operation", pairs())
def test_overhead(benchmark, operation, written):
    benchmark(pairs()[operation][written == "by hand"])


def microseconds(call: Callable) -> float:
    start = perf_counter()
    call()
    return (perf_counter() - start) * 1e6


def main(rounds: int = 1200) -> None:
    torch.set_num_threads(1)
    print(f"{'microseconds a call':30} fastgan  by hand  added: median (quartiles)")
    for name, (public, by_hand) in pairs().items():
        # Call by call, and each first in turn: the speed of a shared machine moves by half within a second.
        order = ((public, by_hand), (by_hand, public))
        found = [[microseconds(call) for call in order[i % 2]] for i in range(rounds)][rounds // 10 :]
        found = [pair if i % 2 == 0 else pair[::-1] for i, pair in enumerate(found, rounds // 10)]
        ours, theirs = (median(column) for column in zip(*found, strict=True))
        added = sorted(a - b for a, b in found)
        quartiles = f"({added[len(added) // 4]:.1f} to {added[3 * len(added) // 4]:.1f})"
        print(f"{name:30} {ours:7.1f} {theirs:8.1f}  {median(added):6.1f} {quartiles}")
    print("floors, microseconds")
    for name, call in floors().items():
        print(f"{name:30} {median(microseconds(call) for _ in range(rounds)):7.1f}")


if __name__ == "__main__":
    main()
