"""ConvStack under autocast to bfloat16."""

import copy

import pytest
import torch
from test_conv_stack import AsBatches, TwoPasses, modules, network_input, outcome, small_networks
from tolerance import assert_as_right_as_torch, assert_pooled_as_right_as_torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import backends, library
from fastgan.backends import counts, instruction_set, reset_counts
from fastgan.explanation import explain
from fastgan.nn import Discriminator, Generator
from fastgan.nn.stack import ConvStack, why_unfused


@pytest.fixture(scope="module", autouse=True)
def kernels():
    library.load("cpu")
    if torch.ops.fastgan_cpu.instruction_set() == "plain":
        pytest.skip("this processor has no AVX2: stacks run module by module here")


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_autocast_to_bfloat16_is_as_right_as_eager(network, dtype):
    torch.manual_seed(7)
    made = Generator(32, 3, 20, 16) if network == "generator" else Discriminator(32, 3, 32)
    input = torch.randn((8, 20) if network == "generator" else (8, 3, 32, 32))
    truth = outcome(copy.deepcopy(made).double(), input.double(), "eager")
    reset_counts()
    with torch.autocast("cpu", dtype):
        got = outcome(made, input, "cpu")
        assert counts()["cpu", "convolve"] > 0
        assert counts()["cpu", "weight_gradient"] > 0
        own = outcome(made, input, "eager")
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in own]
    for index, triple in enumerate(zip(got, own, truth, strict=True)):
        if triple[0].is_floating_point():
            assert_as_right_as_torch(*triple, f"tensor {index}")


@pytest.fixture
def in_bf16():
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("penalty", [False, True], ids=["first", "second"])
def test_gradients_of_both_orders_in_bf16(penalty, training, in_bf16):
    """A gradient of the gradient goes through the definition, whose sums, too, are of bf16 numbers."""
    draws = []
    for seed in range(12):  # one activation that changes its sign makes most of the largest error
        torch.manual_seed(seed)
        made, input = Discriminator(16, 3, 16).train(training), torch.randn(6, 3, 16, 16)
        with torch.autocast("cpu", enabled=False):
            truth = outcome(copy.deepcopy(made).double(), input.double(), "eager", penalty)
        reset_counts()
        draws.append((outcome(made, input, "cpu", penalty), outcome(made, input, "eager", penalty), truth))
        assert counts()["cpu", "convolve"] > 0
    assert_pooled_as_right_as_torch(draws)


def test_recomputing_the_first_block_changes_no_bit_in_bf16(in_bf16):
    stack, input = ConvStack(*small_networks()["down"]), network_input("down", torch.float32)
    kept = outcome(stack, input, "cpu")
    stack.recompute_first = True
    for one, two in zip(kept, outcome(stack, input, "cpu"), strict=True):
        assert torch.equal(one, two)


def test_two_batches_at_once_are_two_passes_in_bf16(in_bf16):
    """Bit for bit but for a weight's gradient, whose sum over both is one."""
    stack, input = ConvStack(*modules(3, 16, 33)), torch.randn(6, 3, 16, 16)
    got, expected = (outcome(made(stack), input, "cpu") for made in (AsBatches, TwoPasses))
    for index, (one, two) in enumerate(zip(got, expected, strict=True)):
        if index >= 2 and one.dim() == 4:  # two sums in fp32, in another order: a few roundings of the largest
            assert (one - two).abs().max() <= 8 * torch.finfo(one.dtype).eps * two.abs().max()
        else:
            assert torch.equal(one, two)


def test_batch_norm_in_another_dtype_is_the_librarys(in_bf16):
    stack = ConvStack(*modules(3, 8))
    stack[1].to(torch.bfloat16)
    (layer, *_) = explain(stack, torch.randn(2, 3, 8, 8))
    assert "BatchNorm's weight is torch.bfloat16, the kernels take torch.float32" in str(layer)


def test_where_only_the_library_has_amx_it_is_left_to(monkeypatch, in_bf16):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(backends, "instruction_set", lambda of: "avx512")
    assert "the library multiplies in bfloat16 on AMX" in why_unfused(torch.randn(2, 3, 8, 8))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert why_unfused(torch.randn(2, 3, 8, 8)) is None


class ConvolutionDtypes(TorchDispatchMode):
    """The dtypes of all tensors that PyTorch's convolutions and matrix products take."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten.convolution,
            torch.ops.aten.convolution_backward,
            torch.ops.aten.mm,
        ):
            self.found |= {argument.dtype for argument in args if isinstance(argument, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalty", [False, True], ids=["first", "second"])
def test_what_is_the_librarys_is_multiplied_in_float32_without_amx(penalty, in_bf16):
    """Where there is no instruction for bfloat16 it would take fifty times as long."""
    expected = torch.bfloat16 if instruction_set(torch.bfloat16) == "amx" else torch.float32
    stack = ConvStack(torch.nn.Conv2d(3, 8, 3, 1, 1), *modules(8, 16), torch.nn.Conv2d(16, 1, 8, bias=False))
    with ConvolutionDtypes() as seen:
        outcome(stack, torch.randn(2, 3, 16, 16), "cpu", penalty)
    assert seen.found == {expected}
