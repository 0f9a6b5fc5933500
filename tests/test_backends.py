"""The choice of a backend, the trust in a kernel, and what a user is told."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fastgan.kernels.bn_act as kernels
import pytest
import torch
from torch import nn
from triton_device import DEVICE, MARKS

import fastgan
from fastgan import backends, first_use, library
from fastgan.errors import BackendError
from fastgan.nn import ConvStack, Discriminator, Generator
from fastgan.ops import bn_act, conv_bn_act

pytestmark = MARKS
X = torch.randn(4, 3, 5, 5, device=DEVICE)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test starts without decisions, verdicts and cached kernels, and leaves none."""
    for table in (backends._choices, first_use._verdicts):
        table.clear()
    backends.kernel.cache_clear()
    backends.reset_counts()
    yield
    for table in (backends._choices, first_use._verdicts):
        table.clear()
    backends.kernel.cache_clear()


def measured(monkeypatch, backend="triton", ratio=2.0, smallest=4, kernels="avx2", **key):
    entry = {"operation": "bn_act", "dtype": "float32", "layout": "contiguous", "shape": (3, 5, 5), **key}
    row = backends.Measured(smallest, backend, kernels, ratio)
    monkeypatch.setattr(backends, "_measured", lambda: {tuple(entry.values()): row})


def run(**chosen):
    return bn_act(X, None, None, training=True, **chosen)


def ran():
    return {backend for backend, _ in backends.counts()}


def test_eager_is_the_default_on_cpu_until_something_is_measured_faster():
    bn_act(X.cpu(), None, None, training=True)
    assert ran() == {"eager"}
    assert backends.choose("bn_act", X.cpu()).decision.backend == "eager"


@pytest.mark.skipif(DEVICE == "cuda", reason="the table is for CPU tensors")
def test_the_committed_table_decides_on_cpu(monkeypatch):
    measured(monkeypatch)
    run()
    assert ran() == {"triton"}
    for other in (X[:3], X.double(), X.to(memory_format=torch.channels_last), torch.randn(4, 3, 5, 6)):
        assert backends.choose("bn_act", other).decision.backend == "eager"
    assert "2.00 times" in str(fastgan.explain("bn_act", X)[0])
    assert "from batch 4 on" in str(fastgan.explain("bn_act", X[:3])[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="the table is for CPU tensors")
@pytest.mark.parametrize("operation", ["gan_bce", "adam_ema"])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (2, 1, 3, 1)])
def test_what_depends_on_the_number_of_elements_is_looked_up_by_it(monkeypatch, operation, shape):
    library.load("cpu")
    kernels = backends.instruction_set(operation)
    measured(monkeypatch, backend="cpu", operation=operation, shape=(), smallest=6, kernels=kernels)
    enough, few = (fastgan.explain(operation, x)[0] for x in (torch.randn(shape), torch.randn(5)))
    assert enough.decision.backend == "cpu"
    assert few.decision == ("eager", "'cpu' is measured faster only from 6 elements on")


@pytest.mark.skipif(DEVICE == "cuda", reason="the table is for CPU tensors")
@pytest.mark.parametrize("compiled", [False, True])
def test_an_activation_alone_takes_no_row_of_batch_norm(monkeypatch, compiled):
    library.load("cpu")
    measured(monkeypatch, backend="cpu", kernels=backends.instruction_set("bn_act"))

    class Block(nn.Module):
        def forward(self, x, backend=None):
            return conv_bn_act(x, torch.ones(3, 3, 1, 1), training=True, batch_norm=False, backend=backend)

    block = Block()
    assert backends.choose("bn_act", X).decision.backend == "cpu"
    (layer,) = fastgan.explain(block, X)
    assert layer.decision == ("eager", "an activation without BatchNorm is not measured")
    run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    for backend, expected in ((None, set()), ("cpu", {"bn_act_eval"})):
        backends.reset_counts()
        run(X, backend)
        assert {name for by, name in backends.counts() if by == "cpu"} == expected


KNOWN = {
    "operation": {"bn_act", "gan_bce", "adam_ema"},
    "dtype": {"float32", "float64", "bfloat16"},
    "layout": {"channels_last", "contiguous"},
    "capability": {"DEFAULT", "AVX2", "AVX512"},
    "backend": {"cpu"},
    "kernels": {"plain", "avx2", "avx512"},
}


