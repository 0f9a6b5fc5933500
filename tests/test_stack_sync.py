"""A ConvStack with synchronised BatchNorm: two processes with unequal batches against one with all images."""

import copy

import pytest
import torch
import torch.distributed as dist
from tolerance import assert_as_right_as_torch
from torch import Tensor, nn
from triton_device import MARKS

from fastgan import library
from fastgan.backends import counts, reset_counts, use_backend
from fastgan.nn import ConvStack
from fastgan.nn.stack import as_batches
from fastgan.tolerance import FACTOR, errors

SIZES = (2, 4)
# Winograd rounds each transformed weight once for all pixels, which a mean over pixels cannot average away: running
# means of 4x4 stride-2 convolutions were 1.1 to 2.9 times as wrong as PyTorch's over 8 to 64 channels (RMS 1e-8 of the
# activations' 0.5), with outputs and everything else within 2.
WINOGRAD_MEAN = 3.0
# The loss does not depend on the scale before another BatchNorm: its gradient is what rounding leaves, right to a
# thousandth. Over 16 pools of 32 draws its maximum was 1.1 to 3.4 times PyTorch's, the RMS 1.2 to 1.5 times, which is
# held to 2; over 8 pools by the kernels of e4644e9, which took other algorithms, 1.4 to 3.0 and 1.2 to 1.5.
CANCELLED, CANCELLED_MAXIMUM = "10.weight", 4.0


@pytest.fixture(scope="module", autouse=True)
def built():
    """Once and here: two processes would wait for one another's compiler."""
    library.load("cpu")


def network() -> nn.Sequential:
    """Blocks that the CPU kernels know, one with frozen statistics, one of the library, and a BatchNorm in no block."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 17, 4, 2, 1, bias=False), nn.BatchNorm2d(17), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(17, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None), nn.Dropout(0.0),
        nn.BatchNorm2d(6, affine=False), nn.Tanh(),
    )  # fmt: skip
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0, 0.5)
    net[7].eval()
    return net


def outcome(net: nn.Module, images: Tensor, first: int, backend: str, penalty: bool) -> list[Tensor]:
    """Output, input gradient, buffers and parameter gradients; `first`: which image of all these begin with."""
    images = images.clone().requires_grad_()
    with use_backend(backend):
        output = net(images)
        pattern = torch.arange(first * output[0].numel(), (first + len(images)) * output[0].numel()).cos()
        loss = (output * pattern.view_as(output).to(output.dtype)).sum()
        if penalty:
            (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
            loss = loss + gradient.square().sum()
        loss.backward()
    return [output.detach(), images.grad, *net.buffers(), *(p.grad for p in net.parameters())]


def all_images(seed: int = 0) -> Tensor:
    torch.manual_seed(1 + seed)
    return torch.randn(sum(SIZES), 3, 16, 16)


def own_images(dtype, seed: int = 0) -> tuple[Tensor, int]:
    rank = dist.get_rank()
    return all_images(seed).to(dtype).split(SIZES)[rank], sum(SIZES[:rank])


def part(dtype, backend: str, penalty: bool, draws: int) -> list[list[Tensor]]:
    """`outcome` of this process's share of each draw of images, the parameter gradients summed over both."""
    every = []
    for seed in range(draws):
        net = nn.SyncBatchNorm.convert_sync_batchnorm(ConvStack(*network()).to(dtype))
        reset_counts()
        results = outcome(net, *own_images(dtype, seed), backend, penalty)
        assert (("cpu", "weight_gradient") in counts()) == (backend == "cpu")
        for gradient in results[-len(list(net.parameters())) :]:
            dist.all_reduce(gradient)
        every.append(results)
    return every


