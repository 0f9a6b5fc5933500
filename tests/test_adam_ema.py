"""adam_ema: the definition is torch's fused optimiser followed by lerp; the CUDA kernel agrees, run on the host."""

from itertools import product

import pytest
import torch


from fastgan.ops.adam_ema import adam_ema
from fastgan.tolerance import misses
from simt import run_clean, simt, to_output

SHAPES = [(1,), (7,), (64, 3, 4, 4), (4096,), (5001,), (0,), (3, 1)]
OPTIONS = {"lr": 1e-2, "beta1": 0.5, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "decoupled": False}


def network(dtype=torch.float32, seed=0, shapes=SHAPES):
    """Lists params, grads, exp_avgs, exp_avg_sqs and ema of a network in the middle of training."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes]

    return draw(1.0), draw(0.1), draw(0.1), [v.square() for v in draw(0.1)], draw(1.0)


def copies(lists, dtype=None):
    return tuple([t.clone().to(dtype or t.dtype) for t in tensors] for tensors in lists)


def changed(lists):
    return tuple(t for tensors in (lists[0], *lists[2:]) for t in tensors if t.numel())


def by_hand(lists, step, *, lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay):
    """The equations of the two papers."""
    for param, grad, m, v, ema in zip(*lists, strict=True):
        g = grad if decoupled else grad + weight_decay * param
        start = param * (1 - lr * weight_decay) if decoupled else param
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        param.copy_(start - lr * m_hat / (v_hat.sqrt() + eps))
        ema.copy_(ema_decay * ema + (1 - ema_decay) * param)


def on_the_host(lists, step, seed, *, lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay):
    arrays = [[to_output(t) for t in tensors if t.numel()] for tensors in lists]
    numbers = (lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay)
    run_clean(simt().adam_ema, *arrays, to_output(step), *numbers, seed=seed)


@pytest.mark.parametrize(("decoupled", "step"), list(product([False, True], [1, 10])))
def test_definition_is_the_papers(decoupled, step):
    lists = network(torch.float64)
    expected = copies(lists)
    options = {**OPTIONS, "decoupled": decoupled, "ema_decay": 0.9}
    by_hand(expected, step, **options)
    adam_ema(*lists, torch.tensor([float(step)]), **options, backend="eager")
    for got, want in zip(changed(lists), changed(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.AdamW])
def test_definition_is_torchs_optimiser_then_lerp(optimiser):
    params, grads, exp_avgs, exp_avg_sqs, ema = network()
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(t) for t in ts] for ts in (exp_avgs, exp_avg_sqs))
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    their_ema = [t.clone() for t in ema]
    opt = optimiser(theirs, lr=1e-2, betas=(0.5, 0.99), weight_decay=0.01, fused=True)
    step = torch.zeros(1)
    decoupled = optimiser is torch.optim.AdamW
    for _ in range(3):
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        opt.step()
        torch._foreach_lerp_(their_ema, [p.detach() for p in theirs], 0.1)
        step += 1
        numbers = {"lr": 1e-2, "beta1": 0.5, "beta2": 0.99, "weight_decay": 0.01, "decoupled": decoupled}
        adam_ema(params, grads, exp_avgs, exp_avg_sqs, ema, step, **numbers, ema_decay=0.9, backend="eager")
    for got, want in zip([*params, *ema], [*theirs, *their_ema], strict=True):
        assert torch.equal(got, want.detach())


@pytest.mark.parametrize(("decoupled", "step"), list(product([False, True], [1, 1000])))
def test_cuda_kernel_against_the_definition(decoupled, step):
    options = {**OPTIONS, "decoupled": decoupled, "ema_decay": 0.999}
    lists, at = network(), torch.tensor([float(step)])
    own, truth, again = copies(lists), copies(lists, torch.float64), copies(lists)
    adam_ema(*own, at, **options, backend="eager")
    adam_ema(*truth, at, **options, backend="eager")
    on_the_host(lists, at, 0, **options)
    on_the_host(again, at, 5, **options)
    for which in (0, 2, 3, 4):
        reason = misses(*(torch.cat([t.flatten() for t in of[which]]) for of in (lists, own, truth)))
        assert reason is None, (which, reason)
    assert all(map(torch.equal, changed(lists), changed(again)))


def test_cuda_kernel_takes_more_tensors_than_one_launch_holds():
    shapes = [(3 + i % 5,) for i in range(101)]
    lists, at = network(shapes=shapes), torch.ones(1)
    own = copies(lists)
    options = {**OPTIONS, "ema_decay": 0.9}
    adam_ema(*own, at, **options, backend="eager")
    on_the_host(lists, at, 0, **options)
    for got, want in zip(changed(lists), changed(own), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_cuda_kernel_without_ema_and_at_odd_addresses():
    lists = [[torch.empty(34)[1:].copy_(t[0])] for t in network(shapes=[(33,)])]
    assert lists[0][0].data_ptr() % 16 == 4
    own = copies(lists)
    adam_ema(*own[:4], [], torch.ones(1), **OPTIONS, backend="eager")
    before = lists[4][0].clone()
    on_the_host([*lists[:4], []], torch.ones(1), 0, **OPTIONS, ema_decay=0.5)
    torch.testing.assert_close(lists[0][0], own[0][0], rtol=1e-6, atol=1e-7)
    assert torch.equal(lists[4][0], before)


def test_bad_lists_are_named():
    params, grads, m, v, ema = network()
    step = torch.ones(1)
    with pytest.raises(ValueError, match=r"adam_ema: grads must have one tensor per parameter, 7, got 6"):
        adam_ema(params, grads[1:], m, v, ema, step, lr=0.1)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] must be like params\[0\], \[1\] torch.float32.*\[2\]"):
        adam_ema(params, grads, [torch.zeros(2), *m[1:]], v, ema, step, lr=0.1)


def test_no_parameters_is_no_work():
    adam_ema([], [], [], [], [], torch.ones(1), lr=0.1)