def malformed(rows):
    """What is wrong with the rows of `measured_cpu.json`."""
    for row in rows:
        if row.keys() != {*KNOWN, "shape", "ratio"}:
            yield f"{row} has other fields"
            continue
        yield from (f"{row}: unknown {field}" for field, known in KNOWN.items() if row[field] not in known)
        dimensions = 4 if row["operation"] == "bn_act" else 1
        if len(row["shape"]) != dimensions or not all(type(n) is int and n > 0 for n in row["shape"]):
            yield f"{row}: no shape of that operation"
        if row["operation"] != "bn_act" and row["layout"] != "contiguous":
            yield f"{row}: is looked up as contiguous"
        if not row["ratio"] > 1:
            yield f"{row} is not faster"
    keys = [(*(row.get(f) for f in ("operation", "dtype", "layout", "capability")), *row["shape"][1:]) for row in rows]
    yield from (f"two rows of {key}" for key, times in Counter(keys).items() if times > 1)


def test_rows_of_the_committed_table_are_well_formed():
    rows = json.loads(Path(backends.__file__).with_name("measured_cpu.json").read_text())["rows"]
    assert len(rows) > 2
    assert list(malformed(rows)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "bn_akt"}, {"dtype": "torch.float32"}, {"layout": "channel_last"}, {"capability": "avx2"},
        {"backend": "gpu"}, {"kernels": "avx"}, {"ratio": 1.0}, {"shape": [8, 3, 4]}, {"shape": [8, 3, 0, 4]},
        {"layouts": "contiguous"}, {},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_row_is_noticed(change):
    row = dict.fromkeys(KNOWN, "cpu") | {
        "operation": "bn_act", "dtype": "float32", "layout": "contiguous", "capability": "AVX2", "kernels": "avx2",
        "shape": [8, 3, 4, 4], "ratio": 1.5,
    }  # fmt: skip
    assert list(malformed([row])) == []
    assert list(malformed([row, {**row, **change}]))


@pytest.mark.skipif(DEVICE == "cuda", reason="the table is for CPU tensors")
def test_a_measured_backend_that_cannot_run_is_explained(monkeypatch):
    measured(monkeypatch)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run()
    assert ran() == {"eager"}
    assert "runs on cuda" in str(fastgan.explain("bn_act", X)[0])


def test_an_explicit_request_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="'triton' runs on cuda tensors, the input is on cpu"):
        bn_act(X.cpu(), None, None, training=True, backend="triton")
    with fastgan.use_backend("cuda"), pytest.raises(BackendError, match="'cuda' runs on cuda tensors"):
        bn_act(X.cpu(), None, None, training=True)
    with pytest.raises(BackendError, match=r"unknown backend 'tpu'; known: eager, cpu, triton, cuda"):
        run(backend="tpu")
    with pytest.raises(BackendError, match="unknown backend"), fastgan.use_backend("tpu"):
        pass


def test_a_kernel_that_is_missing_or_a_dtype_that_is_not_taken_is_named(monkeypatch):
    monkeypatch.delattr(kernels, "bn_act_reduce")
    with pytest.raises(BackendError, match="'triton' has no kernel for bn_act_reduce"):
        run(backend="triton")
    with pytest.raises(BackendError, match=r"'cpu' takes torch.float32, torch.bfloat16, .* the input is torch.float16"):
        bn_act(X.cpu().half(), None, None, training=True, backend="cpu")


def test_use_backend_nests_and_the_argument_wins():
    with fastgan.use_backend("triton"):
        run()
        assert ran() == {"triton"}
        with fastgan.use_backend("eager"):
            backends.reset_counts()
            run()
            assert ran() == {"eager"}
        backends.reset_counts()
        run(backend="eager")
        assert ran() == {"eager"}
    assert backends.requested(None) is None


