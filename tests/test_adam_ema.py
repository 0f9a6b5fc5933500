"""adam_ema: the definition is torch's fused optimiser followed by lerp; the kernels agree, CUDA's run on the host."""

from itertools import product

import pytest
import torch
from simt import run_clean, simt, to_output
from tolerance import assert_as_right_as_torch

from fastgan import backends
from fastgan.errors import BackendError
from fastgan.ops.adam_ema import adam_ema

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


def assert_right(lists, own, truth):
    """By the tolerance rule, the tensors of a list together, as a small one may be lucky."""
    for which, name in ((0, "params"), (2, "exp_avgs"), (3, "exp_avg_sqs"), (4, "ema")):
        assert_as_right_as_torch(*(torch.cat([t.flatten() for t in of[which]]) for of in (lists, own, truth)), name)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize(("decoupled", "step"), list(product([False, True], [1, 10])))
def test_definition_is_the_papers(decoupled, step, dtype):
    lists = network(dtype)
    expected = copies(lists)
    options = {**OPTIONS, "decoupled": decoupled, "ema_decay": 0.9}
    by_hand(expected, step, **options)
    adam_ema(*lists, torch.tensor([float(step)]), **options, backend="eager")
    for got, want in zip(changed(lists), changed(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_the_definition_gives_torchs_fused_kernel_one_dtype_at_a_time(monkeypatch):
    """On CUDA it refuses lists of several; bf16 convolutions beside fp32 BatchNorm are two."""
    seen, fused = [], torch._fused_adam_

    def one_dtype(params, *args, **options):
        seen.append({param.dtype for param in params})
        fused(params, *args, **options)

    monkeypatch.setattr(torch, "_fused_adam_", one_dtype)
    apart = [network(dtype, seed=index) for index, dtype in enumerate((torch.float32, torch.bfloat16))]
    mixed = [[t.clone() for pair in zip(*tensors, strict=True) for t in pair] for tensors in zip(*apart, strict=True)]
    for lists in (*apart, mixed):
        adam_ema(*lists, torch.ones(1), **OPTIONS, ema_decay=0.9, backend="eager")
    assert seen == 2 * [{torch.float32}, {torch.bfloat16}]
    for got, *parts in zip(mixed, *apart, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(got, (t for p in zip(*parts, strict=True) for t in p), strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.AdamW])
def test_definition_is_torchs_optimiser_then_lerp(optimiser, dtype):
    params, grads, exp_avgs, exp_avg_sqs, ema = network(dtype)
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
    for got, want in zip([*params, *ema], [*theirs, *their_ema], strict=True):  # bits: the same calls of torch
        assert torch.equal(got, want.detach())


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize(("decoupled", "step"), list(product([False, True], [1, 1000])))
def test_cuda_kernel_against_the_definition(decoupled, step, dtype):
    options = {**OPTIONS, "decoupled": decoupled, "ema_decay": 0.999}
    lists, at = network(dtype), torch.tensor([float(step)])
    own, truth, again = copies(lists), copies(lists, torch.float64), copies(lists)
    adam_ema(*own, at, **options, backend="eager")
    adam_ema(*truth, at, **options, backend="eager")
    on_the_host(lists, at, 0, **options)
    on_the_host(again, at, 5, **options)
    assert_right(lists, own, truth)
    assert all(map(torch.equal, changed(lists), changed(again)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("decoupled", "step", "ema_decay"), [(False, 1, 0.999), (True, 1000, 0.999), (False, 3, 0.2)])
def test_cpu_kernel_against_the_definition(decoupled, step, ema_decay, dtype):
    options = {**OPTIONS, "decoupled": decoupled, "ema_decay": ema_decay}
    shapes = [*SHAPES, (3, 16385)]  # one element past a task of the kernel
    lists, at = network(dtype, shapes=shapes), torch.tensor([float(step)])
    own, truth = copies(lists), copies(lists, torch.float64)
    adam_ema(*own, at, **options, backend="eager")
    before = backends.counts().get(("cpu", "adam_ema"), 0)
    adam_ema(*lists, at, **options, backend="cpu")
    assert backends.counts()["cpu", "adam_ema"] == before + 1
    if dtype == torch.float64:
        by_hand(truth, step, **options)
        for got, want in zip(changed(lists), changed(truth), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        return
    adam_ema(*truth, at, **options, backend="eager")
    assert_right(lists, own, truth)


def test_cpu_kernel_gives_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            lists = network(shapes=[(70001,), (3,), (40000,)])
            adam_ema(*lists, torch.ones(1), **OPTIONS, ema_decay=0.9, backend="cpu")
            results.append(changed(lists))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_cpu_kernel_without_ema_and_in_any_dense_layout():
    lists = [[t[0].view(2, 3, 4, 5).to(memory_format=torch.channels_last)] for t in network(shapes=[(120,)])]
    own, truth = copies(lists), copies(lists, torch.float64)
    for definition in (own, truth):
        adam_ema(*definition[:4], [], torch.ones(1), **OPTIONS, backend="eager")
    before = lists[4][0].clone()
    adam_ema(*lists[:4], [], torch.ones(1), **OPTIONS, ema_decay=0.5, backend="cpu")
    assert_right(lists, own, truth)
    assert torch.equal(lists[4][0], before)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_parameter_without_elements_is_left_as_it_is(backend):
    lists = network(shapes=[(3, 0), (5,)])
    before = lists[0][1].clone()
    adam_ema(*lists, torch.ones(1), **OPTIONS, backend=backend)
    assert lists[0][0].shape == (3, 0)
    assert not torch.equal(lists[0][1], before)


def test_16_bits_are_the_definitions_or_an_error():
    half = network(torch.bfloat16, shapes=[(5,)])
    with pytest.raises(
        BackendError, match=r"takes parameters of one dtype, torch.float32 or torch.float64, got torch.bfl"
    ):
        adam_ema(*half, torch.ones(1), **OPTIONS, backend="cpu")
    own = copies(half)
    adam_ema(*own, torch.ones(1), **OPTIONS, backend="eager")
    adam_ema(*half, torch.ones(1), **OPTIONS)
    assert all(map(torch.equal, changed(half), changed(own)))


def test_parameters_with_gaps_are_refused():
    """torch's fused optimiser would update what lies between the elements instead."""
    gaps = [[torch.zeros(8)[::2]] for _ in range(5)]
    for backend in (None, "eager", "cpu"):
        with pytest.raises(ValueError, match=r"params\[0\] must fill its memory without gaps.*strides \(2,\)"):
            adam_ema(*gaps, torch.ones(1), **OPTIONS, backend=backend)


def test_cpu_takes_its_kernel_from_the_measured_size_on(monkeypatch):
    row = backends.Measured(100, "cpu", "avx2", 1.5)
    monkeypatch.setattr(backends, "_measured", lambda: {("adam_ema", "float32", "contiguous", ()): row})
    for elements, backend in ((99, "eager"), (100, "cpu")):
        backends.reset_counts()
        adam_ema(*network(shapes=[(9,), (elements - 9,)]), torch.ones(1), **OPTIONS)
        assert set(backends.counts()) == {(backend, "adam_ema")}


def test_cuda_kernel_takes_more_tensors_than_one_launch_holds():
    shapes = [(3 + i % 5,) for i in range(101)]
    lists, at = network(shapes=shapes), torch.ones(1)
    own, truth = copies(lists), copies(lists, torch.float64)
    options = {**OPTIONS, "ema_decay": 0.9}
    for definition in (own, truth):
        adam_ema(*definition, at, **options, backend="eager")
    on_the_host(lists, at, 0, **options)
    assert_right(lists, own, truth)


@pytest.mark.parametrize("odd", [0, 1])
def test_cuda_kernel_without_ema_and_at_odd_addresses(odd):
    lists = [[torch.empty(34)[odd:][:33].copy_(t[0])] for t in network(shapes=[(33,)])]
    assert lists[0][0].data_ptr() % 16 == 4 * odd
    own, truth = copies(lists), copies(lists, torch.float64)
    for definition in (own, truth):
        adam_ema(*definition[:4], [], torch.ones(1), **OPTIONS, backend="eager")
    before = lists[4][0].clone()
    on_the_host([*lists[:4], []], torch.ones(1), 0, **OPTIONS, ema_decay=0.5)
    assert_right(lists, own, truth)
    assert torch.equal(lists[4][0], before)


def test_bad_lists_are_named():
    params, grads, m, v, ema = network()
    step = torch.ones(1)
    with pytest.raises(ValueError, match=r"adam_ema: grads must have one tensor per parameter, 7, got 6"):
        adam_ema(params, grads[1:], m, v, ema, step, lr=0.1)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] must be like params\[0\], \[1\] torch.float32.*\[2\]"):
        adam_ema(params, grads, [torch.zeros(2), *m[1:]], v, ema, step, lr=0.1)
    turned = [torch.zeros(4, 3, 4, 64).permute(3, 1, 2, 0) if g.dim() == 4 else g for g in grads]
    with pytest.raises(ValueError, match=r"grads\[2\] must have the strides of params\[2\], \(48, 16, 4, 1\)"):
        adam_ema(params, turned, m, v, ema, step, lr=0.1)


def test_no_parameters_is_no_work():
    adam_ema([], [], [], [], [], torch.ones(1), lr=0.1)
