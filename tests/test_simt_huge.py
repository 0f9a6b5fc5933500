"""Tensors with 2^31 and more elements: the kernels' last blocks find the last elements, wherever int would wrap around.

Memory is reserved, not used: a page exists once something is written to it, and only the last blocks run.
"""

import mmap

import numpy as np
import pytest
import torch
from simt import DTYPES, run_clean, simt, to_input, to_output

from fastgan.ops import bn_act_eager as eager

MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on
ROWS = 2049
# 2^31 and more values. Contiguous, one more: the last channel is alone in the last block of the second stage, too.
CHANNELS = {"channels_last": 1 << 20, "contiguous": (1 << 20) + 1}
LAST = 8  # channels to look at, all in the last block
HALF = torch.bfloat16


def reserve(*shape, dtype=np.int16):
    """Zeros."""
    count = int(np.prod(shape))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags), dtype).reshape(shape)


def read_only(array):
    view = array.view()
    view.flags.writeable = False
    return view


def bits(tensor):
    return tensor.to(HALF).view(torch.int16).numpy()


def floats(array):
    return torch.from_numpy(array.copy()).view(HALF).float()


@pytest.fixture(autouse=True)
def last_blocks_only():
    simt().set_last_blocks_only(True)
    yield
    simt().set_last_blocks_only(False)


@pytest.fixture
def last_turns_only():
    simt().set_last_turns_only(True)
    yield
    simt().set_last_turns_only(False)


def last_channels(array, layout):
    """[ROWS, LAST] of memory as [ROWS, CHANNELS] or [CHANNELS, ROWS]: contiguous, a block has one channel only."""
    return array[:, -LAST:] if layout == "channels_last" else array[-1:].T


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_bn_act(layout):
    last, channels = layout == "channels_last", CHANNELS[layout]
    memory_shape = (ROWS, channels) if last else (channels, ROWS)
    nchw = (ROWS, channels, 1, 1) if last else (1, channels, ROWS, 1)
    y, dz, z, dy = (reserve(*memory_shape) for _ in range(4))
    generator = torch.Generator().manual_seed(0)
    few = last_channels(y, layout).shape
    for array, shift in ((y, 2.0), (dz, 0.0)):
        last_channels(array, layout)[...] = bits(torch.randn(few, generator=generator) + shift)
    seen, gradient = (floats(last_channels(array, layout)) for array in (y, dz))
    code, inputs = DTYPES[HALF], (read_only(y), read_only(dz))

    mean, m2 = torch.zeros(channels), torch.zeros(channels)
    run_clean(simt().bn_stats, code, nchw, last, inputs[0], to_output(mean), to_output(m2))
    torch.testing.assert_close((mean[-few[1] :], m2[-few[1] :]), eager.stats(seen), rtol=1e-4, atol=1e-4)

    given = (mean, torch.rsqrt(m2 / ROWS + 1e-5), torch.full((channels,), 1.5), torch.full((channels,), 0.5))
    arrays, own = tuple(map(to_input, given)), [t[-few[1] :] for t in given]
    run_clean(simt().bn_act, code, nchw, last, inputs[0], arrays, 0.2, z)
    torch.testing.assert_close(floats(last_channels(z, layout)), eager.apply(seen, *own, 0.2), rtol=1e-2, atol=1e-2)

    sums = torch.zeros(channels), torch.zeros(channels)
    run_clean(simt().bn_act_reduce, code, nchw, last, inputs[1], inputs[0], arrays, 0.2, *map(to_output, sums))
    expected = eager.reduce(gradient, seen, *own, 0.2)
    torch.testing.assert_close(tuple(s[-few[1] :] for s in sums), expected, rtol=1e-3, atol=1e-2)

    totals = tuple(map(to_input, sums))
    run_clean(simt().bn_act_backward, code, nchw, last, inputs[1], inputs[0], arrays, 0.2, *totals, ROWS, dy)
    expected = eager.backward(gradient, seen, *own, 0.2, *(s[-few[1] :] for s in sums), ROWS)
    torch.testing.assert_close(floats(last_channels(dy, layout)), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("start", [0, 1], ids=["vectors", "element by element"])
def test_gan_bce(last_turns_only, start):
    """A block walks over a whole half, so its loops are cut short; the gradients of their last turns count."""
    n, seen = (1 << 31) + 5, 50
    halves, grads = [reserve(n + start) for _ in range(2)], [reserve(n, dtype=np.float32) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for half in halves:
        half[-seen:] = bits(torch.randn(seen, generator=generator))
    simt().set_last_blocks_only(False)  # there are two, one for each half
    stats = torch.zeros(4)
    given = (DTYPES[HALF], *(read_only(half[start:]) for half in halves), 0.9, 0.1)
    run_clean(simt().gan_bce, *given, to_output(stats), *grads)
    for half, grad, target in zip(halves, grads, (0.9, 0.1), strict=True):
        expected = (torch.sigmoid(floats(half[-seen:])) - target) / n
        torch.testing.assert_close(torch.from_numpy(grad[-seen:].copy()), expected, rtol=1e-5, atol=0)
        assert grad[0] == 0  # nothing else was written


def test_adam_ema():
    n = (1 << 31) + 5
    arrays = [reserve(n, dtype=np.float32) for _ in range(5)]
    generator = torch.Generator().manual_seed(0)
    for array in arrays:
        array[-5:] = torch.rand(5, generator=generator).numpy()
    param, _, exp_avg, exp_avg_sq, ema = own = [torch.from_numpy(array[-5:].copy()) for array in arrays]
    step, options = torch.ones(1), (0.1, 0.5, 0.9, 1e-8, 0.0, False, 0.75)
    run_clean(simt().adam_ema, *([array] for array in arrays), to_output(step), *options)
    optimizer_step(own)
    for array, want in zip((arrays[0], *arrays[2:]), (param, exp_avg, exp_avg_sq, ema), strict=True):
        torch.testing.assert_close(torch.from_numpy(array[-5:].copy()), want)


def optimizer_step(lists):
    from fastgan.ops.adam_ema import adam_ema

    options = {"lr": 0.1, "beta1": 0.5, "beta2": 0.9, "ema_decay": 0.75}
    adam_ema(*([tensor] for tensor in lists), torch.ones(1), **options, backend="eager")


@pytest.mark.parametrize(("channels", "outputs", "rows"), [(1 << 15, 8, (1 << 16) + 1), (8, 1 << 13, (1 << 18) + 1)])
def test_convolution(channels, outputs, rows):
    """1x1: the input's last elements, then the output's, lie past 2^31."""
    x, y = reserve(rows, 1, 1, channels), reserve(rows, 1, 1, outputs)
    generator = torch.Generator().manual_seed(0)
    x[-1] = bits(torch.randn(1, 1, channels, generator=generator))
    weight = (torch.randn(outputs, 1, 1, channels, generator=generator) / channels**0.5).to(HALF)
    mean, m2 = torch.zeros(outputs), torch.zeros(outputs)
    inputs = (read_only(x), to_input(weight))
    call = (DTYPES[HALF], False, *inputs, (), 1.0, (1, 0, 1), y, to_output(mean), to_output(m2))
    simt().take_reports()
    simt().set_seed(0)
    simt().conv(*call)
    reports = {r["kernel"] for r in simt().take_reports()}
    assert not any("conv<" in name for name in reports), reports  # the statistics read blocks that did not run
    expected = weight.view(outputs, channels).float() @ floats(x[-1]).view(channels)
    torch.testing.assert_close(floats(y[-1]).view(outputs), expected, rtol=1e-2, atol=1e-2)
