"""Compile every Triton kernel ahead of time, without a GPU, and print what the assembler reports, as JSON.

`python tests/aot.py` is run by `tests/test_aot.py` in a process of its own: where the interpreter is on,
nothing can be compiled. `python tests/aot.py --write` renews the budget.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from aot_convolutions import launches
from aot_facts import BUDGET, loops_by_more_than_one, ordered_arrivals
from fastgan.kernels import bn_act, gan_bce, tuning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
DTYPES = ("fp32", "fp16", "bf16")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INT32 = {"rows", "columns", "channels", "per_split", "splits", "n_real", "n_fake"}
FLOAT = {"n": "fp32", "momentum": "fp64", "unbias": "fp64"}
IN_DTYPE = {"y", "z", "dy", "dz", "real", "fake", "logits"}
WIDE = {"columns", "channels"}  # multiples of 16 in every network here; Triton specialises on it

ACC = {"ACC": triton.language.float32}
CHANNELS_LAST = {"CHANNELS_LAST": True, "BR": 64, "BL": 64}
CHANNELS_LAST_APPLY = {"CHANNELS_LAST": True, "BR": 32, "BL": 128}
CONTIGUOUS = {"CHANNELS_LAST": False, "BR": 4, "BL": 1024}
APPLY = {**ACC, "SLOPE": 0.2}
FINISH = {"SPLITS": 128, "BC": 16}
VARIANTS = {
    "bn_stats": (bn_act._stats_kernel, ACC, True),
    "bn_stats second stage": (bn_act._combine_kernel, FINISH, False),
    "bn_act": (bn_act._apply_kernel, APPLY, True),
    "bn_act_reduce": (bn_act._reduce_kernel, APPLY, True),
    "bn_act_reduce second stage": (bn_act._sum_kernel, FINISH, False),
    "bn_act_backward": (bn_act._backward_kernel, {**APPLY, "FROZEN": False}, True),
    "update_running_stats": (bn_act._update_kernel, {"BC": 256}, False),
    "gan_bce": (
        gan_bce._gan_bce_kernel,
        {**ACC, "REAL_TARGET": 0.9, "FAKE_TARGET": 0.0, "REAL": True, "FAKE": True, "BLOCK": 256},
        None,
    ),
}


def variants():
    """(name, kernel, constants, dtype) of everything that is compiled."""
    for name, (kernel, constants, layouts) in VARIANTS.items():
        for dtype in DTYPES if layouts is not False else ("fp32",):
            if layouts:
                yield f"{name} channels-last {dtype}", kernel, {**constants, **CHANNELS_LAST}, dtype
                yield f"{name} contiguous {dtype}", kernel, {**constants, **CONTIGUOUS}, dtype
            else:
                yield f"{name} {dtype}", kernel, constants, dtype
    for tile, _ in tuning.CONFIGURATIONS[1:]:
        for name in ("bn_act", "bn_act_backward"):
            kernel, constants, _ = VARIANTS[name]
            for layout, shape in (("channels-last", CHANNELS_LAST_APPLY), ("contiguous", CONTIGUOUS)):
                sizes = {**shape, "BR": tile // shape["BL"]}
                yield f"{name} {layout} bf16 tile {tile}", kernel, {**constants, **sizes}, "bf16"


def compile_kernel(kernel, constants, dtype, architecture):
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INT32:
            signature[name] = "i32"
        elif name in FLOAT:
            signature[name] = FLOAT[name]
        else:
            signature[name] = f"*{dtype if name in IN_DTYPE else 'fp32'}"
        if signature[name].startswith("*") or name in WIDE:
            attributes[(index,)] = [["tt.divisibility", 16]]
    tile = constants.get("BR", 0) * constants.get("BL", 0)
    warps = dict(tuning.CONFIGURATIONS).get(tile, bn_act.WARPS)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def compile_launch(launch, architecture):
    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def facts(compiled) -> dict[str, int]:
    """Registers, spilled bytes (stack), shared memory; in the PTX the widths of global loads and stores, matrix
    instructions of the tensor cores and asynchronous copies to shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "loads of 16 bytes": len(re.findall(r"ld\.global\S*\.(v4\.b32|v2\.b64)", ptx)),
        "stores of 16 bytes": len(re.findall(r"st\.global\S*\.(v4\.b32|v2\.b64)", ptx)),
        "loops that may pass 2^31": loops_by_more_than_one(compiled.asm["ttir"]),
    }


def tensor_core_facts(compiled) -> dict[str, int]:
    ptx = compiled.asm["ptx"]
    return {
        "matrix instructions": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "asynchronous copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "ordered arrivals": ordered_arrivals(ptx),
    }


def of_architecture(architecture: int) -> dict[str, dict[str, int]]:
    found = {name: facts(compile_kernel(*what, architecture)) for name, *what in variants()}
    for name, launch in launches(architecture).items():
        compiled = compile_launch(launch, architecture)
        found[name] = {**facts(compiled), **(tensor_core_facts(compiled) if "BK" in launch.constants else {})}
    return {f"sm_{architecture} {name}": value for name, value in found.items()}


def main() -> None:
    slowest_first = sorted(ARCHITECTURES, reverse=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = {name: value for part in pool.map(of_architecture, slowest_first) for name, value in part.items()}
    print(json.dumps(found))
    if sys.argv[1:] == ["--write"]:
        for value in found.values():
            value.pop("loops that may pass 2^31")  # none is allowed, whatever was found
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
        BUDGET.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
