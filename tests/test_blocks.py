"""Blocks run one by one as in `nn.Sequential`; a training step runs on the operations and nothing else."""

import sys
from collections import Counter
from importlib import import_module

import pytest
import torch
from tolerance import assert_as_right_as_torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_device import DEVICE, MARKS

import fastgan
from fastgan import backends
from fastgan.nn import ConvStack, Discriminator, Generator

pytestmark = MARKS
BACKENDS = ["eager", "triton"]


def layers(**norm):
    torch.manual_seed(0)
    return [
        nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, **norm), nn.ReLU(),
        nn.ConvTranspose2d(5, 4, 4, 2, 1, output_padding=1), nn.BatchNorm2d(4, **norm), nn.LeakyReLU(0.1),
        nn.Dropout(0.0), nn.Conv2d(4, 2, 3), nn.Tanh(),
    ]  # fmt: skip


@pytest.mark.parametrize("norm", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_to_nn_sequential(backend, norm):
    blocks, plain = ConvStack(*layers(**norm)).double().to(DEVICE), nn.Sequential(*layers(**norm)).double().to(DEVICE)
    assert list(blocks.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(blocks.state_dict())
    for mode in (True, True, False):
        x = torch.randn(3, 3, 12, 12, dtype=torch.float64, device=DEVICE, requires_grad=True)
        with fastgan.use_backend(backend):
            got = blocks.train(mode)(x)
        want = plain.train(mode)(x)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        gradients = [
            torch.autograd.grad(out.square().sum(), [x, *net.parameters()])
            for out, net in ((got, blocks), (want, plain))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(blocks.state_dict(), plain.state_dict())


def fused(net, x):
    backends.reset_counts()
    with fastgan.use_backend("eager"):
        net(x)
    return sum(times for (_, name), times in backends.counts().items() if name in ("act", "bn_act"))


def test_a_block_with_hooks_runs_module_by_module():
    net, x, seen = ConvStack(*layers()), torch.randn(2, 3, 12, 12), []
    assert fused(net, x) == 3
    handle = net[3].register_forward_hook(lambda *_: seen.append("norm"))
    assert fused(net, x) == 2
    assert seen == ["norm"]
    handle.remove()
    assert fused(net, x) == 3


def test_parametrised_and_weight_normalised_layers_keep_their_weights():
    x = torch.randn(2, 3, 12, 12)
    for normalise in (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm):
        blocks, plain = ConvStack(*layers()).eval(), nn.Sequential(*layers()).eval()
        for net in (blocks, plain):
            torch.manual_seed(1)
            normalise(net[2])
        torch.testing.assert_close(blocks(x), plain(x))


def test_other_modules_are_not_touched():
    odd = [
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
    ]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(ConvStack(*odd)(x), nn.Sequential(*odd)(x))
    assert fused(ConvStack(*odd), x) == 0


def test_one_image_without_a_batch_dimension_is_refused_and_not_counted():
    stack = ConvStack(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    with pytest.raises(ValueError, match="expected 4D input"):
        nn.Sequential(*stack)(torch.randn(3, 8, 8))
    with pytest.raises(ValueError, match=r"ConvStack, layer 0: input must be \[N, C, H, W\]"):
        stack(torch.randn(3, 8, 8))
    assert not stack[1].running_mean.any()
    assert stack[1].num_batches_tracked == 0
    one, image = ConvStack(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2)), torch.randn(3, 8, 8)
    assert torch.equal(one(image), nn.Sequential(*one)(image))


def test_compile_whole():
    net, x = ConvStack(*layers()), torch.randn(2, 3, 12, 12)
    expected = net(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)


# --- a training step ------------------------------------------------------------------------------------------------

aten = torch.ops.aten
BATCH_NORM = {aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional,
              aten.cudnn_batch_norm, aten.miopen_batch_norm, aten._batch_norm_with_update}  # fmt: skip
ACTIVATION = {aten.leaky_relu, aten.leaky_relu_, aten.relu, aten.relu_, aten.threshold}
LOSS = {aten.binary_cross_entropy_with_logits, aten.log_sigmoid_forward, aten.softplus}
BACKWARD = {aten.native_batch_norm_backward, aten.leaky_relu_backward, aten.threshold_backward,
            aten.log_sigmoid_backward, aten.cudnn_batch_norm_backward}  # fmt: skip
HOMES = {import_module(f"fastgan.ops.{name}").__file__ for name in ("bn_act", "bn_act_eager", "gan_bce")}


class Watch(TorchDispatchMode):
    """Counts aten's batch_norm, activations and losses; notes each forward one not called by the eager backend."""

    def __init__(self):
        super().__init__()
        self.calls, self.strays = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        for kind, packets in (("batch_norm", BATCH_NORM), ("activation", ACTIVATION), ("loss", LOSS)):
            if packet in packets:
                self.calls[kind] += 1
                frame = sys._getframe()
                while frame is not None and frame.f_code.co_filename not in HOMES:
                    frame = frame.f_back
                if frame is None:
                    self.strays.append(str(func))
        self.calls["backward"] += packet in BACKWARD
        return func(*args, **(kwargs or {}))


def step(generator=None, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    nets = [(generator or Generator(16, 1, 6, 4)).to(DEVICE, dtype), Discriminator(16, 1, 4).to(DEVICE, dtype)]
    optimisers = [torch.optim.Adam(net.parameters()) for net in nets]
    latents, real = torch.randn(4, 6).to(DEVICE, dtype), torch.randn(4, 1, 16, 16).to(DEVICE, dtype)
    return fastgan.GanStep(*nets, *optimisers, latents=lambda _: latents), real


def test_a_default_step_calls_aten_only_in_the_eager_backend():
    one, real = step()
    with Watch() as watch:
        one(real)
    assert watch.strays == []
    one, real = step()
    backends.reset_counts()
    with backends.use_backend("eager"), Watch() as watch:
        one(real)
    if DEVICE == "cpu":
        assert backends.counts() == {("eager", "bn_act"): 5, ("eager", "act"): 3, ("eager", "gan_bce"): 2}
        assert (watch.calls["batch_norm"], watch.calls["activation"]) == (5, 8)


def test_a_step_on_triton_calls_none_of_them():
    one, real = step()
    backends.reset_counts()
    with fastgan.use_backend("triton"), Watch() as watch:
        metrics = one(real)
    assert watch.calls["batch_norm"] == watch.calls["activation"] == watch.calls["loss"] == watch.calls["backward"] == 0
    ran = backends.counts()
    assert {backend for backend, _ in ran} == {"triton"}
    assert ran["triton", "convolve_block_constants"] == 5
    assert ran["triton", "gan_bce"] == 2
    outcomes = [torch.stack(list(metrics.values()))]
    for dtype in (torch.float32, torch.float64):
        again, real = step(dtype=dtype)
        with fastgan.use_backend("eager"):
            outcomes.append(torch.stack(list(again(real).values())))
    assert_as_right_as_torch(*outcomes, "metrics")


def test_a_stray_call_is_noticed():
    class Stray(Generator):
        def forward(self, latents):
            return nn.functional.leaky_relu(super().forward(latents), 0.2)

    one, real = step(Stray(16, 1, 6, 4))
    with Watch() as watch:
        one(real)
    assert watch.strays == ["aten.leaky_relu.default"]
