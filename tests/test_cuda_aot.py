"""Every CUDA kernel is compiled for every architecture, without spills and within the committed budget.

Read from the library itself: the one built at install where it holds all architectures, else one built just in time.
The budget (tests/cuda_budget.json: registers, shared bytes, occupancy) was written by `python tests/test_cuda_aot.py`
with the nvcc named in it. Compilers differ by a few registers, hence SLACK.
"""

import functools
import json
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from fastgan import build, library

BUDGET = Path(__file__).with_name("cuda_budget.json")
SLACK = 8  # registers
# What a multiprocessor has: warps, blocks, shared bytes (CUDA programming guide, compute capabilities).
MULTIPROCESSOR = {
    "sm_75": (32, 16, 64 << 10),
    "sm_80": (64, 32, 164 << 10),
    "sm_90": (64, 32, 228 << 10),
    "sm_100": (64, 32, 228 << 10),
}
SYSTEM_SHARED = 1024  # bytes that the system takes of each block from sm_80 on; cuobjdump counts them here:
COUNTED_SHARED = {"sm_90", "sm_100"}
REGISTERS = 64 << 10  # of a multiprocessor, on all of them; given to warps 256 at a time
TENSOR_CORE_FILES = {"conv_bn_act.cu"}  # need sm_80: mma with bf16, cp.async
SOURCES = sorted(f.name for f in (build.CSRC / "cuda").glob("*.cu"))


class Kernel(NamedTuple):
    registers: int
    shared: int  # bytes of a block
    stack: int  # bytes of a thread; spilled registers would be here
    threads: int  # of a block, at most
    code: str  # SASS


def architectures(source: str) -> list[str]:
    return [a for a in MULTIPROCESSOR if source not in TENSOR_CORE_FILES or a != "sm_75"]


