"""Bugs planted in the Triton convolutions: the tests of test_conv_bn_act_triton.py notice each."""

import fastgan.kernels.conv_bn_act as kernels
import fastgan.kernels.conv_bn_act_arrivals as arrivals
import fastgan.kernels.conv_bn_act_constants as constant_kernels
import fastgan.kernels.conv_bn_act_operand as operand_kernels
import fastgan.kernels.conv_bn_act_tiles as tiles
import fastgan.kernels.conv_bn_act_wgrad as wgrad_kernels
import pytest
import test_conv_bn_act_triton as right_kernels
import torch
from convolution_cases import Case, convolve_arguments, finished_verdict, verdict, weight_gradient_arguments
from triton_device import MARKS

pytestmark = [*MARKS, pytest.mark.usefixtures("full_precision", "chains_of_fp32_are_cut")]

MASKED_FIRST = ("return tl.where(inside, mapped, 0.0).to(value.dtype)", "return mapped.to(value.dtype)")
BUGS = {
    "padding before the prologue": (operand_kernels, *MASKED_FIRST),
    "B of the gradient dropped": (operand_kernels, "second.to(mean.dtype) - mean, shift", "mean * 0, shift"),
    "C of the gradient dropped": (operand_kernels, "shift + tl.zeros_like(mean))", "tl.zeros_like(mean))"),
    "gradient without its own mean": (operand_kernels, "second.to(mean.dtype) - mean,", "second.to(mean.dtype),"),
    "halo row dropped": (kernels, "(h >= 0) & (h < height)", "(h > 0) & (h < height)"),
    "halo column dropped": (kernels, "(w >= 0) & (w < width)", "(w >= 0) & (w < width - 1)"),
    "rows that are none counted": (kernels, "tl.sum(exists.to(ACC), 0)", "tl.sum(exists.to(ACC), 0) + 1"),
    "slope not applied backward": (kernels, "_through_activation(acc, v, OUT_SLOPE)", "acc"),
    "product with y instead of y - mu": (kernels, "            raw = raw - m\n", ""),
    "bias forgotten": (kernels, "acc += tl.load(bias + n, real, 0.0).to(ACC)[None, :]", "acc += 0.0"),
    "phases swapped": (kernels, "j * STRIDE[1] + right", "j * STRIDE[1] + (STRIDE[1] - 1 - right)"),
    "merged phases swapped": (kernels, "left[:, None] * STRIDE[1] + s0", "left[:, None] * STRIDE[1] + 1 - s0"),
    "a merged phase's last position dropped": (kernels, "& (s < KERNEL[1])", "& (s < KERNEL[1] - 1)"),
    "a merged phase's first pixel dropped": (kernels, "& (j >= 0) & (j < out_width)", "& (j > 0) & (j < out_width)"),
    "a split lost": (wgrad_kernels, "in tl.static_range(GROUP):", "in tl.static_range(1, GROUP):"),
    "halo of the weight gradient dropped": (wgrad_kernels, "& (h >= 0) & (h < height)", "& (h > 0) & (h < height)"),
}  # fmt: skip


def first_miss(modules: dict) -> str | None:
    """Of a few elements, so that a dropped term cannot hide."""
    common = {"small_channels": 2, "large_channels": 3, "image": (2, 9, 6)}
    cases = [
        Case(False, **common, operand="activation", epilogue="statistics", bias=True),
        Case(True, **common, operand="gradient", epilogue="backward"),
        Case(False, **common, operand="plain", epilogue="statistics", dtype=torch.bfloat16),
    ]
    merged = Case(True, (3, 3), **common, operand="activation", epilogue="store")
    if (reason := verdict(modules.get(kernels, kernels), "convolve", [convolve_arguments(merged)])) is not None:
        return reason
    for case in cases:
        several = [convolve_arguments(case, 10 * seed) for seed in range(4)]
        reason = finished_verdict(modules.get(kernels, kernels), case, several)
        if reason is None and case.dtype == torch.float64:
            several = [weight_gradient_arguments(case, seed) for seed in range(2)]
            reason = verdict(modules.get(wgrad_kernels, wgrad_kernels), "weight_gradient", several)
        if reason is not None:
            return reason
    return None


def test_the_planted_bugs_are_the_only_difference():
    assert first_miss({}) is None


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, planted_kernels, monkeypatch):
    module, right, wrong = BUGS[bug]
    monkeypatch.setattr(tiles, "_PLAIN", (tiles.Tile(16, 32, 16, 4, 1),))
    planted = planted_kernels(module, right, wrong)
    if module is operand_kernels:
        for user in (kernels, wgrad_kernels):
            monkeypatch.setattr(user, "_operand", planted._operand)
        assert first_miss({}) is not None
    else:
        assert first_miss({module: planted}) is not None


CONSTANT_BUGS = {
    "biased running variance": ("m2 / tl.maximum(counts - 1.0, 1.0)", "m2 / counts"),
    "eps outside the root": ("1.0 / tl.sqrt(var + tl.full((BC,), eps, ACC))",
                             "1.0 / (tl.sqrt(var) + tl.full((BC,), eps, ACC))"),
    "spread of the tiles' means dropped": (" + n * apart * apart, 0)", ", 0)"),
    "running statistics not kept": ("tl.store(running_mean + c, new_mean", "tl.store(running_mean + c, 0 * new_mean"),
}  # fmt: skip


@pytest.mark.parametrize("bug", CONSTANT_BUGS)
def test_a_planted_bug_in_the_constants_is_noticed(bug, planted_kernels, monkeypatch):
    planted = planted_kernels(constant_kernels, *CONSTANT_BUGS[bug])
    monkeypatch.setattr(kernels, "block_constants", planted.block_constants)
    with pytest.raises(AssertionError):
        right_kernels.test_block_constants(65, torch.float32, 3)


STORED_BUGS = {
    "m2 of the unrounded output": ("result = tl.where(filled, stored.to(ACC), 0.0)", "result = acc"),
    "what rounding takes from the mean dropped": ("3 * every + part, rest", "3 * every + part, rest * 0"),
}


@pytest.mark.parametrize("bug", STORED_BUGS)
def test_a_planted_bug_in_the_statistics_is_noticed(bug, planted_kernels, monkeypatch):
    planted = planted_kernels(kernels, *STORED_BUGS[bug])
    monkeypatch.setattr(planted, "tile_of", lambda *_: tiles.Tile(32, 16, 16, 4, 1))
    found = [right_kernels.stored_statistics(planted, dtype, 1e4) for dtype in (torch.float32, torch.bfloat16)]
    assert any(reason is not None for reason in found)


def test_a_counter_that_is_left_is_noticed(small_tiles, planted_kernels, monkeypatch):
    planted = planted_kernels(arrivals, "tl.store(counter, 0)", "tl.store(counter, 1)")
    for module in (constant_kernels, wgrad_kernels):
        monkeypatch.setattr(module, "_comes_last", planted._comes_last)
    with pytest.raises(AssertionError):
        right_kernels.test_counters_are_zero_again_after_a_launch(None, monkeypatch)
