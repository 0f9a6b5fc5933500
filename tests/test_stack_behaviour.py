"""ConvStack beside everything that PyTorch users do with an nn.Sequential: a test for each sentence of that list, on
the kernels of either backend."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint
from triton_device import DEVICE, MARKS

from fastgan import library
from fastgan.backends import counts, reset_counts, use_backend
from fastgan.explanation import explain
from fastgan.nn import ConvStack

ON_THE_HOST = pytest.mark.skipif(DEVICE != "cpu", reason="these tensors are the host's; tests/test_stack_triton.py")


@pytest.fixture(autouse=True, params=["cpu", pytest.param("triton", marks=[*MARKS, ON_THE_HOST])])
def backend(request):
    """Whose kernels run the stacks: the CPU's by default, Triton's on request."""
    if request.param == "triton":
        with use_backend("triton"):
            yield "triton"
        return
    library.load("cpu")
    if torch.ops.fastgan_cpu.instruction_set() == "plain":
        pytest.skip("this processor has no AVX2: stacks run module by module here")
    yield "cpu"


def pair_of_networks() -> tuple[ConvStack, nn.Sequential]:
    """The same two blocks and a last convolution, in both classes."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(16, 24, 4, 2, 1, bias=False), nn.BatchNorm2d(24), nn.LeakyReLU(0.2, inplace=True),
        nn.ConvTranspose2d(24, 2, 4, 2, 1, bias=False),
    )  # fmt: skip
    for index in (1, 4):
        nn.init.normal_(plain[index].weight, 1, 0.2)
        nn.init.normal_(plain[index].bias, 0, 0.5)
        nn.init.normal_(plain[index].running_mean, 0, 0.1)
        nn.init.uniform_(plain[index].running_var, 0.01, 0.1)
    return ConvStack(*copy.deepcopy(plain)), plain


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 16, 16)


def differentiated(network: nn.Module, input: Tensor, run=None) -> list[Tensor | None]:
    """Output, then the gradients of input and parameters (None where there is none)."""
    input = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = (run or network)(input)
    output.float().square().sum().backward()
    return [output.detach(), input.grad, *(p.grad for p in network.parameters())]


def assert_alike(got: list, want: list, tolerance: float = 1e-4) -> None:
    assert [one is None for one in got] == [one is None for one in want]
    scale = max(tensor.abs().max().item() for tensor in want if tensor is not None)  # some gradients are all rounding
    for one, two in zip(got, want, strict=True):
        if two is not None:
            assert one.dtype == two.dtype
            torch.testing.assert_close(one, two, rtol=0, atol=tolerance * scale)


def assert_fused(run, backend: str) -> None:
    reset_counts()
    run()
    assert counts().get((backend, "convolve"), 0) > 0


