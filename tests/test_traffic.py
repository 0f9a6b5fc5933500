"""benchmarks/traffic.py counts what can be counted by hand, and notices when it does not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastgan.kernels.conv_bn_act_tiles import candidates
from torch import nn

from fastgan.ops import bn_act

_PATH = Path(__file__).parent.parent / "benchmarks" / "traffic.py"
_SPEC = importlib.util.spec_from_file_location("traffic", _PATH)
traffic = sys.modules["traffic"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(traffic)
Launch, PROVIDERS = traffic.Launch, traffic.PROVIDERS


def meta(*shape: int, dtype=torch.float32, **options) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", **options)


def counted(run, *args) -> list:
    with traffic.Count.all() as count:
        run(*args)
    return [Launch(launch.name.removeprefix("aten."), *launch[1:]) for launch in count.launches]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: x.relu(), [Launch("relu", 80, 80)]),
        (lambda x: x.relu_(), [Launch("relu_", 80, 80)]),
        (lambda x: x.view(20)[3:].t(), []),
        (lambda x: x + x, [Launch("add", 80, 80)]),
        (lambda x: x[:1].expand(7, 5) + 1, [Launch("add", 80, 140)]),  # read from a storage of 80 bytes
        (lambda x: x.zero_(), [Launch("zero_", 0, 80)]),
        (lambda x: torch.zeros_like(x), [Launch("zeros_like", 0, 80)]),
        (lambda x: torch.empty_like(x), []),
        (lambda x: x.contiguous().t().contiguous(), [Launch("clone", 80, 80)]),
        (lambda x: torch._foreach_add_([x, meta(3)], 1), [Launch("_foreach_add_", 92, 92)]),
        (lambda x: torch.zeros(3).add_(1), []),  # on the host
    ],
    ids=lambda case: str(case)[:40] if isinstance(case, list) else "",
)
def test_single_operations(run, expected):
    assert counted(run, meta(4, 5)) == expected


def test_convolutions_and_their_gradients():
    """x [2, 3, 8, 8] and y [2, 4, 4, 4] by w [4, 3, 4, 4]: 1536, 512 and 768 bytes, 192 weights at 2 * 16 places."""
    x, w, y = meta(2, 3, 8, 8, requires_grad=True), meta(4, 3, 4, 4, requires_grad=True), meta(2, 4, 4, 4)
    operations = 2 * 192 * 2 * 16
    down = counted(lambda: F.conv2d(x, w, stride=2, padding=1).backward(y))
    assert down[0] == Launch("convolution", 1536 + 768, 512, operations)
    assert Launch("dgrad", 512 + 768, 1536, operations) in down
    assert Launch("wgrad", 512 + 1536, 768, operations) in down
    up = counted(lambda: F.conv_transpose2d(y, w, stride=2, padding=1).backward(x.detach()))
    assert up[0] == Launch("convolution", 512 + 768, 1536, operations)
    assert Launch("wgrad", 512 + 1536, 768, operations) in up
    assert "dgrad" not in {launch.name for launch in up}  # y needs none


def test_batch_norm_reads_its_input_twice():
    y, weight, bias = meta(2, 3, 4, 4), meta(3), meta(3)
    (launch,) = counted(lambda: F.batch_norm(y, None, None, weight, bias, True))
    assert launch.read == 2 * 384 + 2 * 12
    assert launch.written >= 384


def test_triton_launches_write_what_was_allocated_and_read_the_rest():
    y = meta(8, 16, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with traffic.running(PROVIDERS["bn_act"]):
        launches = {launch.name: launch for launch in counted(lambda: bn_act(y, None, None, training=True))}
    size, channel = 8 * 16 * 4 * 4 * 2, 16 * 4
    assert launches["_apply_kernel"] == Launch("_apply_kernel", size + 4 * channel, size)
    assert launches["_stats_kernel"].read == size
    assert 0 < launches["_stats_kernel"].written < size


def test_passes_per_block_are_those_of_the_design():
    assert traffic.beside_convolutions(PROVIDERS["eager"]).passes == pytest.approx(13, abs=0.01)
    assert traffic.beside_convolutions(PROVIDERS["bn_act"]).passes == pytest.approx(8, abs=0.01)
    # Three, and the partial sums of a tile: of each channel six numbers of 4 bytes, for its pixels of 2.
    rows = candidates(torch.bfloat16, "ieee", 9)[0].rows
    assert traffic.beside_convolutions(PROVIDERS["fused"]).passes == pytest.approx(3 + 6 * 4 / (rows * 2), abs=0.01)


def test_planted_miscounts_are_noticed(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(traffic, "READS", {})  # as if statistics could be applied before they are known
        assert traffic.beside_convolutions(PROVIDERS["eager"]).passes == pytest.approx(10, abs=0.01)
    with monkeypatch.context() as patched:  # as if an allocation were a launch that writes
        patched.setattr(traffic, "ALLOCATIONS", set())
        assert counted(lambda x: torch.empty_like(x), meta(4, 5)) != []
    with monkeypatch.context() as patched:  # a result that is copied once more, as one convolution's was
        from fastgan.kernels import conv_bn_act

        original = conv_bn_act.convolve_block_constants
        patched.setattr(traffic.Count, "_watched", watched_with(original))
        assert traffic.beside_convolutions(PROVIDERS["fused"]).passes > 5


def watched_with(original):
    def copying(*args):
        y, sums = original(*args)
        return y.clone(), sums

    def watched(self, kernel):
        return lambda backend, name: copying if name == "convolve_block_constants" else kernel(backend, name)

    return watched


@pytest.fixture(scope="module")
def small_steps():
    return {name: traffic.step_launches(provider, 32, 4, width=8) for name, provider in PROVIDERS.items()}


def test_a_step_multiplies_the_same_whoever_runs_it(small_steps):
    operations = {name: sum(launch.operations for launch in launches) for name, launches in small_steps.items()}
    assert len(set(operations.values())) == 1, operations
    convolutions = [sum(launch.operations > 0 for launch in launches) for launches in small_steps.values()]
    # G: 4 forward, 3 + 4 gradients. D: 4 forward three times; gradients of 4 weights and 3 inputs twice, of 4 once.
    assert convolutions == [4 + 7 + 12 + 8 + 6 + 4] * 3


def test_an_optimiser_is_one_launch_for_each_dtype(small_steps):
    """bf16 convolutions and fp32 BatchNorm, of two networks; lists short enough that torch splits none."""
    assert sum(launch.name == "aten._fused_adam_" for launch in small_steps["fused"]) == 2 * 2
    for network in traffic.networks(256):
        sizes = [p.numel() for p in network.parameters()]
        assert len(sizes) <= 30
        assert sum(-(-size // 65536) for size in sizes) <= 320


def test_a_fused_step_launches_half_as_often_as_eager_with_foreach_adam(small_steps):
    launches = {name: len(launches) for name, launches in small_steps.items()}
    assert 2 * launches["fused"] <= launches["eager"] < launches["bn_act"]


@pytest.mark.parametrize(
    ("which", "shape", "recompute", "share"),
    [(0, (4, 100), False, 0.55), (1, (4, 3, 64, 64), False, 0.72), (1, (4, 3, 64, 64), True, 0.40)],
    ids=["generator", "discriminator", "discriminator, first convolution recomputed"],
)
def test_bytes_kept_for_backward(which, shape, recompute, share):
    network, input = traffic.networks(64)[which], meta(*shape, dtype=torch.bfloat16)
    eager = traffic.bytes_kept(PROVIDERS["eager"], network, input)
    network.main.recompute_first = recompute
    assert 0 < traffic.bytes_kept(PROVIDERS["fused"], network, input) <= share * eager


def test_the_estimate_is_a_roofline():
    card = traffic.Card(bandwidth=100.0, rate=10.0, source="made up")
    launches = [Launch("moves", 300, 200), Launch("multiplies", 10, 0, 70)]  # 5 s and 7 s
    assert traffic.estimate(launches, card, 1.0) == {"device": 12.0, "host": 2.0, "step": 12.0, "graph": 12.0}
    assert traffic.estimate(launches, card, 9.0)["step"] == 18.0


def test_the_command_says_that_it_models(tmp_path, capsys):
    arguments = traffic.TrafficConfig(sizes=(16,), batches=(2,), bandwidth=1e12, rate=1e14, json=tmp_path / "t.json")
    traffic.traffic(arguments)
    assert "modelled, not measured" in capsys.readouterr().out
    written = json.loads(arguments.json.read_text())
    assert "modelled" in written["kind"]
    assert written["card"]["source"] == "as given"
    assert [row["provider"] for row in written["rows"]] == list(PROVIDERS)
    assert all("modelled_seconds" in row for row in written["rows"])


def test_an_unknown_card_is_refused():
    with pytest.raises(traffic.FastganError, match="expected one of a100, h100; got 'abacus'"):
        traffic.traffic(traffic.TrafficConfig(card="abacus"))


def test_networks_are_as_autocast_runs_them():
    generator, _ = traffic.networks(32)
    dtypes = {
        type(m): m.weight.dtype for m in generator.modules() if isinstance(m, nn.ConvTranspose2d | nn.BatchNorm2d)
    }
    assert dtypes == {nn.ConvTranspose2d: torch.bfloat16, nn.BatchNorm2d: torch.float32}
