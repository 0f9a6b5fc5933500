"""Optimisers by name and the learning-rate schedule."""

import copy

import pytest
import torch

from fastgan import backends
from fastgan.errors import FastganError
from fastgan.optim import lr_scale, make_optimizer, set_lr

THEIRS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
SHAPES = [(3,), (4, 3, 2, 2), (1,), (17,)]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def descend(params, optimizer, times=3, skip=None):
    for i in range(times):
        for p in params:
            p.grad = None if p is skip and i == 1 else p.detach().sin()
        optimizer.step()


@pytest.mark.parametrize("name", THEIRS)
def test_every_optimizer_is_torchs(name):
    ours, plain = parameters(), parameters()
    optimizer = make_optimizer(ours, name, lr=0.1, betas=(0.5, 0.9), momentum=0.5, weight_decay=0.1)
    how = {"momentum": 0.5} if name == "sgd" else {"betas": (0.5, 0.9)}
    reference = THEIRS[name](plain, lr=0.1, weight_decay=0.1, foreach=False, **how)
    descend(ours, optimizer)
    descend(plain, reference)
    torch.testing.assert_close(ours, plain)
    assert not torch.equal(ours[0], parameters()[0])


@pytest.mark.parametrize("backend", [None, "eager", "cpu", "triton"])
def test_adam_averages_in_its_step(backend):
    """Whichever backend is forced: one without the kernel leaves the optimiser to the definition."""
    ours, plain = parameters(), parameters()
    averages, expected = ([p.detach().clone() for p in ps] for ps in (parameters(1), parameters(1)))
    optimizer, reference = make_optimizer(ours, lr=0.1), torch.optim.Adam(plain, lr=0.1, betas=(0.5, 0.999))
    backends.reset_counts()
    with backends.use_backend(backend):
        for _ in range(3):
            optimizer.follow(dict(zip(ours, averages, strict=True)), 0.75)
            descend(ours, optimizer, 1)
    for _ in range(3):
        descend(plain, reference, 1)
        torch._foreach_lerp_(expected, [p.detach() for p in plain], 0.25)
    torch.testing.assert_close((ours, averages), (plain, expected))
    ran = {name for name, _ in backends.counts()}
    assert ran == {"cpu"} if backend == "cpu" else ran <= {"cpu", "eager"}
    before = [a.clone() for a in averages]
    descend(ours, optimizer, 1)  # nothing to follow: once was asked for
    assert all(map(torch.equal, averages, before))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adams_state_is_torchs_in_both_directions(name):
    ours, plain = parameters(), parameters()
    optimizer, reference = make_optimizer(ours, name, lr=0.1), THEIRS[name](plain, lr=0.1, fused=True)
    descend(ours, optimizer)
    descend(plain, reference)
    state = optimizer.state_dict()
    assert state.keys() == reference.state_dict().keys()
    assert state["param_groups"][0].keys() == reference.state_dict()["param_groups"][0].keys()
    swapped, into_ours = THEIRS[name](ours), make_optimizer(plain, name, lr=1.0)
    swapped.load_state_dict(copy.deepcopy(state))
    into_ours.load_state_dict(copy.deepcopy(state))
    with torch.no_grad():
        torch._foreach_copy_(plain, ours)
    descend(ours, swapped)
    descend(plain, into_ours)
    torch.testing.assert_close(ours, plain)


def test_adam_when_a_parameter_sits_out_a_step():
    """Its bias correction then differs from the others': one step count for all would be wrong, also after loading."""
    ours, plain = parameters(), parameters()
    optimizer = make_optimizer(ours, lr=0.1, betas=(0.5, 0.9))
    reference = torch.optim.Adam(plain, lr=0.1, betas=(0.5, 0.9))
    averages = [p.detach().clone() for p in ours]
    optimizer.follow(dict(zip(ours, averages, strict=True)), 0.0)
    descend(ours, optimizer, skip=ours[1])
    descend(plain, reference, skip=plain[1])
    torch.testing.assert_close(ours, plain)
    loaded = make_optimizer(ours, lr=0.1)
    loaded.load_state_dict(optimizer.state_dict())
    descend(ours, loaded)
    descend(plain, reference)
    torch.testing.assert_close(ours, plain)


def test_adam_obeys_a_gradient_scaler():
    ours, before = parameters(), parameters()
    averages = [torch.zeros_like(p) for p in ours]
    optimizer = make_optimizer(ours, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for value in (float("inf"), 1.0):
        scaler.scale(sum(p.sum() for p in ours) * value).backward()
        optimizer.follow(dict(zip(ours, averages, strict=True)), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(map(torch.equal, ours, before)) == (value != 1.0)


def test_set_lr():
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_schedule_rises_stays_and_falls():
    scale = lambda kimg, decay: lr_scale(kimg, total_kimg=100, warmup_kimg=10, decay=decay)  # noqa: E731
    assert 0 < scale(0, "none") < 0.01
    assert scale(5, "none") == pytest.approx(0.5)
    assert scale(10, "none") == scale(99, "none") == 1
    assert scale(10, "cosine") == 1
    assert scale(55, "cosine") == pytest.approx(0.5)
    assert scale(100, "cosine") == pytest.approx(0, abs=1e-12)
    assert scale(200, "cosine") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_optimizer([torch.zeros(1)], "rmsprop", lr=1), "adam, adamw, sgd, got 'rmsprop'"),
        (lambda: make_optimizer([torch.zeros(1)], lr=0), "above 0, got 0"),
        (lambda: lr_scale(1, total_kimg=2, decay="linear"), "none, cosine, got 'linear'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(FastganError, match=message):
        call()
