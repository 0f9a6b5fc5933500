"""What is proved, and how: the tables in `docs/coverage.md`, made from the tests' own parameters.

`python tests/coverage_table.py` writes it; `tests/test_coverage_table.py` fails when it is out of date.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import aot_facts

from fastgan.backends import BACKENDS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "coverage.md"
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
HEAD = """# What is proved, and how

Made by `python tests/coverage_table.py` from the parameters of the tests; do not edit. No layer here is a graphics
card: `pytest -m gpu` runs the same tests of the Triton kernels on one, and nobody has reported such a run yet.

## Every backend against the definition

The tests that compare an operation with its definition, or the definition (`eager`) with PyTorch's own modules, losses
and optimisers. `cpu` runs its C++ kernels, `triton` its kernels in Triton's interpreter, `cuda` the kernels of
`csrc/cuda` thread by thread on the host (`csrc/simt`). fp32, fp16 and bf16 are held to the tolerance rule of
`fastgan/tolerance.py` against fp64 (whole networks to a multiple of it that their test states, adam_ema's definition in
fp32 to torch's bits), fp64 to the tolerance in the test. Kernels that a test takes one by one are listed behind it. The
fused convolutions run inside `ConvStack`; a layout is that of the input, which a kernel may convert. RMS and maximum
errors stand beside PyTorch's own in [errors.md](errors.md).

| operation | backend | dtype | layout | tests |
|---|---|---|---|---|
"""
LAYERS = """
## Triton, kernel by kernel

* **interpreter**: the kernel's numbers, in Triton's interpreter as mended by `tests/interpreter.py`, within the
  tolerance rule of the fp64 definition.
* **ahead of time**: it compiles for sm_80, sm_90 and sm_100 without spills, within `tests/aot_budget`.
* **fake CUDA**: the host's part of it runs on fake CUDA tensors: shapes, layouts, devices, launches, no
  synchronisation.

Gradients of gradients are right through every backend outside compiled code. Inside `torch.compile` they are an error,
torch's own: the function that AOTAutograd wraps the whole compiled graph in raises it before any operation of that
graph is reached (`tests/test_bn_act.py::test_a_second_gradient_of_compiled_code_is_an_error_not_none`), so that no
operation can put a message of its own in its place.

A whole training step also runs on `meta` tensors under a mode that bans every wait for the device
(`tests/test_traces.py`).

| operation | backend | dtype | layout | interpreter | ahead of time | fake CUDA |
|---|---|---|---|---|---|---|
"""


def _parameters(test) -> dict[str, list]:
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return {mark.args[0]: list(mark.args[1]) for mark in marks}


def rows() -> list[str]:
    import test_bn_act_triton
    import test_gan_bce
    import test_traces
    import torch

    compiled = {name.partition(" ")[2] for name in json.loads(aot_facts.NEWEST.read_text())}
    traced = _parameters(test_traces.test_bn_act_on_fake_cuda)
    memory = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

    def row(operation, dtype, layout, interpreted, built, faked):
        name = SHORT[str(dtype).removeprefix("torch.")]
        cells = ["yes" if here else "no" for here in (interpreted, built, faked)]
        return f"| {operation} | triton | {name} | {layout.replace('_', '-')} | {' | '.join(cells)} |"

    kernel = _parameters(test_bn_act_triton.test_kernel)
    layouts = sorted({layout for _, layout in kernel[("shape", "layout")]})
    lines = [
        row(
            name, dtype, layout, True,
            f"{name} {layout.replace('_', '-')} {SHORT[str(dtype).removeprefix('torch.')]}" in compiled,
            dtype in traced["dtype"] and memory[layout] in traced["layout"],
        )
        for name, dtype, layout in itertools.product(kernel["name"], kernel["dtype"], layouts)
    ]  # fmt: skip
    losses = _parameters(test_gan_bce.test_kernel_is_as_right_as_pytorch)
    lines += [
        row(
            "gan_bce", dtype, "any", True, f"gan_bce {SHORT[str(dtype).removeprefix('torch.')]}" in compiled,
            dtype == torch.bfloat16,
        )
        for dtype in losses["dtype"]
    ]  # fmt: skip
    return lines + convolution_rows(compiled, row)


def convolution_rows(compiled: set[str], row) -> list[str]:
    """Of the convolutions that a run of blocks is made of, forward and backward, and the O(C) kernels between them."""
    import test_conv_bn_act_triton
    import test_traces

    traced = _parameters(test_traces.test_each_backward_operation_on_fake_cuda)["dtype"]
    built = {
        "convolve": "conv_fwd", "convolve_block_constants": "conv_fwd",
        "convolve_block_gradient_constants": "conv_dgrad", "weight_gradient": "conv_wgrad",
        "block_constants": "block_constants",
        "block_gradient_constants": "block_gradient_constants",
    }  # fmt: skip
    lines = []
    for name, compiled_as in built.items():
        if name.startswith("block"):  # in the stat dtype, whatever the activations' is
            lines.append(row(name, "float32", "any", True, compiled_as in compiled, True))
            continue
        for dtype in test_conv_bn_act_triton.PARAMETERS["dtype"]:
            short = SHORT[str(dtype).removeprefix("torch.")]
            here = any(
                f"{compiled_as} {form}" in compiled for form in ((short, "tf32") if short == "fp32" else (short,))
            )
            lines.append(row(name, dtype, "channels-last", True, here, dtype in traced))
    return lines


class Check(NamedTuple):
    """A test that compares a backend with the definition."""

    operations: tuple[str, ...]
    backend: str
    test: Callable
    layout: str = ""  # of the test's tensors where that is none of its parameters


def checks() -> list[Check]:
    import test_adam_ema
    import test_bn_act
    import test_bn_act_cpu
    import test_bn_act_cuda
    import test_bn_act_triton
    import test_conv_bn_act
    import test_conv_bn_act_cuda
    import test_conv_bn_act_cuda_operation
    import test_conv_bn_act_triton
    import test_conv_stack
    import test_conv_stack_bf16
    import test_cpu_convolution
    import test_gan_bce
    import test_gan_bce_cuda
    import test_stack_triton

    norm, both, loss, update = ("bn_act",), ("conv_bn_act", "conv_transpose_bn_act"), ("gan_bce",), ("adam_ema",)
    return [
        Check(norm, "eager", test_bn_act.test_semantics),
        Check(norm, "cpu", test_bn_act.test_semantics),
        Check(norm, "cpu", test_bn_act_cpu.test_kernel),
        Check(norm, "cpu", test_bn_act_cpu.test_whole_kernel),
        Check(norm, "triton", test_bn_act.test_semantics),
        Check(norm, "triton", test_bn_act_triton.test_kernel),
        Check(norm, "cuda", test_bn_act_cuda.test_statistics),
        Check(norm, "cuda", test_bn_act_cuda.test_forward),
        Check(norm, "cuda", test_bn_act_cuda.test_backward),
        Check(both, "eager", test_conv_bn_act.test_equal_to_the_modules, "contiguous"),
        Check(both, "cpu", test_cpu_convolution.test_all_directions_are_as_right_as_the_library, "channels-last"),
        Check(both, "cpu", test_cpu_convolution.test_both_schemes_compute_the_definition_in_fp64, "channels-last"),
        Check(both, "cpu", test_conv_stack.test_stack_is_the_sequence_in_fp64, "contiguous"),
        Check(both, "cpu", test_conv_stack.test_dcgan_is_as_right_as_eager_in_fp32, "contiguous"),
        Check(both, "cpu", test_conv_stack_bf16.test_autocast_to_bfloat16_is_as_right_as_eager, "contiguous"),
        Check(both, "triton", test_conv_bn_act.test_equal_to_the_modules, "contiguous"),
        Check(both, "triton", test_conv_bn_act_triton.test_kernels_are_as_right_as_pytorch, "channels-last"),
        Check(both, "triton", test_stack_triton.test_stack_is_the_sequence_in_fp64, "contiguous"),
        Check(both, "triton", test_stack_triton.test_dcgan_is_as_right_as_eager, "contiguous"),
        Check(both, "cuda", test_conv_bn_act_cuda.test_convolution_and_statistics, "channels-last"),
        Check(both, "cuda", test_conv_bn_act_cuda_operation.test_convolution_and_its_gradients_are_the_librarys),
        Check(loss, "eager", test_gan_bce.test_textbook, "any"),
        Check(loss, "cpu", test_gan_bce.test_textbook, "any"),
        Check(loss, "cpu", test_bn_act_cpu.test_gan_bce, "any"),
        Check(loss, "triton", test_gan_bce.test_textbook, "any"),
        Check(loss, "triton", test_gan_bce.test_kernel_is_as_right_as_pytorch, "any"),
        Check(loss, "cuda", test_gan_bce_cuda.test_both_halves_and_gradients, "any"),
        Check(update, "eager", test_adam_ema.test_definition_is_the_papers, "any"),
        Check(update, "eager", test_adam_ema.test_definition_is_torchs_optimiser_then_lerp, "any"),
        Check(update, "cpu", test_adam_ema.test_cpu_kernel_against_the_definition, "any"),
        Check(update, "cuda", test_adam_ema.test_cuda_kernel_against_the_definition, "any"),
    ]


def cases(test: Callable) -> list[dict]:
    """The parameters of every run of a test."""
    axes = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = (mark.args[0],) if isinstance(mark.args[0], str) else mark.args[0]
            axes.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in mark.args[1]])
    return [dict(pair for part in parts for pair in part.items()) for parts in itertools.product(*axes)]


def transposed(case: dict) -> bool | None:
    """Whether a run of a test is of transposed convolutions; None: of both kinds."""
    import test_conv_bn_act_cuda_operation

    what = case.get("network") or case.get("name") or case.get("case")
    if isinstance(what, tuple):  # of the tests of one convolution, the first field says so
        return bool(what[0])
    if what in test_conv_bn_act_cuda_operation.CASES:
        return test_conv_bn_act_cuda_operation.CASES[what][0].__name__ == "conv_transpose_bn_act"
    ups, downs = ("generator", "up", "conv_transpose_bn_act"), ("discriminator", "down", "conv_bn_act")
    return True if what in ups else False if what in downs else None


def covered() -> dict[tuple[str, str, str, str], dict[str, list[str]]]:
    """Operation, backend, dtype and layout -> the tests that run it, each with the kernels that it takes one by one."""
    found: dict = {}
    for check in checks():
        where = f"{check.test.__module__}.py::{check.test.__name__}"
        for case, operation in itertools.product(cases(check.test), check.operations):
            if case.get("backend", check.backend) != check.backend:
                continue
            if "conv" in operation and transposed(case) not in (None, "transpose" in operation):
                continue
            dtype = SHORT[str(case["dtype"] if "dtype" in case else case["case"].dtype).removeprefix("torch.")]
            layout = str(case.get("layout", check.layout)).removeprefix("torch.").removesuffix("_format")
            tests = found.setdefault((operation, check.backend, dtype, layout.replace("_", "-")), {})
            kernels = tests.setdefault(where, [])
            if operation == "bn_act" and "name" in case and case["name"] not in kernels:
                kernels.append(case["name"])
    order = ("bn_act", "conv_bn_act", "conv_transpose_bn_act", "gan_bce", "adam_ema"), BACKENDS, list(SHORT.values())
    return dict(
        sorted(
            found.items(),
            key=lambda one: [
                *(values.index(value) for values, value in zip(order, one[0][:3], strict=True)),
                one[0][3],
            ],
        )
    )


def checked_rows() -> list[str]:
    lines = []
    for key, tests in covered().items():
        named = [f"`{where}`" + f": {', '.join(kernels)}" * bool(kernels) for where, kernels in tests.items()]
        lines.append(f"| {' | '.join(key)} | {'; '.join(named)} |")
    return lines


def page() -> str:
    return HEAD + "\n".join(checked_rows()) + "\n" + LAYERS + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