# Second gradients of a whole network cancel so far that fp32 says little: fp64 does, through the kernels too.
# In fp32 several draws are judged as one: of a gradient with 6 elements, PyTorch's own error is small by luck.
@pytest.mark.parametrize(
    ("dtype", "penalty", "draws", "backend"),
    [
        *((torch.float32, False, 32, backend) for backend in ("eager", "cpu")),
        *((torch.float64, penalty, 1, backend) for penalty in (False, True) for backend in ("eager", "cpu")),
        pytest.param(torch.float64, False, 1, "triton", marks=MARKS),
    ],
)
def test_two_processes_are_one(pair, dtype, penalty, draws, backend):
    if backend == "cpu" and torch.ops.fastgan_cpu.instruction_set() == "plain":
        pytest.skip("this processor has no AVX2: stacks run module by module here")
    parts = pair(part, dtype, backend, penalty, draws)

    def whole(dtype) -> list[list[Tensor]]:
        return [outcome(network().to(dtype), all_images(i).to(dtype), 0, "eager", penalty) for i in range(draws)]

    truth, own = [[torch.stack(of_one) for of_one in zip(*whole(d), strict=True)] for d in (torch.float64, dtype)]
    one, two = [[torch.stack(of_one) for of_one in zip(*results, strict=True)] for results in parts]
    kept = (*network().named_buffers(), *network().named_parameters())
    names = ["output", "input", *(name for name, _ in kept)]
    for index, (name, first, second) in enumerate(zip(names, one, two, strict=True)):
        if index >= 2:
            assert torch.equal(first, second), f"{name} differs between the processes"
        got = torch.cat([first, second], 1) if index < 2 else first
        if dtype == torch.float64 and got.is_floating_point():
            torch.testing.assert_close(got, truth[index], rtol=1e-9, atol=1e-9)
        elif got.is_floating_point():
            factor = FACTOR
            if backend == "cpu" and name.endswith("running_mean"):
                factor = WINOGRAD_MEAN
            elif backend == "cpu" and name == CANCELLED:
                factor = CANCELLED_MAXIMUM
                assert errors(got, truth[index]).rms <= FACTOR * errors(own[index], truth[index]).rms
            assert_as_right_as_torch(got, own[index], truth[index], name, factor)
        else:
            assert torch.equal(got, truth[index])


def two_batches(at_once: bool) -> list[Tensor]:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(ConvStack(*network()).double())
    images, _ = own_images(torch.float64)
    with use_backend("cpu"), as_batches(net, 2 if at_once else 1):
        output = net(images) if at_once else torch.cat([net(batch) for batch in images.chunk(2)])
    output.square().sum().backward()
    return [output.detach(), *net.buffers(), *(p.grad for p in net.parameters())]


def test_two_batches_at_once_are_two_passes(pair):
    """Statistics over processes are of one batch at a time."""
    for got, expected in zip(pair(two_batches, True), pair(two_batches, False), strict=True):
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def evaluated() -> Tensor:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(ConvStack(*network())).eval()
    if dist.get_rank() == 1:
        return torch.zeros(())  # in eval nobody waits for the other process
    return net(all_images()).detach()


def test_eval_exchanges_nothing(pair):
    torch.testing.assert_close(pair(evaluated)[0], network().eval()(all_images()))


def in_groups_of_one() -> Tensor:
    groups = [dist.new_group([rank]) for rank in range(2)]
    net = nn.SyncBatchNorm.convert_sync_batchnorm(ConvStack(*network()), groups[dist.get_rank()])
    return net(own_images(torch.float32)[0]).detach()


def test_the_modules_process_group_is_respected(pair):
    for got, images in zip(pair(in_groups_of_one), all_images().split(SIZES), strict=True):
        torch.testing.assert_close(got, network()(images), rtol=1e-4, atol=1e-5)


def wrapped(backend: str) -> list[Tensor]:
    """How far DistributedDataParallel's gradients are from the mean of both processes' own, over two steps."""
    images, _ = own_images(torch.float32)
    plain = ConvStack(*network())
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    gaps = []
    for _ in range(2):
        for net in (parallel, plain):
            net.zero_grad()
            reset_counts()
            with use_backend(backend):
                net(images).square().sum().backward()
            assert counts()[backend, "weight_gradient"] > 0
        for got, parameter in zip(parallel.parameters(), plain.parameters(), strict=True):
            dist.all_reduce(parameter.grad)
            gaps.append((got.grad - parameter.grad / 2).abs().max() / parameter.grad.abs().max())
    return gaps


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=MARKS)])
def test_distributed_data_parallel(pair, backend):
    """Its gradient hooks fire for the parameters of a fused stack, each once, without find_unused_parameters. (With
    SyncBatchNorm it refuses CPUs.)"""
    if backend == "cpu" and torch.ops.fastgan_cpu.instruction_set() == "plain":
        pytest.skip("this processor has no AVX2: stacks run module by module here")
    for gaps in pair(wrapped, backend):
        assert max(gaps) < 1e-5