def test_the_environment_variable_forces_a_backend():
    code = "import torch, fastgan; fastgan.ops.bn_act(torch.randn(2, 3, 4, 4), None, None, training=True)"
    environment = {**os.environ, "FASTGAN_BACKEND": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "BackendError: bn_act: backend 'cuda' runs on cuda tensors, the input is on cpu" in done.stderr


def test_backward_takes_the_forward_s_backend_after_the_block():
    x = X.clone().requires_grad_()
    with fastgan.use_backend("triton"):
        z = bn_act(x, None, None, training=True)
    z.sum().backward()
    assert ran() == {"triton"}


# --- the first use of a kernel --------------------------------------------------------------------------------------


@pytest.fixture
def verified(monkeypatch):
    """What happens on CUDA, on this device: the first use of each kernel is compared with the definition."""
    monkeypatch.setattr(backends, "_is_compared", lambda tensor: True)
    if DEVICE == "cpu":
        measured(monkeypatch)


def step(**chosen):
    x, weight = X.clone().requires_grad_(), torch.ones(3, device=DEVICE, requires_grad=True)
    z = bn_act(x, None, None, weight, training=True, **chosen)
    return z, *torch.autograd.grad((z * torch.linspace(-1, 2, z.numel(), device=DEVICE).view_as(z)).sum(), (x, weight))


def test_a_right_kernel_is_trusted_and_compared_once(verified, monkeypatch, recwarn):
    step()
    assert {verdict for verdict in first_use._verdicts.values()} == {None}
    assert {key[1] for key in first_use._verdicts} == {"bn_stats", "bn_act", "bn_act_reduce", "bn_act_backward"}
    monkeypatch.setattr(first_use, "_compare", lambda *_: pytest.fail("compared again"))
    step()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning) and "disabled" in str(w.message)]


def wrong_by_a_little(kernel):
    def planted(*args):
        out = kernel(*args)
        return tuple(t * 1.001 for t in out) if isinstance(out, tuple) else out * 1.001

    return planted


def raising(kernel):
    def planted(*args):
        raise RuntimeError("out of shared memory")

    return planted


@pytest.mark.parametrize("bug", [wrong_by_a_little, raising])
@pytest.mark.parametrize("name", ["bn_stats", "bn_act", "bn_act_reduce", "bn_act_backward"])
def test_a_wrong_kernel_is_disabled_by_name_and_training_stays_right(verified, monkeypatch, name, bug):
    monkeypatch.setattr(kernels, name, bug(getattr(kernels, name)))
    with pytest.warns(RuntimeWarning, match=f"kernel {name} of backend 'triton' is disabled for torch.float32"):
        got = step()
    assert [key[1] for key, verdict in first_use._verdicts.items() if verdict] == [name]
    assert ("eager", name) in backends.counts()
    for mine, own in zip(got, step(backend="eager"), strict=True):
        torch.testing.assert_close(mine, own)


def test_a_wrong_kernel_that_was_asked_for_by_name_is_an_error(verified, monkeypatch):
    monkeypatch.setattr(kernels, "bn_act", wrong_by_a_little(kernels.bn_act))
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(BackendError, match=r"kernel bn_act .*error RMS"),
    ):
        step(backend="triton")


@pytest.mark.parametrize("right", [True, False])
def test_the_update_of_running_statistics_is_compared_on_copies(verified, monkeypatch, right):
    """It works in place: comparing it must not move the statistics, and a wrong one must not have moved them."""
    kernel = kernels.update_running_stats

    def wrong(running_mean, running_var, mean, var, count, momentum):
        kernel(running_mean, running_var, mean, 1.001 * var, count, momentum)

    monkeypatch.setattr(kernels, "update_running_stats", kernel if right else wrong)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    if right:
        bn_act(X, mean, var, training=True, momentum=0.5, backend="triton")
        torch.testing.assert_close(mean, 0.5 * X.mean((0, 2, 3)))
    else:
        with (
            pytest.warns(RuntimeWarning),
            pytest.raises(BackendError, match=r"update_running_stats .* is disabled here"),
        ):
            bn_act(X, mean, var, training=True, backend="triton")
        assert not mean.any()


def test_each_dtype_and_layout_is_compared(verified):
    for x in (X, X.half(), X.to(memory_format=torch.channels_last)):
        bn_act(x, None, None, training=True, backend="triton")
    assert len(first_use._verdicts) == 6