def occupancy(architecture: str, registers: int, shared: int, threads: int) -> float:
    warps, blocks, shared_bytes = MULTIPROCESSOR[architecture]
    per_block = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // per_block
    reserved = shared + (SYSTEM_SHARED if architecture != "sm_75" else 0)
    by_shared = shared_bytes // reserved if reserved else blocks
    return min(blocks, by_registers, by_shared, warps // per_block) * per_block / warps


# Instructions that each kernel must hold at least so often: a loop that keeps four 16-byte loads under way has four of
# them, for each tensor that it reads. The scalar variants (V = 1) are left out.
LOAD, STORE = r"LDG(?:\.\w+)*\.128", r"ST(?:G)?(?:\.\w+)*\.128"
INSTRUCTIONS = {
    r"reduce_\w+<[48], Statistics": {LOAD: 4},
    r"reduce_\w+<[48], Reduce": {LOAD: 8},
    r"map_\w+<[48], Apply": {LOAD: 4, STORE: 4},
    r"map_\w+<[48], Backward": {LOAD: 8, STORE: 4},
    r"bce<": {LOAD: 4, STORE: 4},
    r"adam$": {LOAD: 5, STORE: 4},
    r"conv<": {r"LDGSTS(?:\.\w+)*\.128": 4, r"LDSM\.16\.\w+\.4": 8, r"HMMA\.16816": 16, r"LDS\.128": 1},
}
WITHOUT = re.compile(r"\w+<1, |combine_partials|conv_moments")


def check_instructions(name: str, code: str) -> None:
    wanted = next((facts for pattern, facts in INSTRUCTIONS.items() if re.match(pattern, name)), None)
    assert (wanted is None) == bool(WITHOUT.match(name)), f"{name} is in neither table, or in both"
    for instruction, least in (wanted or {}).items():
        found = len(re.findall(instruction, code))
        assert found >= least, f"{name}: {found} times {instruction}, expected at least {least}"


# --- what the library holds -------------------------------------------------------------------------------------------


def binary() -> Path:
    """The CUDA library with code for all of MULTIPROCESSOR."""
    needed = [f"{a[3:-1]}.{a[-1]}" for a in MULTIPROCESSOR]
    record, _ = library._prebuilt("cuda")
    if record and set(needed) <= set(record["architectures"].replace("+PTX", "").split(";")):
        return library._package_file(build.library_filename("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(needed))
        return library.build_just_in_time("cuda", "its machine code for all architectures is examined")


def dump(file: Path, *options: str) -> str:
    """What cuobjdump says; torch's Triton brings it along."""
    triton = pytest.importorskip("triton", reason="needs cuobjdump, which comes with Triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = subprocess.run([tools / "cuobjdump", *options, file], capture_output=True, text=True, check=True)
    return run.stdout


def short_names(mangled: list[str]) -> dict[str, str]:
    """Kernels with their template arguments, without namespaces and parameters."""
    said = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    plain = [re.sub(r"\(anonymous namespace\)::|fastgan::cuda::|^void ", "", name) for name in said.splitlines()]
    return {m: re.sub(r"\(.*", "", name).replace(" >", ">") for m, name in zip(mangled, plain, strict=True)}


@functools.cache
def kernels() -> dict[str, dict[str, dict[str, Kernel]]]:
    """{source: {kernel: {architecture: what was compiled}}}"""
    file = binary()
    resources = {}  # (architecture, mangled name): (source, registers, stack, shared)
    for part in dump(file, "--dump-resource-usage").split("Fatbin elf code:")[1:]:
        architecture, source = re.search(r"arch = (sm_\d+)", part)[1], re.search(r"identifier = .*/(\S+)", part)[1]
        for name, *numbers in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:0 ", part):
            resources[architecture, name] = source, *map(int, numbers)
    names = short_names(sorted({name for _, name in resources}))
    found: dict[str, dict[str, dict[str, Kernel]]] = defaultdict(lambda: defaultdict(dict))
    with ThreadPoolExecutor() as pool:
        sass = pool.map(lambda a: dump(file, "-sass", "-arch", a), MULTIPROCESSOR)
        elf = pool.map(lambda a: dump(file, "-elf", "-arch", a), MULTIPROCESSOR)
    for architecture, text, info in zip(MULTIPROCESSOR, sass, elf, strict=True):
        _, *parts = re.split(r"Function : (\w+)", text)
        code = dict(zip(parts[::2], parts[1::2], strict=True))
        about = info.split("\n.nv.info.")[1:]
        threads = {a.partition("\n")[0]: re.search(r"MAX_THREADS\n.*\n.*0x(\w+) 0x1 0x1", a) for a in about}
        for name, instructions in code.items():
            source, registers, stack, shared = resources[architecture, name]
            if shared and architecture in COUNTED_SHARED:
                shared -= SYSTEM_SHARED
            if architecture in architectures(source):
                kernel = Kernel(registers, shared, stack, int(threads[name][1], 16), instructions)
                found[source][names[name]][architecture] = kernel
    return found


@pytest.fixture
def compiled():
    try:
        return kernels()
    except build.BuildError as error:
        pytest.skip(f"the CUDA library cannot be built here: {error}")


@pytest.mark.parametrize("source", SOURCES)
def test_resources_are_within_the_budget(compiled, source):
    budget = json.loads(BUDGET.read_text())["kernels"][source]
    assert compiled[source].keys() == budget.keys(), "run `python tests/test_cuda_aot.py` for the new budget"
    for name, by_architecture in compiled[source].items():
        assert by_architecture.keys() == budget[name].keys()
        for architecture, kernel in by_architecture.items():
            allowed_registers, allowed_shared, expected_occupancy = budget[name][architecture]
            where = f"{name} on {architecture}"
            assert kernel.stack == 0, where
            assert kernel.registers <= allowed_registers + SLACK, where
            assert kernel.shared <= allowed_shared, where
            least = occupancy(architecture, allowed_registers + SLACK, allowed_shared, kernel.threads)
            assert least <= occupancy(architecture, kernel.registers, kernel.shared, kernel.threads), where
            assert expected_occupancy == round(
                occupancy(architecture, allowed_registers, allowed_shared, kernel.threads), 3
            )
            check_instructions(name, kernel.code)


def test_a_kernel_without_its_vector_loads_is_noticed():
    name, good = "map_contiguous<8, Apply<__half>>", "LDG.E.128.CONSTANT R4, [R2] ; " * 4 + "STG.E.128 [R2], R4 ; " * 4
    check_instructions(name, good)
    for planted in (good.replace("LDG", "", 1), good.replace(".128", ".64"), "LDG.E.U16 R4, [R2] ; " * 40):
        with pytest.raises(AssertionError, match=r"map_contiguous<8, Apply<__half>>: \d times"):
            check_instructions(name, planted)
    with pytest.raises(AssertionError, match="new_kernel is in neither table"):
        check_instructions("new_kernel", "")


def test_every_source_is_in_the_budget_on_every_architecture():
    budget = json.loads(BUDGET.read_text())["kernels"]
    assert sorted(budget) == SOURCES
    for source, by_kernel in budget.items():
        assert all(sorted(by) == sorted(architectures(source)) for by in by_kernel.values()), source


def test_occupancy():
    """Worked by hand: 64 registers a thread and 256 threads leave room for 4 blocks of 8 warps."""
    assert occupancy("sm_80", 64, 0, 256) == 32 / 64
    assert occupancy("sm_80", 32, 0, 256) == 1.0
    assert occupancy("sm_80", 32, 81 << 10, 256) == 16 / 64
    assert occupancy("sm_75", 32, 0, 512) == 1.0


def main():
    def figures(a: str, k: Kernel) -> list:
        return [k.registers, k.shared, round(occupancy(a, k.registers, k.shared, k.threads), 3)]

    budget = {
        source: {name: {a: figures(a, k) for a, k in by.items()} for name, by in sorted(kernels()[source].items())}
        for source in SOURCES
    }
    assert not any(k.stack for by_name in kernels().values() for by in by_name.values() for k in by.values()), "a spill"
    nvcc = build.find_cuda(build.find_torch().cuda).nvcc
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    said = {"nvcc": re.search(r"V([\d.]+)", version)[1], "columns": "registers, shared bytes, occupancy"}
    text = json.dumps(said | {"kernels": budget}, indent=1)
    BUDGET.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+([\d.]+)\s+\]", r"[\1, \2, \3]", text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
