"""Losses against their formulas in fp64, at extreme logits, and through two derivatives."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastgan import losses
from fastgan.errors import FastganError
from fastgan.nn import Discriminator


def logits(seed, n=7):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


def d(x):  # the discriminator's output, as the textbook writes it
    return 1 / (1 + torch.exp(-x))


REAL, FAKE = logits(1), logits(2)
FORMULAS = {
    "non_saturating": (
        -(torch.log(d(REAL)).mean() + torch.log(1 - d(FAKE)).mean()),
        -torch.log(d(FAKE)).mean(),
    ),
    "minimax": (
        -(torch.log(d(REAL)).mean() + torch.log(1 - d(FAKE)).mean()),
        torch.log(1 - d(FAKE)).mean(),
    ),
    "least_squares": (
        0.5 * ((REAL - 1) ** 2).mean() + 0.5 * (FAKE**2).mean(),
        0.5 * ((FAKE - 1) ** 2).mean(),
    ),
    "hinge": (
        (1 - REAL).clamp(min=0).mean() + (1 + FAKE).clamp(min=0).mean(),
        -FAKE.mean(),
    ),
    "wasserstein": (FAKE.mean() - REAL.mean(), -FAKE.mean()),
    "relativistic_average": (
        -torch.log(d(REAL - FAKE.mean())).mean() - torch.log(1 - d(FAKE - REAL.mean())).mean(),
        -torch.log(d(FAKE - REAL.mean())).mean() - torch.log(1 - d(REAL - FAKE.mean())).mean(),
    ),
    "relativistic_paired": (
        -torch.log(d(REAL - FAKE)).mean(),
        -torch.log(d(FAKE - REAL)).mean(),
    ),
}


def play(name, real, fake):
    loss = losses.get_loss(name)
    return loss.discriminator(real, fake), loss.generator(fake, real) if loss.paired else loss.generator(fake)


def test_every_loss_has_its_formula_here():
    assert FORMULAS.keys() == losses.LOSSES.keys()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_formula(name):
    for got, expected in zip(play(name, REAL, FAKE), FORMULAS[name], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_two_derivatives(name):
    for side in (0, 1):
        inputs = (REAL.clone().requires_grad_(), FAKE.clone().requires_grad_())
        function = lambda real, fake: play(name, real, fake)[side]  # noqa: B023, E731
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("extreme", [100.0, -100.0])
def test_extreme_logits_stay_finite_in_fp32(name, extreme):
    for real, fake in ((extreme, extreme), (extreme, -extreme)):
        inputs = [torch.full((4,), value, requires_grad=True) for value in (real, fake)]
        for loss in play(name, *inputs):
            assert loss.isfinite()
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
            assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_a_sure_discriminator_still_teaches_a_non_saturating_generator():
    fake = torch.full((4,), -100.0, requires_grad=True)
    (strong,) = torch.autograd.grad(losses.non_saturating_generator(fake), fake)
    (vanished,) = torch.autograd.grad(losses.minimax_generator(fake), fake)
    assert strong.abs().min() == pytest.approx(0.25)
    assert vanished.abs().max() < 1e-30


def test_the_discriminator_maximises_v_and_the_generator_minimises_it():
    confused = losses.value(torch.zeros(3), torch.zeros(3))
    assert confused == pytest.approx(-math.log(4))
    right = losses.value(torch.full((3,), 5.0), torch.full((3,), -5.0))
    assert right > confused
    assert losses.bce_discriminator(torch.full((3,), 5.0), torch.full((3,), -5.0)) == pytest.approx(-right.item())
    better_fakes = losses.value(torch.full((3,), 5.0), torch.full((3,), 5.0))
    assert better_fakes < right
    assert losses.minimax_generator(torch.full((3,), 5.0)) < losses.minimax_generator(torch.full((3,), -5.0))


@pytest.mark.parametrize("name", [name for name, loss in losses.LOSSES.items() if loss.smoothable])
def test_one_sided_smoothing_moves_only_the_real_target(name):
    discriminator = losses.get_loss(name).discriminator
    if name == "least_squares":
        expected = 0.5 * ((REAL - 0.9) ** 2).mean() + 0.5 * (FAKE**2).mean()
    else:
        x = {"relativistic_average": REAL - FAKE.mean(), "relativistic_paired": REAL - FAKE}.get(name, REAL)
        smooth = -(0.9 * torch.log(d(x)) + 0.1 * torch.log(1 - d(x))).mean()
        hard = -torch.log(d(x)).mean()
        expected = FORMULAS[name][0] - hard + smooth
    torch.testing.assert_close(discriminator(REAL, FAKE, 0.9), expected)


def quadratic(images, scale=1.0):
    return scale * images.flatten(1).square().sum(1)


def test_gradient_penalty_is_the_mean_squared_norm():
    images = torch.randn(5, 2, 3, 3, dtype=torch.float64).requires_grad_()
    penalty = losses.gradient_penalty(quadratic(images), images)
    torch.testing.assert_close(penalty, (2 * images).flatten(1).square().sum(1).mean())
    (gradient,) = torch.autograd.grad(penalty, images)
    torch.testing.assert_close(gradient, 8 * images / 5)


def test_wgan_penalty_is_the_squared_distance_of_the_norm_to_one():
    images = torch.randn(5, 1, 3, 3, dtype=torch.float64).requires_grad_()
    penalty = losses.wgan_gradient_penalty(quadratic(images), images)
    torch.testing.assert_close(penalty, ((2 * images).flatten(1).norm(dim=1) - 1).square().mean())


def test_wgan_penalty_of_an_image_without_influence_has_a_finite_gradient():
    weight = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    images = torch.randn(2, 1, 3, 3, dtype=torch.float64).requires_grad_()
    penalty = losses.wgan_gradient_penalty(images.flatten(1) @ weight, images)
    assert penalty == 1
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert gradient.isfinite().all()


def test_interpolation_lies_between():
    real, fake = torch.ones(64, 1, 2, 2), torch.zeros(64, 1, 2, 2)
    between = losses.interpolate(real, fake)
    assert between.requires_grad
    assert between.is_leaf
    assert ((between >= 0) & (between <= 1)).all()
    assert (between == between[:, :, :1, :1]).all()  # one share for each pair
    assert between[:, 0, 0, 0].std() > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.get_loss("hing"), "one of non_saturating, minimax.*got 'hing'"),
        (lambda: losses.relativistic_paired_generator(REAL, FAKE[:3]), r"equal shapes, got \[3\] and \[7\]"),
        (lambda: losses.gradient_penalty(REAL, torch.zeros(7, 1, 2, 2)), "requires_grad"),
    ],
)
def test_errors(call, message):
    with pytest.raises(FastganError, match=message):
        call()


@pytest.mark.parametrize("penalty", [losses.gradient_penalty, losses.wgan_gradient_penalty])
def test_a_penalty_through_compiled_code_says_what_to_do(penalty):
    """PyTorch refuses the second derivative only in backward(), and does not say what to do."""
    discriminator = Discriminator(16, 1, 4)
    images = torch.randn(4, 1, 16, 16, requires_grad=True)
    for compiled in (
        torch.compile(discriminator, backend="aot_eager"),
        torch.nn.Sequential(discriminator, torch.compile(torch.nn.Tanh(), backend="aot_eager")),
    ):
        with pytest.raises(FastganError, match="cannot differentiate that twice"):
            penalty(compiled(images), images)
    penalty(discriminator(images), images).backward()


def test_pytorch_itself_refuses_second_derivatives_of_compiled_code():
    """When this fails, PyTorch can differentiate compiled code twice, and the penalties need not refuse it."""
    x = torch.randn(3, requires_grad=True)
    y = torch.compile(torch.sin, backend="aot_eager")(x)
    assert y.grad_fn.name() == "CompiledFunctionBackward"
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        g.sum().backward()
