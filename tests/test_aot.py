"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, within the committed budget."""

import json
import os
import subprocess
import sys

import aot_facts
import pytest

BUDGET = json.loads(aot_facts.BUDGET.read_text())


@pytest.fixture(scope="module")
def found():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(aot_facts.SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_budget_names_exactly_what_is_compiled(found):
    assert sorted(found) == sorted(BUDGET)


@pytest.mark.parametrize("name", BUDGET)
def test_kernel_stays_within_its_budget(found, name):
    assert aot_facts.excess(found[name], BUDGET[name]) == []


def test_the_layouts_that_allow_it_are_read_and_written_16_bytes_at_a_time(found):
    for name, facts in found.items():
        if "channels-last" in name or "contiguous" in name:
            assert facts["loads of 16 bytes"] > 0, name
            if "bn_act " in name or "backward" in name:
                assert facts["stores of 16 bytes"] > 0, name


def test_convolutions_multiply_on_tensor_cores_and_load_asynchronously(found):
    for name, facts in found.items():
        if "conv_" in name and "second stage" not in name:
            assert (facts["matrix instructions"] > 0) == ("fp32" not in name), name
            # With few channels the positions of the kernel share one axis: what an address is, differs lane by lane.
            assert facts["asynchronous copies"] > 0 or "of 3 channels" in name, name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"registers": 65}, ["registers 65, budget 64"]),
        ({"stack": 8}, ["stack 8, budget 0"]),
        ({"shared": 2048}, ["shared 2048, budget 1024"]),
        ({"loads of 16 bytes": 0}, ["loads of 16 bytes 0, budget 4"]),
        ({"registers": 60}, []),
    ],
)
def test_an_excess_is_noticed(change, expected):
    budget = {"registers": 64, "stack": 0, "shared": 1024, "loads of 16 bytes": 4, "stores of 16 bytes": 4}
    assert aot_facts.excess({**budget, **change}, budget) == expected
