"""Optimisers by name and the learning-rate schedule."""

import pytest
import torch

from fastgan.errors import FastganError
from fastgan.optim import lr_scale, make_optimizer, set_lr


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_every_optimizer_is_torchs_fused_one_and_equals_the_plain_one(name):
    torch.manual_seed(0)
    ours, plain = (torch.nn.Parameter(torch.arange(6.0)) for _ in range(2))
    optimizer = make_optimizer([ours], name, lr=0.1, betas=(0.5, 0.9), momentum=0.5, weight_decay=0.1)
    assert optimizer.defaults["fused"] is True
    keywords = {key: value for key, value in optimizer.defaults.items() if key not in ("fused", "foreach")}
    if name == "adamw":  # torch's AdamW fixes it itself
        keywords.pop("decoupled_weight_decay")
    reference = type(optimizer)([plain], **keywords, foreach=False)
    for _ in range(3):
        for parameter in (ours, plain):
            parameter.grad = parameter.detach().sin()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, plain)
    assert not torch.equal(ours, torch.arange(6.0))


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