def test_state_dicts_move_both_ways():
    stack, plain = pair_of_networks()
    assert list(stack.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(stack.state_dict())
    stack.load_state_dict(plain.state_dict())


def test_eval_is_batch_norm_folded_into_the_convolution(backend):
    stack, plain = (network.eval() for network in pair_of_networks())
    folded = nn.Sequential(
        fuse_conv_bn_eval(plain[0], plain[1]), plain[2], fuse_conv_bn_eval(plain[3], plain[4]), plain[5], plain[6]
    ).requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(stack(images()), folded(images()), rtol=1e-4, atol=1e-4)
    assert_fused(lambda: stack(images()), backend)


@pytest.mark.parametrize("written", ["weight", "running_var", "bias", "load_state_dict"])
def test_eval_keeps_nothing_from_call_to_call(written):
    stack, plain = (network.eval() for network in pair_of_networks())
    with torch.no_grad():
        before = stack(images())
        for network in (stack, plain):
            if written == "weight":
                network[3].weight.mul_(1.5)
            elif written == "running_var":
                network[1].running_var.data.mul_(4)
            elif written == "bias":
                network[4].bias.data.add_(1)
            else:
                network.load_state_dict({name: value + 0.5 for name, value in network.state_dict().items()})
        after = stack(images())
        torch.testing.assert_close(after, plain(images()), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-2


def test_amp():
    """In bf16 where nn.Sequential is; gradients are fp32."""
    results = []
    for network in pair_of_networks():
        with torch.autocast("cpu", torch.bfloat16):
            results.append(differentiated(network, images()))
    assert results[0][0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in results[0][1:])
    assert_alike(*results, tolerance=0.05)


def layouts() -> dict[str, Tensor]:
    wide = torch.zeros(4, 3, 16, 32)
    wide[..., ::2] = images()
    return {
        "contiguous": images(),
        "channels-last": images().contiguous(memory_format=torch.channels_last),
        "strided": wide[..., ::2],
        "expanded": images()[:1].expand(4, -1, -1, -1),
    }


@pytest.mark.parametrize("layout", layouts())
def test_input_of_any_layout(layout):
    stack, plain = pair_of_networks()
    assert_alike(differentiated(stack, layouts()[layout]), differentiated(plain, layouts()[layout]))


@pytest.mark.parametrize("trained", [(), (0,), (3,), (6,), (1,), (4,), (0, 4), (1, 3, 6)], ids=str)
def test_partial_requires_grad(trained):
    results = []
    for network in pair_of_networks():
        for index, module in enumerate(network):
            module.requires_grad_(index in trained)
        results.append(differentiated(network, images()))
    assert_alike(*results)


def test_partial_requires_grad_of_one_affine_parameter():
    results = []
    for network in pair_of_networks():
        network.requires_grad_(False)
        network[1].bias.requires_grad_()
        results.append(differentiated(network, images()))
    assert_alike(*results)


@pytest.mark.parametrize("frozen", [(1,), (4,), (1, 4)], ids=str)
def test_frozen_batch_norm(frozen):
    """Fine-tuning: single BatchNorm modules in eval mode while the rest trains."""
    results, networks = [], pair_of_networks()
    kept = copy.deepcopy(networks[0])
    for network in networks:
        network.train()
        for index in frozen:
            network[index].eval()
        results.append(differentiated(network, images()))
    assert_alike(*results)
    for index in (1, 4):
        assert torch.equal(networks[0][index].running_var, kept[index].running_var) == (index in frozen)
        torch.testing.assert_close(networks[0][index].running_var, networks[1][index].running_var)


@pytest.mark.parametrize("reentrant", [False, True], ids=["without reentry", "reentrant"])
def test_gradient_checkpointing(reentrant):
    """The forward runs again in the backward, and updates the running statistics again, as in nn.Sequential."""
    results, networks = [], pair_of_networks()
    for network in networks:
        results.append(
            differentiated(network, images(), lambda x, n=network: checkpoint(n, x, use_reentrant=reentrant))
        )
    assert_alike(*results)
    assert networks[0][1].num_batches_tracked.item() == networks[1][1].num_batches_tracked.item() == 2
    torch.testing.assert_close(networks[0][1].running_mean, networks[1][1].running_mean)


def test_compiled_surroundings():
    """Compiled code takes the stack in without a break and runs it by operations."""
    results = []
    for network in pair_of_networks():
        run = torch.compile(lambda x, n=network: n(x * 2).tanh() + 1, backend="aot_eager", fullgraph=True)
        results.append(differentiated(network, images(), run))
        assert network[1].num_batches_tracked.item() == 1
    assert_alike(*results)


def test_a_stack_kept_out_of_compiled_code_stays_fused(backend):
    stack, plain = pair_of_networks()
    outside = torch.compiler.disable(stack)
    run = torch.compile(lambda x: outside(x * 2).tanh() + 1, backend="eager")
    reset_counts()
    got = differentiated(stack, images(), run)
    assert counts()[backend, "weight_gradient"] > 0
    assert_alike(got, differentiated(plain, images(), lambda x: plain(x * 2).tanh() + 1))


def hook(network):
    network[4].register_forward_hook(lambda module, args, output: output * 2)


def weight_norm(network):
    nn.utils.parametrizations.weight_norm(network[3])


def old_weight_norm(network):
    nn.utils.weight_norm(network[3])


def spectral_norm(network):
    torch.manual_seed(2)
    nn.utils.parametrizations.spectral_norm(network[3])


def subclass(network):
    class Doubled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    network[3].__class__ = Doubled


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("change", "layer", "reason"),
    [
        (hook, "4", "BatchNorm2d .*runs as it is: it has hooks"),
        (weight_norm, "3", "Conv2d .*runs as it is: it is parametrised"),
        (old_weight_norm, "3", "Conv2d .*runs as it is: it has hooks"),
        (spectral_norm, "3", "Conv2d .*runs as it is: it is parametrised"),
        (subclass, "3", "Doubled .*runs as it is: Doubled may have a forward of its own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_changed_modules_run_as_they_are_and_explain_says_so(change, layer, reason, backend):
    stack, plain = pair_of_networks()
    for network in (stack, plain):
        change(network)
    got, want = differentiated(stack, images()), differentiated(plain, images())
    assert_alike(got, want)
    lines = {one.name: str(one) for one in explain(stack, images())}
    assert f"{backend} (one unit from layer 0 on," in lines["0"], "the blocks before it stay one unit"
    assert re.search(reason, lines[layer]), lines
