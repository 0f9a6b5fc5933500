"""What is proved, and how: the table in `docs/coverage.md`, made from the tests' own parameters.

`python tests/coverage_table.py` writes it; `tests/test_coverage_table.py` fails when it is out of date.
"""

import itertools
import json
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "coverage.md"
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
HEAD = """# What is proved, and how

Made by `python tests/coverage_table.py` from the parameters of the tests; do not edit. No layer here is a graphics
card: `pytest -m gpu` runs the same tests of the Triton kernels on one, and nobody has reported such a run yet.

* **interpreter**: the kernel's numbers, in Triton's interpreter as mended by `tests/interpreter.py`, within the
  tolerance rule of the fp64 definition.
* **ahead of time**: it compiles for sm_80, sm_90 and sm_100 without spills, within `tests/aot_budget.json`.
* **fake CUDA**: the host's part of it runs on fake CUDA tensors: shapes, layouts, devices, launches, no
  synchronisation.

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

    compiled = {name.partition(" ")[2] for name in json.loads((HERE / "aot_budget.json").read_text())}
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
        "convolve": "conv_fwd", "weight_gradient": "conv_wgrad", "block_constants": "block_constants",
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


def page() -> str:
    return HEAD + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
