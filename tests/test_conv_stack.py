"""ConvStack against the same modules in a plain nn.Sequential, values, gradients, gradients of gradients and state."""

import copy
import threading
from itertools import pairwise

import pytest
import torch
from tolerance import assert_as_right_as_torch, assert_pooled_as_right_as_torch
from torch import Tensor, nn

from fastgan import library
from fastgan.backends import Decision, counts, instruction_set, reset_counts, use_backend
from fastgan.bench.memory import kept_bytes
from fastgan.explanation import explain
from fastgan.nn import Discriminator, Generator
from fastgan.nn.blocks import Block, parts
from fastgan.nn.fusion import fuse
from fastgan.nn.stack import ConvStack, as_batches, why_unfused


@pytest.fixture(scope="module", autouse=True)
def kernels():
    library.load("cpu")
    if torch.ops.fastgan_cpu.instruction_set() == "plain":
        pytest.skip("this processor has no AVX2: stacks run module by module here")


def modules(*widths: int, norm=nn.BatchNorm2d, slope: float = 0.2) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, width in pairwise(widths):
        layers += [nn.Conv2d(before, width, 4, 2, 1, bias=False), norm(width), nn.LeakyReLU(slope, inplace=True)]
    return layers


def small_networks() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    up = [
        nn.ConvTranspose2d(6, 17, 4, 1, 0, bias=False), nn.BatchNorm2d(17), nn.ReLU(True),
        nn.ConvTranspose2d(17, 5, 4, 2, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(True),
        nn.ConvTranspose2d(5, 3, 4, 2, 1, bias=False), nn.Tanh(),
    ]  # fmt: skip
    mixed = [
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
        nn.Conv2d(8, 4, 4, 2, 1, bias=True), nn.LeakyReLU(0.3),
        nn.Conv2d(4, 4, 4, 2, 1, bias=False), nn.Dropout(0.0),
        nn.ConvTranspose2d(4, 6, 4, 2, 1, output_padding=1), nn.BatchNorm2d(6),
        nn.Conv2d(6, 2, 1),
    ]  # fmt: skip
    projected = [
        nn.Linear(6, 17 * 16), nn.Unflatten(1, (17, 4, 4)), nn.BatchNorm2d(17), nn.ReLU(True), *copy.deepcopy(up[3:]),
    ]  # fmt: skip
    nested = [ConvStack(*modules(3, 16)), *modules(16, 33)]
    made = {"down": modules(3, 16, 33), "up": up, "mixed": mixed, "projected": projected, "nested": nested}
    return {name: nn.Sequential(*layers) for name, layers in made.items()}


def network_input(name: str, dtype=torch.float64) -> Tensor:
    torch.manual_seed(2)
    return torch.randn({"up": (3, 6, 1, 1), "projected": (3, 6)}.get(name, (3, 3, 12, 16)), dtype=dtype)


def outcome(network: nn.Module, input: Tensor, backend: str | None, penalty: bool = False) -> list[Tensor]:
    """Output, gradients of input and parameters, and buffers, after one forward and backward."""
    network, input = copy.deepcopy(network), input.clone().requires_grad_()
    with use_backend(backend):
        output = network(input)
        loss = (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).sum()
        if penalty:
            (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
            loss = gradient.square().sum() + loss
        loss.backward()
    return [output.detach(), input.grad, *(p.grad for p in network.parameters()), *network.buffers()]


@pytest.mark.parametrize("penalty", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("name", ["down", "up", "mixed", "projected"])
def test_stack_is_the_sequence_in_fp64(name, training, penalty, dtype):
    plain = small_networks()[name].to(dtype).train(training)
    input = network_input(name, dtype)
    reset_counts()
    got = outcome(ConvStack(*plain), input, "cpu", penalty)
    assert counts()["cpu", "convolve"] > 0
    for one, two in zip(got, outcome(plain, input, "eager", penalty), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_dcgan_is_as_right_as_eager_in_fp32(network, dtype):
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        made = (Generator(32, 3, 20, 16) if network == "generator" else Discriminator(32, 3, 32)).to(dtype)
        input = torch.randn((8, 20) if network == "generator" else (8, 3, 32, 32), dtype=dtype)
        truth = outcome(copy.deepcopy(made).double(), input.double(), "eager")
        draws.append((outcome(made, input, "cpu"), outcome(made, input, "eager"), truth))
    # A whole network multiplies the errors of its layers: twice the rule's factor, on the output and every gradient.
    assert_pooled_as_right_as_torch(draws, factor=4.0)


@pytest.mark.parametrize("name", ["down", "up"])
def test_gradcheck_and_gradgradcheck_run_through_the_kernels(name):
    torch.manual_seed(4)
    layers = modules(2, 3, 2) if name == "down" else list(small_networks()["up"])[3:7]
    stack = ConvStack(*layers).double()
    input = torch.randn((2, 2, 8, 8) if name == "down" else (2, 17, 2, 2), dtype=torch.float64, requires_grad=True)
    parameters = [p for p in stack.parameters()]

    def run(input: Tensor, *_: Tensor) -> Tensor:
        return stack(input)

    reset_counts()
    with use_backend("cpu"):
        assert torch.autograd.gradcheck(run, (input, *parameters), fast_mode=True)
        assert counts()["cpu", "weight_gradient"] > 0
        assert torch.autograd.gradgradcheck(run, (input, *parameters), fast_mode=True)


def test_penalty_in_fp32_is_as_right_as_eager():
    torch.manual_seed(5)
    discriminator, input = Discriminator(16, 3, 16), torch.randn(6, 3, 16, 16)
    truth = outcome(copy.deepcopy(discriminator).double(), input.double(), "eager", penalty=True)
    own, got = (outcome(discriminator, input, backend, penalty=True) for backend in ("eager", "cpu"))
    for triple in zip(got[1:3], own[1:3], truth[1:3], strict=True):
        assert_as_right_as_torch(*triple, "gradient of the penalty", factor=4.0)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-2, "momentum": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_options(options, training):
    torch.manual_seed(6)
    plain = nn.Sequential(*modules(3, 16, norm=lambda width: nn.BatchNorm2d(width, **options))).double().train(training)
    stack, input = ConvStack(*copy.deepcopy(plain)), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        with use_backend("cpu"):
            got = stack(input)
        torch.testing.assert_close(got, plain(input), rtol=1e-12, atol=1e-12)
    for one, two in zip(stack.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_one_value_per_channel_raises_in_training():
    stack = ConvStack(*modules(3, 8))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stack(torch.randn(1, 3, 2, 2))
    assert stack.eval()(torch.randn(1, 3, 2, 2)).shape == (1, 8, 1, 1)


def test_frozen_parameters_cost_nothing():
    discriminator = Discriminator(32, 1, 16).requires_grad_(False)
    input = torch.randn(4, 1, 32, 32, requires_grad=True)
    reset_counts()
    with use_backend("cpu"):
        discriminator(input).sum().backward()
    assert input.grad is not None
    assert counts()["cpu", "convolve"] > 0
    assert ("cpu", "weight_gradient") not in counts()


def test_images_without_gradient_cost_no_input_gradient():
    discriminator, input = Discriminator(32, 3, 16), torch.randn(4, 3, 32, 32)
    with use_backend("cpu"):
        output = discriminator(input).sum()
        reset_counts()
        output.backward()
    assert counts()["cpu", "convolve"] == 2  # the two hidden blocks; the first block's input needs none


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_gradients_have_the_weights_layout(network):
    """So that neither accumulating them nor a fused optimiser copies."""
    made = Generator(32, 3, 20, 16) if network == "generator" else Discriminator(32, 3, 16)
    made.to(memory_format=torch.channels_last)
    with use_backend("cpu"):
        made(torch.randn((4, 20) if network == "generator" else (4, 3, 32, 32))).sum().backward()
    for parameter in made.parameters():
        assert parameter.grad.stride() == parameter.stride()


def test_state_dict_is_that_of_a_sequence():
    plain = nn.Sequential(*modules(3, 8, 16))
    assert ConvStack(*modules(3, 8, 16)).state_dict().keys() == plain.state_dict().keys()


def test_changed_weight_is_noticed_before_backward():
    stack, input = ConvStack(*modules(3, 16)), torch.randn(2, 3, 8, 8, requires_grad=True)
    with use_backend("cpu"):
        output = stack(input).sum()
        with torch.no_grad():
            stack[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


@pytest.mark.parametrize("write", ["data", "no_grad", "load_state_dict"])
def test_every_write_to_a_weight_counts_at_once(write):
    """There is no cache of transformed weights that a write past autograd could leave stale."""
    stack, input = ConvStack(*modules(32, 32)), torch.randn(2, 32, 8, 8)
    with use_backend("cpu"), torch.no_grad():
        stack(input)
        if write == "data":
            stack[0].weight.data.copy_(torch.randn(32, 32, 4, 4))
        elif write == "no_grad":
            stack[0].weight.normal_()
        else:
            stack.load_state_dict(ConvStack(*modules(32, 32)).state_dict())
        got = stack(input)
    torch.testing.assert_close(got, nn.Sequential(*stack)(input), rtol=1e-4, atol=1e-4)


def test_hooks_parametrisations_and_subclasses_run_as_they_are():
    class OwnConv(nn.Conv2d):
        pass

    stack = ConvStack(*modules(3, 8, 8, 8, 8))
    seen = []
    stack[3].register_forward_hook(lambda *_: seen.append(True))
    nn.utils.parametrizations.spectral_norm(stack[6])
    stack[9] = OwnConv(8, 8, 4, 2, 1)
    fused = [block for _, part in parts(stack) if isinstance(part, list) for block in part]
    assert fused == [Block("0", 3, stack[0], stack[1], 0.2)]
    with use_backend("cpu"):
        stack(torch.randn(2, 3, 32, 32))
    assert seen


def test_where_the_kernels_do_not_apply():
    image = torch.randn(2, 3, 8, 8)
    assert why_unfused(image) is None
    assert "the input is torch.bfloat16" in why_unfused(image.bfloat16())
    assert "'eager' has no fused stack" in why_unfused(image.to("meta"))
    with torch.autocast("cpu", torch.float16):
        assert "autocast" in why_unfused(image)
        assert ConvStack(*modules(3, 8))(image).dtype == torch.float16
    with use_backend("eager"):
        assert "eager" in why_unfused(image)
    assert "float64" in why_unfused(image.double())


def test_what_blocks_pass_on_is_not_what_anyone_keeps():
    """The memory of gradients between blocks is used again: neither gradients that are returned nor those of another
    network's backward pass may lie in it."""
    torch.manual_seed(9)
    stacks = [ConvStack(*modules(3, 16, 24, 40)) for _ in range(2)]
    inputs = [torch.randn(4, 3, 32, 32, requires_grad=True) for _ in stacks]
    first = [
        torch.autograd.grad(stack(x).square().sum(), (x, *stack.parameters()))
        for stack, x in zip(stacks, inputs, strict=True)
    ]
    copies = [[g.clone() for g in gradients] for gradients in first]
    outputs = [stack(x).square().sum() for stack, x in zip(stacks, inputs, strict=True)]
    for output in reversed(outputs):
        output.backward()
    for gradients, copied, stack, x in zip(first, copies, stacks, inputs, strict=True):
        for g, before, tensor in zip(gradients, copied, (x, *stack.parameters()), strict=True):
            assert torch.equal(g, before)
            assert torch.equal(g, tensor.grad)


def test_memory_between_blocks_grows_from_block_to_block():
    """In a thread of its own, which has none yet: each gradient is larger than the one it is made from, and all are so
    large that the system takes back what is freed."""
    torch.manual_seed(10)
    stack, input = ConvStack(*modules(3, 64, 64, 64, 64)), torch.randn(64, 3, 64, 64)
    found: list = []

    def run() -> None:
        found.append(outcome(stack, input, "cpu"))
        found.append(outcome(stack, torch.cat([input, input]), "cpu"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for got, given in zip(found, (input, torch.cat([input, input])), strict=True):
        for one, two in zip(got, outcome(stack, given, "cpu"), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("dtype", "backend", "reason"),
    [
        (torch.float64, None, "float64 takes the kernels only where backend 'cpu' is asked for"),
        (torch.bfloat16, "cpu", "the kernels take float32 and, under autocast, bfloat16, the input is torch.bfloat16"),
        (torch.bfloat16, "eager", None),
    ],
)
def test_explain_tells_why_blocks_are_in_no_unit(dtype, backend, reason):
    """Of convolutions and what follows them apart: an activation may take a kernel where a convolution does not."""
    layers = explain(Discriminator(16, 3, 8).to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype), backend)
    by = {}
    for layer in layers:
        by.setdefault(layer.operation, []).append((layer.name, layer.decision))
    assert [(name, decision.backend) for name, decision in by.pop("bn_act")] == [
        (name, backend or "eager") for name in ("main.0", "main.2")
    ]
    named = ["main.0", "main.2", "main.5"] if reason else []
    assert by.pop("convolution", []) == [(name, Decision("eager", f"the library's: {reason}")) for name in named]
    assert not by


def projecting_generator() -> nn.Module:
    """As many generators begin: a linear layer makes the first image."""
    torch.manual_seed(8)
    layers: list[nn.Module] = [nn.Linear(20, 64 * 16), nn.Unflatten(1, (64, 4, 4)), nn.BatchNorm2d(64), nn.ReLU(True)]
    for before, width in ((64, 32), (32, 16)):
        layers += [nn.ConvTranspose2d(before, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    return fuse(nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh()))


def test_a_run_is_one_unit_by_the_tensor_that_reaches_it():
    generator, latents = projecting_generator(), torch.randn(8, 20)
    truth = outcome(copy.deepcopy(generator).double(), latents.double(), "eager")
    own = outcome(generator, latents, "eager")
    reset_counts()
    got = outcome(generator, latents, None)
    assert counts()["cpu", "convolve"] > 0
    for index, triple in enumerate(zip(got, own, truth, strict=True)):
        if triple[0].is_floating_point():
            assert_as_right_as_torch(*triple, f"tensor {index}", factor=4.0)
    *_, first, second, third = explain(generator, latents)
    assert [first.name, second.name, third.name] == ["4", "7", "10"]
    assert all("one unit from layer 4 on" in one.decision.reason for one in (first, second, third))


def test_explain_names_each_block():
    layers = explain(Discriminator(16, 3, 8), torch.randn(2, 3, 16, 16))
    assert [(layer.name, layer.decision.backend) for layer in layers] == [(f"main.{i}", "cpu") for i in (0, 2, 5)]
    thin, own = (f"convolution by {instruction_set(of)} kernels" for of in ("thin convolution", torch.float32))
    assert [layer.decision.reason.partition(", ")[2] for layer in layers] == [thin, own, "convolution by the library"]


@pytest.mark.parametrize(
    ("network", "recompute", "share"),
    [("generator", False, 0.55), ("discriminator", False, 0.72), ("discriminator", True, 0.40)],
)
def test_bytes_kept_for_backward(network, recompute, share):
    made = Generator(64, 3, 100, 64) if network == "generator" else Discriminator(64, 3, 64)
    input = torch.randn((4, 100) if network == "generator" else (4, 3, 64, 64))
    made.main.recompute_first = recompute
    assert kept_bytes(made, input, "cpu") <= share * kept_bytes(made, input, "eager")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["down", "up", "mixed"])
def test_recomputed_first_block_changes_no_bit(name, training):
    stack, input = ConvStack(*small_networks()[name]).train(training), network_input(name, torch.float32)
    kept = outcome(stack, input, "cpu")
    stack.recompute_first = True
    for one, two in zip(kept, outcome(stack, input, "cpu"), strict=True):
        assert torch.equal(one, two)


class TwoPasses(nn.Module):
    """What `as_batches(network, 2)` means."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([self.network(batch) for batch in (input[: len(input) // 2], input[len(input) // 2 :])])


class AsBatches(TwoPasses):
    def forward(self, input: Tensor) -> Tensor:
        with as_batches(self.network, 2):
            return self.network(input)


class Around(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        return self.network(input) + 1


@pytest.mark.parametrize("name", ["they work in place", "they hold a stack"])
def test_two_batches_through_modules_in_no_block(name):
    if name == "they work in place":
        network = Discriminator(16, 3, 8, spectral_norm=True).eval()
    else:
        network = ConvStack(Around(ConvStack(*modules(3, 8))), *modules(8, 8))
    input = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    got, expected = (outcome(made(network.double()), input, "cpu") for made in (AsBatches, TwoPasses))
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("penalty", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["down", "up", "mixed", "projected", "nested"])
def test_two_batches_at_once_are_two_passes(name, training, penalty):
    stack = ConvStack(*small_networks()[name]).double().train(training)
    torch.manual_seed(7)
    input = torch.cat([network_input(name), 3 * torch.randn_like(network_input(name)) + 1])
    for backend in ("cpu", "eager"):
        reset_counts()
        got = outcome(AsBatches(stack), input, backend, penalty)
        once = counts().get(("cpu", "convolve"), 0)
        reset_counts()
        for one, two in zip(got, outcome(TwoPasses(stack), input, backend, penalty), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
        assert counts().get(("cpu", "convolve"), 0) == 2 * once
        assert (once > 0) == (backend == "cpu")


def test_plain_averages_of_running_statistics_count_each_batch():
    stack = ConvStack(*modules(3, 16, norm=lambda width: nn.BatchNorm2d(width, momentum=None))).double()
    input = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    got, expected = (outcome(made(stack), input, "cpu") for made in (AsBatches, TwoPasses))
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_batches_of_different_sizes_are_refused():
    stack = ConvStack(nn.Conv2d(3, 4, 3), nn.Tanh())
    with use_backend("eager"), as_batches(stack, 2), pytest.raises(ValueError, match="2 batches of one size"):
        stack(torch.randn(3, 3, 8, 8))
    assert stack.batches == 1


@pytest.mark.parametrize(("batch", "runs"), [(3, 0), (4, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_few_pixels_under_a_large_weight_are_the_librarys(batch, runs, transposed):
    torch.manual_seed(0)
    make, channels = (nn.ConvTranspose2d, (128, 64)) if transposed else (nn.Conv2d, (64, 128))
    block = make(*channels, 4, 2, 1, bias=False)
    input = torch.randn(batch, block.in_channels, *((4, 4) if transposed else (8, 8)))
    stack = ConvStack(block, nn.LeakyReLU(0.2))
    reset_counts()
    got, truth = stack(input), copy.deepcopy(block).double()(input.double())
    own = nn.functional.leaky_relu(block(input.contiguous(memory_format=torch.channels_last)), 0.2)
    assert_as_right_as_torch(got, own, nn.functional.leaky_relu(truth, 0.2))
    assert counts().get(("cpu", "convolve"), 0) == runs
