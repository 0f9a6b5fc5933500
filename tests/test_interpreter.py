"""The mended interpreter computes as the device does; and Triton's own, unmended, does not, so each mend is needed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a card is here: kernels run on it, not in the interpreter", allow_module_level=True)

import interpreter
import triton
import triton.language as tl


@triton.jit
def add_kernel(out, a, b, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(a + at, inside, 0.0) + tl.load(b + at, inside, 0.0), inside)


@triton.jit
def round_kernel(out, a, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(a + at).to(tl.bfloat16))


@triton.jit
def overrun_kernel(out, a, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(a + at), at < n)


@triton.jit
def valueless_kernel(out, a, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(a + at, at < n), at < n)


@triton.jit
def many_kernel(out, a, b, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x * y - y)
    tl.store(out + BLOCK + at, tl.where(x > y, x, -y))
    tl.store(out + 2 * BLOCK + at, tl.exp(tl.abs(x).to(tl.float32)).to(tl.bfloat16))
    tl.store(out + 3 * BLOCK + at, tl.maximum(x, y) / 3.0)


@triton.jit
def dot_kernel(out, a, b, PRECISION: tl.constexpr, N: tl.constexpr):
    r = tl.arange(0, N)
    at = r[:, None] * N + r[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


def test_bf16_is_rounded_to_nearest_even():
    x = torch.cat([torch.randn(60), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf")])])
    out = torch.empty(64, dtype=torch.bfloat16)
    round_kernel[(1,)](out, x, BLOCK=64)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_arithmetic_is_pytorch_s():
    torch.manual_seed(0)
    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out = torch.empty(4, 64, dtype=torch.bfloat16)
    many_kernel[(1,)](out, a, b, BLOCK=64)
    expected = [a * b - b, torch.where(a > b, a, -b), a.abs().float().exp().bfloat16(), torch.maximum(a, b) / 3.0]
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-8, atol=0)
    assert torch.equal(out[1], expected[1])


def test_a_store_past_the_end_is_an_error():
    memory = torch.zeros(1000)
    out, a = memory[:100], memory[500:600]  # of one tensor: nothing of the launch lies where the overrun reads
    overrun_kernel[(1,)](out[:64], a, 64, BLOCK=64)
    with pytest.raises(Exception, match="load: 28 of 128 lanes lie outside every tensor"):
        overrun_kernel[(1,)](out, a, 100, BLOCK=128)


def test_a_masked_load_needs_a_value():
    with pytest.raises(Exception, match="masked lanes without a value"):
        valueless_kernel[(1,)](torch.empty(5), torch.zeros(5), 5, BLOCK=8)


def test_dot_rounds_tf32_operands_and_not_ieee_ones():
    torch.manual_seed(0)
    a, b, out = torch.randn(16, 16), torch.randn(16, 16), torch.empty(16, 16)
    dot_kernel[(1,)](out, a, b, PRECISION="ieee", N=16)
    torch.testing.assert_close(out, a @ b)
    dot_kernel[(1,)](out, a, b, PRECISION="tf32", N=16)
    rounded = [torch.from_numpy(interpreter.to_tf32(t.numpy())) for t in (a, b)]
    torch.testing.assert_close(out, rounded[0] @ rounded[1])
    assert (out - a @ b).abs().max() > 1e-5


def test_tf32_is_to_nearest_ties_away():
    one = np.array([1 + 2**-11, 1 + 2**-12, -1 - 2**-11], np.float32)
    assert interpreter.to_tf32(one).tolist() == [1 + 2**-10, 1.0, -1 - 2**-10]


def test_autotune_takes_the_first_configuration():
    tuned = triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 3})], key=["n"])(add_kernel)
    a, out = torch.randn(50), torch.empty(50)
    tuned[(1,)](out, a, a, 50)
    assert torch.equal(out, 2 * a)


def test_sums_are_pairwise():
    """4096 times 1 + 2^-23: added one by one in fp32 the small parts are lost, pairwise they are not."""

    @triton.jit
    def kernel(out, a, ROWS: tl.constexpr):
        at = tl.arange(0, ROWS)
        tl.store(out + tl.arange(0, 2), tl.sum(tl.load(a + at[:, None] * 2 + tl.arange(0, 2)[None, :]), 0))

    a = torch.full((4096, 2), 1 + 2**-23)
    out = torch.empty(2)
    kernel[(1,)](out, a, ROWS=4096)
    assert out.tolist() == [4096 + 2**-11] * 2


def test_another_triton_is_refused():
    with pytest.raises(RuntimeError, match=r"create_masked_load takes \(nothing\), expected \(self ptrs mask"):
        interpreter.check_internals(SimpleNamespace())


UNMENDED = """
    import json, sys, torch, triton, triton.language as tl
    import test_interpreter_kernels as kernels
    result = {}
    a = torch.tensor([1.5, -2.0, 0.25, 3.0]).bfloat16()
    out = torch.zeros(4, dtype=torch.bfloat16)
    kernels.add_kernel[(1,)](out, a, a, 4, BLOCK=4)
    result["bf16 added"] = torch.equal(out, a + a)
    x = torch.tensor([1 + 2**-8 + 2**-9, 1.0, 1.0, 1.0])
    kernels.round_kernel[(1,)](out, x, BLOCK=4)
    result["bf16 rounded"] = torch.equal(out, x.bfloat16())
    try:
        tuned = triton.autotune([triton.Config({"BLOCK": b}) for b in (4, 8)], key=["n"])(kernels.add_kernel)
        tuned[(1,)](torch.zeros(4), torch.ones(4), torch.ones(4), 4)
        result["autotuned"] = True
    except RuntimeError:
        result["autotuned"] = False
    memory = torch.zeros(128)
    try:
        kernels.overrun_kernel[(1,)](memory[:64], torch.ones(128)[:100], 100, BLOCK=128)
        result["overrun noticed"] = False
    except Exception:
        result["overrun noticed"] = True
    print(json.dumps(result))
"""


def test_the_unmended_interpreter_is_wrong(tmp_path):
    """If one of these turns out right in a later Triton, its mend can go."""
    source = Path(__file__).read_text()
    kernels = source[source.index("@triton.jit") : source.index("@triton.jit\ndef many_kernel")]
    (tmp_path / "test_interpreter_kernels.py").write_text(f"import triton\nimport triton.language as tl\n\n\n{kernels}")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(UNMENDED)], env=environment, capture_output=True, text=True, check=True
    )
    right = json.loads(done.stdout.splitlines()[-1])
    assert right == {"bf16 added": False, "bf16 rounded": False, "autotuned": False, "overrun noticed": False}
