"""GanStep against the stock example and against the formulas, and what it must not compute."""

import copy
from collections import Counter

import pytest
import stock_dcgan
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import Ema, GanStep, fuse, losses
from fastgan.backends import use_backend
from fastgan.errors import FastganError
from fastgan.nn import Discriminator, Generator
from fastgan.optim import Adam, make_optimizer
from fastgan.step import frozen


def networks(dtype=torch.float32, size=16, latent_dim=6):
    torch.manual_seed(0)
    return Generator(size, 1, latent_dim, 4).to(dtype), Discriminator(size, 1, 4).to(dtype)


def make_step(g, d, **options):
    lr = options.pop("lr", 1e-3)
    return GanStep(g, d, make_optimizer(g.parameters(), lr=lr), make_optimizer(d.parameters(), lr=lr), **options)


def real_batch(n=8, size=16, dtype=torch.float32, channels=1):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(7)).to(dtype) * 2 - 1


class WeightGradients(TorchDispatchMode):
    """Counts convolution backward calls, and those that compute the gradient of a weight."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.calls["all"] += 1
            self.calls["weight"] += args[-1][1]
        return func(*args, **(kwargs or {}))


def test_three_steps_equal_the_stock_example():
    stock_g = stock_dcgan.generator(8, 4, 3).double()
    stock_d = stock_dcgan.discriminator(4, 3).double()
    g, d = Generator(64, 3, 8, 4).double(), Discriminator(64, 3, 4).double()
    g.load_state_dict(stock_g.state_dict())
    d.load_state_dict(stock_d.state_dict())
    z = torch.randn(3, 5, 8, dtype=torch.float64)
    draws = iter(z)
    step = make_step(g, d, latents=lambda n: next(draws))
    stock = [make_optimizer(network.parameters(), lr=1e-3) for network in (stock_g, stock_d)]
    for index in range(3):
        real = real_batch(5, 64, torch.float64, 3) * (index + 1) / 3
        step(real)
        stock_dcgan.step(stock_g, stock_d, *stock, real, z[index][:, :, None, None])
    for ours, theirs in ((g, stock_g), (d, stock_d)):
        for (name, got), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_no_weight_gradient_of_the_discriminator_is_computed_in_the_generators_update():
    g, d = networks()
    convolutions_g = sum(isinstance(m, nn.ConvTranspose2d) for m in g.modules())
    convolutions_d = sum(isinstance(m, nn.Conv2d) for m in d.modules())
    step = make_step(g, d)
    with use_backend("eager"), WeightGradients() as counter:
        step(real_batch())
    # D learns from real and fake; G's update goes through D for the gradient of its input only.
    assert counter.calls["weight"] == 2 * convolutions_d + convolutions_g
    assert counter.calls["all"] == 3 * convolutions_d + convolutions_g


def test_the_counter_sees_the_stock_steps_waste():
    g, d = stock_dcgan.generator(6, 4, 1), stock_dcgan.discriminator(4, 1)
    optimizers = [make_optimizer(network.parameters(), lr=1e-3) for network in (g, d)]
    with WeightGradients() as counter:
        stock_dcgan.step(g, d, *optimizers, real_batch(4, 64), torch.randn(4, 6, 1, 1))
    assert counter.calls["weight"] == 3 * 5 + 5


def test_frozen_restores_after_an_exception_and_keeps_what_was_frozen_before():
    _, d = networks()
    first, *rest = d.parameters()
    first.requires_grad_(False)

    def fail_within():
        with frozen(d):
            assert not any(p.requires_grad for p in d.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert not first.requires_grad
    assert all(p.requires_grad for p in rest)


def test_a_failing_generator_update_leaves_the_discriminator_trainable():
    g, d = networks()
    step = make_step(g, d)
    step.loss = losses.Loss(losses.bce_discriminator, lambda logits: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(real_batch())
    assert all(p.requires_grad for p in d.parameters())


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_loss_trains_both_networks(loss):
    g, d = networks()
    before = [p.clone() for network in (g, d) for p in network.parameters()]
    metrics = make_step(g, d, loss=loss)(real_batch())
    assert set(metrics) == {"loss_g", "loss_d", "d_real", "d_fake"}
    assert all(value.dim() == 0 and value.isfinite() and not value.requires_grad for value in metrics.values())
    after = [p for network in (g, d) for p in network.parameters()]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_training_separates_real_from_fake():
    g, d = networks()
    step = make_step(g, d, generator_interval=1000)
    metrics = [step(real_batch()) for _ in range(60)]
    assert metrics[-1]["d_real"] > 0.9
    assert metrics[-1]["d_fake"] < 0.1
    assert "loss_g" in metrics[0]
    assert "loss_g" not in metrics[1]


def test_penalties_come_at_their_interval_with_their_weight():
    g, d = networks(torch.float64)
    seen = [set(make_step(g, d, r1=1.0)(real_batch(dtype=torch.float64))) >= {"r1"}]
    step = make_step(g, d, r1=1.0, r2=1.0, penalty_interval=3)
    for _ in range(6):
        seen.append({"r1", "r2"} <= set(step(real_batch(dtype=torch.float64))))
    assert seen == [True, True, False, False, True, False, False]


@pytest.mark.parametrize(("r1", "r2", "wgan_gp"), [(3.0, 0.0, 0.0), (0.0, 3.0, 0.0), (2.0, 1.0, 0.0), (0.0, 0.0, 5.0)])
def test_discriminator_gradient_with_penalties_is_that_of_the_formula(r1, r2, wgan_gp):
    g, d = networks(torch.float64)
    real = real_batch(dtype=torch.float64)
    z = torch.randn(8, 6, dtype=torch.float64)
    reference = Discriminator(16, 1, 4).double()
    reference.load_state_dict(d.state_dict())
    with torch.no_grad():
        fake = g(z)
    real_in, fake_in = real.clone().requires_grad_(), fake.clone().requires_grad_()
    real_logits, fake_logits = reference(real_in), reference(fake_in)
    expected = losses.bce_discriminator(real_logits, fake_logits)
    for gamma, logits, images in ((r1, real_logits, real_in), (r2, fake_logits, fake_in)):
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        expected = expected + gamma / 2 * 4 * gradient.square().sum((1, 2, 3)).mean()  # 4: the interval
    if wgan_gp:
        torch.manual_seed(5)
        between = losses.interpolate(real, fake)
        (gradient,) = torch.autograd.grad(reference(between).sum(), between, create_graph=True)
        expected = expected + wgan_gp * (gradient.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
    expected.backward()
    captured = []
    step = make_step(g, d, r1=r1, r2=r2, wgan_gp=wgan_gp, penalty_interval=4, latents=lambda n: z)
    step.opt_d.register_step_pre_hook(lambda *_: captured.extend(p.grad.clone() for p in d.parameters()))
    torch.manual_seed(5)
    step(real)
    assert len(captured) == len(list(reference.parameters()))
    for got, parameter in zip(captured, reference.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


@pytest.mark.parametrize("options", [{}, {"r1": 0.5, "r2": 0.1, "penalty_interval": 2}], ids=["plain", "penalised"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_joint_batches_train_as_separate_ones(backend, options):
    made = networks(torch.float64)
    states = []
    for joint in (False, True):
        g, d = copy.deepcopy(made)
        torch.manual_seed(3)
        with use_backend(backend):
            step = make_step(g, d, joint=joint, **options)
            for _ in range(3):
                metrics = step(real_batch(dtype=torch.float64))
        states.append([*g.state_dict().values(), *d.state_dict().values(), *metrics.values()])
    for one, two in zip(*states, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "images"),
    [
        (lambda d: None, [16, 8]),  # real and fake at once, then the generator's
        (lambda d: d.main.append(nn.Dropout2d()), [8, 8, 8]),
        (lambda d: d.main[0].register_forward_hook(lambda *_: None), [8, 8, 8]),
        (lambda d: nn.utils.parametrizations.spectral_norm(d.main[0]), [8, 8, 8]),
        (lambda d: setattr(d, "main", nn.Sequential(*d.main)), [8, 8, 8]),
        (lambda d: setattr(d.main, "forward", d.main.forward), [8, 8, 8]),
        (lambda d: setattr(d.main[3], "__class__", type("Mixing", (nn.BatchNorm2d,), {})), [8, 8, 8]),
    ],
    ids=["own", "dropout", "hook", "spectral norm", "no stack", "forward", "derived"],
)
def test_batches_are_joined_by_themselves_where_that_changes_nothing(change, images, monkeypatch):
    g, d = networks()
    change(d)
    seen, forward = [], type(d).forward
    monkeypatch.setattr(type(d), "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    make_step(g, d)(real_batch())
    assert seen == images
    seen.clear()
    make_step(g, d, joint=False)(real_batch())
    assert seen == [8, 8, 8]


@pytest.mark.parametrize("real", [real_batch().to(torch.uint8), real_batch().half(), real_batch(size=32)])
def test_images_that_do_not_fit_are_refused_as_if_apart(real):
    messages = []
    for joint in (None, False):
        with pytest.raises((FastganError, RuntimeError)) as error:
            make_step(*networks(), joint=joint)(real)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_batches_are_apart_in_steps_with_penalties(monkeypatch):
    g, d = networks()
    seen, forward = [], type(d).forward
    monkeypatch.setattr(type(d), "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    step = make_step(g, d, r1=0.5, penalty_interval=2)
    step(real_batch())
    step(real_batch())
    assert seen == [8, 8, 8, 16, 8]


def test_joint_batches_need_their_norms_in_stacks():
    g, d = networks()
    d.main = torch.nn.Sequential(*d.main)
    with pytest.raises(FastganError, match=r"main\.3 is in none; call fastgan\.fuse"):
        make_step(g, d, joint=True)
    make_step(g, fuse(d), joint=True)


def test_clipping_bounds_the_norm():
    g, d = networks()
    norms = []
    step = make_step(g, d, clip_grad=1e-3)
    for optimizer, network in ((step.opt_g, g), (step.opt_d, d)):
        optimizer.register_step_pre_hook(
            lambda *_, n=network: norms.append(torch.cat([p.grad.flatten() for p in n.parameters()]).norm().item())
        )
    step(real_batch())
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_discriminator_statistics_are_updated_three_times_as_in_the_stock_step():
    g, d = networks()
    make_step(g, d)(real_batch())
    assert d.main[3].num_batches_tracked == 3
    assert g.main[1].num_batches_tracked == 1


def test_bf16_autocast_trains_fp32_weights():
    g, d = networks()
    step = make_step(g, d, autocast=torch.bfloat16, r1=1.0, penalty_interval=2)
    values = [step(real_batch()) for _ in range(2)]
    assert all(value.dtype == torch.float32 and value.isfinite() for entry in values for value in entry.values())
    assert {p.dtype for network in (g, d) for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("network", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16])
def test_penalties_take_what_the_step_takes(network, images):
    g, d = networks(network)
    autocast = torch.bfloat16 if network != images else None
    step = make_step(g, d, r1=1.0, r2=1.0, wgan_gp=1.0, autocast=autocast)
    assert all(value.isfinite() for value in step(real_batch(dtype=images)).values())


def test_penalties_are_in_full_precision_within_the_callers_autocast():
    g, d = networks()
    seen = []
    d.main[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        make_step(g, d, r1=1.0)(real_batch())
    assert seen == [torch.float32, torch.float32, torch.bfloat16]  # D(x) and D(G(z)), then G's update


def test_shared_parameters_are_refused():
    g, d = networks()
    d.main[2].weight = g.main[3].weight
    with pytest.raises(FastganError, match="share 1 parameters"):
        make_step(g, d)


def test_own_networks_need_only_say_their_latent_length():
    g = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    d = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    metrics = make_step(g, d, latent_dim=3)(torch.randn(5, 1, 4, 4))
    assert metrics["loss_d"].isfinite()
    with pytest.raises(FastganError, match="Sequential has no attribute latent_dim; pass latent_dim"):
        make_step(g, d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "wgan"}, "loss must be one of .*got 'wgan'"),
        ({"loss": "hinge", "real_target": 0.9}, "hinge has no targets"),
        ({"real_target": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"r1": -1.0}, "r1 must be at least 0, got -1.0"),
        ({"penalty_interval": 0}, "penalty_interval must be at least 1, got 0"),
        ({"clip_grad": 0.0}, "clip_grad must be above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(FastganError, match=message):
        make_step(*networks(), **options)


def test_averaging_in_the_optimisers_step_changes_nothing():
    """One pass over memory or two: the same average, of parameters and of running statistics."""
    results = []
    for optimiser in (Adam, torch.optim.Adam):
        g, d = networks()
        opt_g, opt_d = (optimiser(net.parameters(), lr=1e-2, betas=(0.5, 0.999)) for net in (g, d))
        ema = Ema(g, 0.1)
        step = GanStep(g, d, opt_g, opt_d, ema=ema, generator_interval=2)
        torch.manual_seed(1)
        for _ in range(4):
            step(real_batch())
        results.append([*ema.module.state_dict().values(), *g.state_dict().values()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class TestEma:
    def test_half_life(self):
        module = nn.Linear(1, 1, bias=False)
        ema = Ema(module, half_life_kimg=1.0, ramp_up=0)
        start = ema.module.weight.item()
        with torch.no_grad():
            module.weight.fill_(start + 1)
        for image in range(0, 1000, 100):
            ema.update(module, 100, image)
        assert ema.module.weight.item() == pytest.approx(start + 0.5, abs=1e-5)

    def test_ramp_up_forgets_the_initial_weights_early(self):
        ema = Ema(nn.Linear(1, 1), half_life_kimg=10.0, ramp_up=0.05)
        assert ema.decay(64, 0) == pytest.approx(0.5**20)
        assert ema.decay(64, 2000) == pytest.approx(0.5 ** (64 / 100))
        assert ema.decay(64, 10**6) == pytest.approx(0.5 ** (64 / 10_000))

    def test_running_statistics_are_averaged_and_counters_copied(self):
        module = nn.BatchNorm1d(2)
        ema = Ema(module, half_life_kimg=1.0, ramp_up=0)
        module(torch.randn(8, 2) + 3)
        ema.update(module, 1000, 0)
        torch.testing.assert_close(ema.module.running_mean, module.running_mean / 2)
        assert ema.module.num_batches_tracked == module.num_batches_tracked == 1

    def test_vectors_of_spectral_normalisation_are_copied(self):
        module = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        ema = Ema(module, half_life_kimg=1.0, ramp_up=0)
        with torch.no_grad():
            for _ in range(5):
                module.parametrizations.weight.original.copy_(torch.randn(4, 4))
                module(torch.randn(2, 4))
                ema.update(module, 500, 0)
        state, average = module.state_dict(), ema.module.state_dict()
        for name in ("parametrizations.weight.0._u", "parametrizations.weight.0._v"):
            assert torch.equal(average[name], state[name])

    def test_16_bits_are_refused(self):
        with pytest.raises(FastganError, match=r"weight is torch.bfloat16; expected fp32"):
            Ema(nn.Linear(1, 1).bfloat16())

    def test_it_is_in_eval_mode_and_has_a_life_of_its_own(self):
        module = nn.BatchNorm1d(2)
        ema = Ema(module)
        assert not ema.module.training
        assert module.training
        assert not any(p.requires_grad for p in ema.module.parameters())
        assert ema.module.weight is not module.weight

    @pytest.mark.parametrize(("options", "message"), [((0.0,), "half_life_kimg"), ((1.0, 2.0), "ramp_up")])
    def test_bad_options(self, options, message):
        with pytest.raises(FastganError, match=message):
            Ema(nn.Linear(1, 1), *options)

    def test_the_step_updates_it_after_the_generator(self):
        g, d = networks()
        ema = Ema(g, half_life_kimg=0.004, ramp_up=0)  # a batch of 8 is two half-lives
        start = [p.clone() for p in ema.module.parameters()]
        make_step(g, d, ema=ema)(real_batch())
        for old, now, average in zip(start, g.parameters(), ema.module.parameters(), strict=True):
            torch.testing.assert_close(average, old * 0.25 + now * 0.75)
