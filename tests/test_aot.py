"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, within the committed budget."""

import json
import os
import subprocess
import sys

import aot_facts
import pytest

RECORDED = aot_facts.BUDGET.exists()
BUDGET = json.loads((aot_facts.BUDGET if RECORDED else aot_facts.NEWEST).read_text())


def printed_by(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return printed_by(aot_facts.SCRIPT)


def test_a_sum_is_a_balanced_tree_as_in_the_mended_interpreter():
    """1,024 numbers in 10 steps: 5 within each thread's 32, 5 shuffles. One by one they would be 36."""
    assert printed_by(aot_facts.SCRIPT.with_name("aot_sums.py")) == {"80": 10, "90": 10}


def test_a_chain_of_additions_is_counted():
    ptx = "add.f32 %f3, %f1, %f2;\n shfl.sync.bfly.b32 %r1, %f3, 16, 31, -1;\n add.f32 %f4, %f3, %r1;\n"
    assert aot_facts.longest_chain(ptx) == 2
    assert aot_facts.longest_chain(ptx + "add.f32 %f6, %f5, %f2;\n") == 2


def test_no_loop_counts_past_two_to_the_31(found):
    """A loop over elements by BLOCK would not end where their number lies in (2^31 - BLOCK, 2^31). Those of the
    fused convolutions and their constants are over tiles, of which there are never so many."""
    wrong = {name for name, facts in found.items() if facts["loops that may pass 2^31"]}
    assert {name for name in wrong if "conv_" not in name and "block_" not in name} == set()


def test_a_loop_that_may_count_past_two_to_the_31_is_noticed():
    loop = "    %5:2 = scf.for %i = %c0_i32 to %n step %c4096_i32 iter_args(%a = %b) -> (tensor<4xf32>)  : i32 {"
    assert aot_facts.loops_by_more_than_one(loop) == 1
    assert aot_facts.loops_by_more_than_one(loop.replace("4096", "1")) == 0
    assert aot_facts.loops_by_more_than_one(loop.replace("i32 {", "i64 {")) == 0


def test_the_budget_names_exactly_what_is_compiled(found):
    assert sorted(found) == sorted(BUDGET)


@pytest.mark.skipif(
    not RECORDED, reason=f"no budget is committed for Triton {aot_facts.TRITON}: python tests/aot.py --write"
)
@pytest.mark.parametrize("name", BUDGET)
def test_kernel_stays_within_its_budget(found, name):
    assert aot_facts.excess(found[name], BUDGET[name]) == []


@pytest.mark.parametrize("path", sorted(aot_facts.BUDGETS.glob("*.json")), ids=lambda path: path.stem)
def test_budgets_allow_no_spills(path):
    """But for 8 bytes of two kernels that Triton 3.8 spills."""
    spilled = {name: facts["stack"] for name, facts in json.loads(path.read_text()).items() if facts["stack"]}
    old = {"sm_100 conv_dgrad bf16": 8, "sm_80 conv_fwd fp32": 8}
    assert spilled == (old if path.stem == "3.8" else {})


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


def test_the_last_program_sees_what_the_others_stored(found):
    """Twice, by groups and over the groups; none where nothing is combined."""
    for name, facts in found.items():
        if "conv_" in name:
            alone = name.endswith(("conv_fwd of 3 channels bf16", "conv_transpose_fwd to 3 channels bf16"))
            assert facts["ordered arrivals"] == (0 if alone else 2), name


IN_ORDER = """
    st.global.b32 [ %rd1 + 0 ], { %r1 };
    bar.sync 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r2, [ %rd2 + 0 ], %r3;
    bar.sync 0;
    @%p2 st.global.b32 [ %rd2 + 0 ], { %r4 };
    @%p3 ld.global.cg.b32 %r5, [ %rd1 + 0 ];
"""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("", ""),
        ("%r1 };\n    bar.sync 0;", "%r1 };"),
        ("%r3;\n    bar.sync 0;", "%r3;"),
        ("acq_rel", "relaxed"),
        (".gpu", ".cta"),
        ("ld.global.cg", "ld.global"),
    ],
    ids=["in order", "no barrier before", "no barrier after", "relaxed", "one block", "cached"],
)
def test_an_order_that_is_not_enough_is_noticed(right, wrong):
    assert right in IN_ORDER
    assert aot_facts.ordered_arrivals(IN_ORDER.replace(right, wrong) if right else IN_ORDER) == (-1 if right else 1)


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
