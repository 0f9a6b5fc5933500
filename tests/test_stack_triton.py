"""ConvStack on the Triton kernels: a whole run of blocks against the same modules one by one, and a whole step."""

import copy
import re
from collections import Counter

import fastgan.kernels.conv_bn_act as kernels
import pytest
import torch
from test_conv_stack import AsBatches, TwoPasses, modules, network_input, outcome, small_networks
from tolerance import assert_as_right_as_torch, assert_pooled_as_right_as_torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from triton_device import DEVICE, MARKS

import fastgan
from fastgan import backends, first_use
from fastgan.backends import counts, reset_counts, use_backend
from fastgan.errors import BackendError
from fastgan.nn import Discriminator, Generator
from fastgan.nn.stack import ConvStack, why_unfused

pytestmark = MARKS


@pytest.mark.parametrize("penalty", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("name", ["down", "up", "mixed"])
def test_stack_is_the_sequence_in_fp64(name, training, penalty, dtype):
    plain = small_networks()[name].train(training).to(DEVICE, dtype)
    input = network_input(name, dtype).to(DEVICE)
    reset_counts()
    got = outcome(ConvStack(*plain), input, "triton", penalty)
    assert {backend for backend, _ in counts()} == {"triton"}
    assert counts()["triton", "convolve"] > 0
    for one, two in zip(got, outcome(plain, input, "eager", penalty), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_dcgan_is_as_right_as_eager(network, dtype):
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        made = (Generator(16, 3, 20, 16) if network == "generator" else Discriminator(16, 3, 16)).to(DEVICE, dtype)
        input = torch.randn((8, 20) if network == "generator" else (8, 3, 16, 16)).to(DEVICE, dtype)
        truth = outcome(copy.deepcopy(made).double(), input.double(), "eager")
        draws.append((outcome(made, input, "triton"), outcome(made, input, "eager"), truth))
    assert_pooled_as_right_as_torch(draws)  # the rule as it is, on every gradient too


@pytest.mark.parametrize("name", ["down", "up"])
def test_gradcheck_and_gradgradcheck_run_through_the_kernels(name):
    torch.manual_seed(4)
    up = [nn.ConvTranspose2d(3, 2, 4, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.ConvTranspose2d(2, 1, 4, 2, 1)]
    layers = modules(2, 3, 2) if name == "down" else up
    stack = ConvStack(*layers).double().to(DEVICE)
    input = torch.randn((2, 2, 8, 8) if name == "down" else (2, 3, 2, 2), dtype=torch.float64, device=DEVICE)
    parameters = list(stack.parameters())

    def run(input, *_):
        return stack(input)

    reset_counts()
    with use_backend("triton"):
        assert gradcheck(run, (input.requires_grad_(), *parameters), fast_mode=True)
        assert counts()["triton", "weight_gradient"] > 0
        assert gradgradcheck(run, (input, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.3}], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_options(options, training):
    torch.manual_seed(6)
    plain = nn.Sequential(*modules(3, 8, norm=lambda width: nn.BatchNorm2d(width, **options))).double().train(training)
    stack, input = ConvStack(*copy.deepcopy(plain)).to(DEVICE), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        with use_backend("triton"):
            got = stack(input.to(DEVICE))
        torch.testing.assert_close(got.cpu(), plain(input), rtol=1e-12, atol=1e-12)
    for one, two in zip(stack.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=1e-12, atol=1e-12)


def test_biases_frozen_norms_and_frozen_parameters():
    torch.manual_seed(7)
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.Conv2d(6, 4, 3), nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(4, 5, 3, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1),
    ).double().to(DEVICE)  # fmt: skip
    plain[1].eval()
    plain[3].weight.requires_grad_(False)
    plain[6].bias.requires_grad_(False)
    input = torch.randn(2, 3, 9, 8, dtype=torch.float64, device=DEVICE)

    def gradients(network, backend):
        with use_backend(backend):
            network(input).square().sum().backward()
        return [p.grad for p in network.parameters()]

    got, expected = gradients(ConvStack(*copy.deepcopy(plain)), "triton"), gradients(plain, "eager")
    for one, two in zip(got, expected, strict=True):
        assert (one is None) == (two is None)
        if two is not None:
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_autocast_keeps_parameters_and_their_gradients_in_fp32():
    torch.manual_seed(8)
    discriminator, images = Discriminator(16, 3, 8).to(DEVICE), torch.randn(4, 3, 16, 16, device=DEVICE)
    outputs = {}
    for backend in ("eager", "triton"):
        one = copy.deepcopy(discriminator)
        with use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
            output = one(images)
        output.float().sum().backward()
        outputs[backend] = (output, *(p.grad for p in one.parameters()))
    for got, own in zip(outputs["triton"], outputs["eager"], strict=True):
        assert got.dtype == own.dtype
        scale = own.float().abs().max()
        assert (got.float() - own.float()).abs().max() < 0.05 * scale
    assert outputs["triton"][0].dtype == torch.bfloat16


def test_two_batches_at_once_are_two_passes():
    stack = ConvStack(*modules(3, 4, 5)).double().to(DEVICE)
    input = torch.randn(4, 3, 8, 8, dtype=torch.float64, device=DEVICE)
    got, expected = (outcome(made(stack), input, "triton") for made in (AsBatches, TwoPasses))
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_groups_break_the_unit_and_explain_says_so():
    layers = [*modules(4, 8), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.LeakyReLU(0.2), *modules(8, 4)]
    stack, image = ConvStack(*layers).double().to(DEVICE), torch.randn(2, 4, 8, 8, dtype=torch.float64, device=DEVICE)
    layers = fastgan.explain(stack, image, backend="triton")
    assert [(layer.name, layer.operation, layer.decision.backend) for layer in layers] == [
        ("0", "conv_bn_act", "triton"), ("3", "convolution", "eager"), ("3", "bn_act", "triton"),
        ("5", "conv_bn_act", "triton"),
    ]  # fmt: skip
    assert "one unit" in layers[0].decision.reason
    assert "2 groups" in layers[1].decision.reason
    torch.testing.assert_close(outcome(stack, image, "triton")[0], outcome(stack, image, "eager")[0])


def explained_over_processes() -> list[str]:
    stack = nn.SyncBatchNorm.convert_sync_batchnorm(ConvStack(*modules(4, 8), nn.Conv2d(8, 1, 3)))
    return [str(layer) for layer in fastgan.explain(stack, torch.randn(2, 4, 8, 8), backend="triton")]


@pytest.mark.skipif(DEVICE != "cpu", reason="the two processes exchange host tensors")
def test_explain_names_who_runs_a_synchronised_block_and_why(pair):
    for lines in pair(explained_over_processes):
        convolution, norm, last = lines
        assert re.search(r"^0: convolution .* -> eager \(the library's: BatchNorm over several processes", convolution)
        assert re.search(r"^0: bn_act .* -> triton \(forced; over 2 processes\)", norm)
        assert re.search(
            r"^3: conv_bn_act .* -> triton \(one unit from layer 3 on, convolution by Triton kernels\)", last
        )


def test_kernels_of_a_step_by_name_and_number():
    """Nothing but convolutions: D's two BatchNorms are constants that these leave behind, in either direction."""
    discriminator = Discriminator(32, 1, 4).to(DEVICE)
    images = torch.randn(4, 1, 32, 32, device=DEVICE)
    reset_counts()
    with use_backend("triton"):
        discriminator(images).sum().backward()
    ran = Counter({name: times for (_, name), times in counts().items()})
    assert ran == {
        "convolve": 2 + 1, "convolve_block_constants": 2, "convolve_block_gradient_constants": 2, "weight_gradient": 4,
    }  # fmt: skip


def test_in_eval_batch_norm_is_folded_into_the_convolutions():
    """Each reads the output before it through its BatchNorm and activation; what is left is O(C) work."""
    discriminator, images = Discriminator(32, 1, 4).to(DEVICE).eval(), torch.randn(4, 1, 32, 32, device=DEVICE)
    reset_counts()
    with use_backend("triton"), torch.no_grad():
        discriminator(images)
    assert counts() == {("triton", "convolve"): 4, ("triton", "block_constants"): 2}


def test_one_tensor_is_kept_for_each_block():
    discriminator, images = Discriminator(16, 3, 8).to(DEVICE), torch.randn(4, 3, 16, 16, device=DEVICE)
    kept = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        discriminator(images)
    shapes = [tuple(t.shape) for t in kept if t.dim() == 4 and not isinstance(t, nn.Parameter)]
    assert sorted(shapes) == sorted([(4, 3, 16, 16), (4, 8, 8, 8), (4, 16, 4, 4)])


def test_the_same_bits_every_time():
    torch.manual_seed(9)
    generator, z = Generator(16, 3, 6, 4).to(DEVICE), torch.randn(5, 6, device=DEVICE)
    one, two = (outcome(generator, z, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def small_step(dtype):
    torch.manual_seed(0)
    nets = [Generator(16, 1, 6, 8).to(DEVICE, dtype), Discriminator(16, 1, 8).to(DEVICE, dtype)]
    step = fastgan.GanStep(*nets, *(torch.optim.SGD(net.parameters(), 1e-2) for net in nets))
    return nets, step, torch.randn(6, 1, 16, 16).to(DEVICE, dtype)


def test_a_whole_step_is_eager_s_in_every_weight_gradient_and_statistic():
    results = []
    for backend in ("triton", "eager"):
        nets, step, real = small_step(torch.float64)
        torch.manual_seed(1)
        with use_backend(backend):
            metrics = step(real)
        state = [t for net in nets for t in (*net.state_dict().values(), *(p.grad for p in net.parameters()))]
        results.append([*metrics.values(), *(t for t in state if t is not None)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_on_the_cpu_without_a_request_the_cpus_kernels_run():
    if DEVICE == "cpu":
        reset_counts()
        ConvStack(*modules(3, 16))(torch.randn(2, 3, 8, 8))
        assert not any(backend == "triton" for backend, _ in counts())
    with use_backend("triton"):
        assert why_unfused(torch.randn(2, 3, 8, 8, device=DEVICE)) is None
        assert "torch.int64" in why_unfused(torch.zeros(2, 3, 8, 8, dtype=torch.int64, device=DEVICE))


def test_a_request_that_cannot_run_raises_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(BackendError, match="'triton' runs on cuda tensors, the input is on cpu"):
        ConvStack(*modules(3, 8))(torch.randn(2, 3, 8, 8))


# --- the comparison at a kernel's first use ---------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch):
    """As on a card: each kernel is compared with the definition at its first use."""
    monkeypatch.setattr(backends, "_is_compared", lambda _: True)
    monkeypatch.setattr(first_use, "_verdicts", {})


def test_right_kernels_are_trusted(compared):
    torch.manual_seed(10)
    for dtype in (torch.float32, torch.bfloat16):
        network, images = Discriminator(16, 3, 8).to(DEVICE, dtype), torch.randn(6, 3, 16, 16).to(DEVICE, dtype)
        with use_backend("triton"):
            network(images.requires_grad_()).sum().backward()
    assert {name for _, name, *_ in first_use._verdicts} >= {
        "convolve", "weight_gradient", "convolve_block_constants", "convolve_block_gradient_constants",
    }  # fmt: skip
    assert not any(first_use._verdicts.values())


@pytest.mark.parametrize(
    "name", ["convolve", "weight_gradient", "convolve_block_constants", "convolve_block_gradient_constants"]
)
def test_a_wrong_kernel_is_disabled_by_name_and_training_goes_on(name, compared, monkeypatch):
    right = getattr(kernels, name)

    def wrong(*args):
        result = right(*args)
        return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(kernels, name, wrong)
    backends.kernel.cache_clear()
    try:
        monkeypatch.setattr(backends, "_PREFERRED_ON_CUDA", ("triton",))
        monkeypatch.setattr("fastgan.nn.stack._backend_of", lambda _: "triton")
        stack, images = ConvStack(*modules(3, 8, 8)).to(DEVICE), torch.randn(2, 3, 16, 16, device=DEVICE)
        with pytest.warns(RuntimeWarning, match=f"kernel {name} of backend 'triton' is disabled"):
            got = outcome(stack, images, None)
        for one, two in zip(got, outcome(nn.Sequential(*stack), images, "eager"), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    finally:
        backends.kernel.cache_clear()


# --- on a card --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cuda", reason="a card's own TF32; test_conv_bn_act_triton has the interpreter's")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_fp32_follows_the_switch_for_convolutions(precision):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        network, images = Discriminator(32, 3, 32).cuda(), torch.randn(8, 3, 32, 32, device="cuda")
        truth = outcome(copy.deepcopy(network).double(), images.double(), "eager")
        own, got = outcome(network, images, "eager"), outcome(network, images, "triton")
        assert_as_right_as_torch(got[0], own[0], truth[0])
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
