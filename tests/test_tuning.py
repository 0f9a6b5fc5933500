"""The choice of a configuration, by a clock of its own: what is chosen and kept, and that no bit depends on it."""

import fastgan.kernels.bn_act as kernels
import pytest
import torch
from fastgan.kernels import tuning
from fastgan.kernels.tuning import CONFIGURATIONS, Configuration, choose
from triton_device import DEVICE, MARKS

pytestmark = MARKS
X = torch.zeros(2, 3, 5, 7, device=DEVICE)


@pytest.fixture
def clock(monkeypatch):
    """A card whose times are `times[configuration]`, for tensors of any size; `measured` is what was timed."""
    measured = []
    times = {configuration: 4.0 - index for index, configuration in enumerate(CONFIGURATIONS)}

    def milliseconds(run, configuration):
        measured.append(configuration)
        return times[configuration]

    for name, value in (("WORTH_IT", 1), ("_on_card", lambda tensor: True), ("_milliseconds", milliseconds)):
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(tuning, "_chosen", {})
    clock.times, clock.measured = times, measured
    return clock


def test_the_fastest_is_chosen_and_remembered(clock):
    clock.times[CONFIGURATIONS[2]] = 0.5
    assert choose("k", X, None) == choose("k", X, None) == CONFIGURATIONS[2]
    assert clock.measured == list(CONFIGURATIONS)


def test_a_tie_goes_to_the_default(clock):
    clock.times.update(dict.fromkeys(CONFIGURATIONS, 1.0))
    assert choose("k", X, None) == CONFIGURATIONS[0]


def test_each_kernel_dtype_layout_and_magnitude_is_measured(clock):
    given = (("k", X), ("other", X), ("k", X.half()), ("k", X.to(memory_format=torch.channels_last)), ("k", X[:1]))
    for name, tensor in given:
        choose(name, tensor, None)
    choose("k", torch.zeros(3, 2, 4, 6, device=DEVICE), None)  # the same powers of two as X
    assert len(clock.measured) == len(given) * len(CONFIGURATIONS)


def test_the_default_where_a_deterministic_choice_is_asked_for(clock, monkeypatch):
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "0")
    assert choose("k", X, None) == CONFIGURATIONS[0]
    monkeypatch.delenv("FASTGAN_AUTOTUNE")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert choose("k", X, None) == CONFIGURATIONS[0]
    finally:
        torch.use_deterministic_algorithms(before)
    assert choose("k", X[:, :0], None) == CONFIGURATIONS[0]  # too small to pay
    assert clock.measured == []
    assert choose("k", X, None) == CONFIGURATIONS[-1]


@pytest.mark.skipif(DEVICE == "cuda", reason="a card is timed")
def test_nothing_is_timed_without_a_card(monkeypatch):
    monkeypatch.setattr(tuning, "WORTH_IT", 1)
    monkeypatch.setattr(tuning, "_milliseconds", lambda *_: pytest.fail("timed"))
    assert choose("k", X, None) == CONFIGURATIONS[0]


def test_a_configuration_that_does_not_run_is_never_chosen():
    def run(configuration):
        raise RuntimeError("too many resources requested")

    with pytest.warns(RuntimeWarning, match="does not run here: too many resources"):
        assert tuning._milliseconds(run, CONFIGURATIONS[1]) == float("inf")
    with pytest.raises(RuntimeError):
        tuning._milliseconds(run, CONFIGURATIONS[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_configuration_gives_the_same_bits(monkeypatch, layout):
    torch.manual_seed(0)
    y = torch.randn(3, 20, 9, 11, device=DEVICE).to(memory_format=layout)
    dz, values = torch.randn_like(y), [torch.rand(20, device=DEVICE) + 0.5 for _ in range(6)]
    outcomes = []
    for configuration in (*CONFIGURATIONS, Configuration(64, 1)):
        monkeypatch.setattr(tuning, "CONFIGURATIONS", (configuration,))
        outcomes.append(
            (kernels.bn_act(y, *values[:4], 0.2), kernels.bn_act_backward(dz, y, *values[:4], 0.2, *values[4:], 297))
        )
    for outcome in outcomes[1:]:
        assert all(map(torch.equal, outcome, outcomes[0]))


def test_reductions_and_what_works_in_place_are_never_tuned(clock, monkeypatch):
    names = []
    monkeypatch.setattr(kernels, "choose", lambda name, *_: names.append(name) or CONFIGURATIONS[0])
    stat = [torch.ones(3, device=DEVICE) for _ in range(4)]
    kernels.bn_stats(X)
    kernels.bn_act_reduce(X, X, *stat, 0.2)
    kernels.update_running_stats(*stat, 70, 0.1)
    assert names == []
    kernels.bn_act(X, *stat, 0.2)
    kernels.bn_act_backward(X, X, *stat, 0.2, None, None, 0)
    assert names == ["_apply_kernel", "_backward_kernel"]