def test_a_large_input_is_compared_on_its_first_images(monkeypatch):
    monkeypatch.setattr(first_use, "_VERIFY_ELEMENTS", 100)
    dz, y, slope = first_use.first_images("bn_act_reduce", (X, X, 0.2))
    assert dz.shape == y.shape == (1, 3, 5, 5)
    assert slope == 0.2


# --- what a user is told --------------------------------------------------------------------------------------------


def test_explain_names_each_layer_and_leaves_the_module_alone():
    generator, discriminator = Generator(16, 1, 5, 4).to(DEVICE), Discriminator(16, 1, 4).to(DEVICE)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    layers = fastgan.explain(generator, torch.randn(3, 5, device=DEVICE), backend="triton")
    assert [layer.name for layer in layers] == ["main.0", "main.3", "main.6"]
    assert {layer.decision.backend for layer in layers} == {"triton"}
    assert layers[1].shape == (3, 4, 8, 8)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert not any(module._forward_hooks for module in generator.modules())
    images = torch.randn(3, 1, 16, 16, device=DEVICE)
    names = [layer.name for layer in fastgan.explain(discriminator, images, backend="eager")]
    assert names == ["main.0", "main.2"]


def test_explain_names_an_operation_after_the_module_that_calls_it():
    class Normalised(nn.Module):
        def forward(self, x):
            return bn_act(x, None, None, training=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = ConvStack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Normalised(), nn.Conv2d(4, 4, 1))
            self.leaf = Normalised()

        def forward(self, x):
            x = bn_act(self.main(x), None, None, training=True)
            return self.leaf(x)

    layers = fastgan.explain(Net().to(DEVICE), X, backend="eager")
    assert [layer.name for layer in layers] == ["main.0", "main.3", "", "leaf"]


def test_explain_knows_the_operations():
    assert fastgan.explain("gan_bce", torch.randn(7))[0].decision.backend == "eager"
    with pytest.raises(BackendError, match=r"'softmax'; known: adam_ema, bn_act, gan_bce$"):
        fastgan.explain("softmax", X)


@pytest.mark.parametrize("operation", fastgan.ops.__all__)
def test_explain_tells_of_every_public_operation_who_decides(operation):
    decides = {"conv_bn_act": "bn_act", "conv_transpose_bn_act": "bn_act", "gan_bce_generator": "gan_bce"}
    if operation not in decides:
        assert fastgan.explain(operation, X)[0].operation == operation
        return
    with pytest.raises(BackendError, match=rf"{operation} decides nothing itself: explain '{decides[operation]}' with"):
        fastgan.explain(operation, X)


@pytest.mark.parametrize(
    ("found", "others"), [("amx", "avx512"), ("avx512", "avx512"), ("avx2", "avx2"), ("plain", "plain")]
)
def test_explain_names_the_instruction_set(found, others, monkeypatch):
    """bn_act and gan_bce have copies for AVX-512, convolutions for AMX, too, adam_ema for neither."""
    library.load("cpu")
    monkeypatch.setattr(torch.ops.fastgan_cpu, "instruction_set", lambda: found)
    assert backends.instruction_set(torch.float32) == backends.instruction_set(torch.bfloat16) == found
    assert backends.instruction_set("gan_bce") == others
    assert backends.instruction_set("adam_ema") == {"plain": "plain"}.get(found, "avx2")
    assert f"cpu (forced; {others} kernels)" in str(fastgan.explain("bn_act", X.cpu(), backend="cpu")[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="the table is for CPU tensors")
@pytest.mark.parametrize("measured_kernels", ["avx512", "avx2", "plain"])
def test_only_the_kernels_that_were_measured_are_taken(monkeypatch, measured_kernels):
    measured(monkeypatch, backend="cpu", kernels=measured_kernels)
    library.load("cpu")
    for found, runs in (("amx", "avx512"), ("avx512", "avx512"), ("avx2", "avx2"), ("plain", "plain")):
        monkeypatch.setattr(torch.ops.fastgan_cpu, "instruction_set", lambda found=found: found)
        (layer,) = fastgan.explain("bn_act", X)
        assert layer.decision == (
            ("cpu", f"measured 2.00 times as fast as eager for this shape, from batch 4 on; {runs} kernels")
            if runs == measured_kernels
            else ("eager", f"its {measured_kernels} kernels were measured faster, those that run here are {runs}")
        )
        backends._choices.clear()
