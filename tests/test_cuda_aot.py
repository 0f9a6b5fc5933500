"""Every CUDA kernel compiles for every architecture, without spills and within the committed budget.

The budget (tests/cuda_budget.json: registers, shared bytes, occupancy) was written by
`python tests/test_cuda_aot.py` with the nvcc named in it. Compilers differ by a few registers, hence SLACK.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastgan import build

BUDGET = Path(__file__).with_name("cuda_budget.json")
SLACK = 8  # registers
# What a multiprocessor has: warps, blocks, shared bytes (CUDA programming guide, compute capabilities).
MULTIPROCESSOR = {
    "sm_75": (32, 16, 64 << 10),
    "sm_80": (64, 32, 164 << 10),
    "sm_90": (64, 32, 228 << 10),
    "sm_100": (64, 32, 228 << 10),
}
REGISTERS = 64 << 10  # of a multiprocessor, on all of them; given to warps 256 at a time
TENSOR_CORE_FILES = {"conv_bn_act.cu"}  # need sm_80: mma with bf16, cp.async
SOURCES = sorted(f.name for f in (build.CSRC / "cuda").glob("*.cu"))


def nvcc() -> str:
    home = build.os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or ""


def short_name(mangled: str) -> str:
    """The kernel with its template arguments, without namespaces and parameters."""
    said = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|fastgan::cuda::|^void ", "", said)
    return re.sub(r"\(.*", "", name).replace(" >", ">")


def occupancy(architecture: str, registers: int, shared: int, threads: int) -> float:
    warps, blocks, shared_bytes = MULTIPROCESSOR[architecture]
    per_block = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // per_block
    reserved = shared + (1024 if architecture != "sm_75" else 0)
    by_shared = shared_bytes // reserved if reserved else blocks
    return min(blocks, by_registers, by_shared, warps // per_block) * per_block / warps


# Instructions that each kernel must hold at least so often: a loop that keeps four 16-byte loads under way has four of
# them in a row, for each tensor that it reads. The scalar variants (V = 1) are left out.
LOAD, STORE = r"ld\.global(?:\.nc)?(?:\.L\w+::\w+)*\.v4", r"st(?:\.global)?\.v4"
INSTRUCTIONS = {
    r"reduce_\w+<[48], Statistics": {LOAD: 4},
    r"reduce_\w+<[48], Reduce": {LOAD: 8},
    r"map_\w+<[48], Apply": {LOAD: 4, STORE: 4},
    r"map_\w+<[48], Backward": {LOAD: 8, STORE: 4},
    r"bce<": {LOAD: 4, STORE: 4},
    r"adam$": {LOAD: 5, STORE: 4},
    r"conv<": {r"cp\.async\.cg\.shared\.global": 4, r"ldmatrix\.sync": 8, r"mma\.sync": 16, r"ld\.shared\.v4": 1},
}
WITHOUT = re.compile(r"\w+<1, |combine_partials|conv_moments")


def check_instructions(ptx: dict[str, str]) -> None:
    """`ptx`: the text of each kernel."""
    for kernel, text in ptx.items():
        wanted = next((facts for name, facts in INSTRUCTIONS.items() if re.match(name, kernel)), None)
        assert (wanted is None) == bool(WITHOUT.match(kernel)), f"{kernel} is in neither table, or in both"
        for instruction, least in (wanted or {}).items():
            found = len(re.findall(instruction, text))
            assert found >= least, f"{kernel}: {found} times {instruction}, expected at least {least}"


def compile_kernels(source: str, folder: Path) -> tuple[dict[str, dict[str, list]], list[dict[str, str]]]:
    """{kernel: {architecture: [registers, shared bytes, spilled bytes, threads]}}, [{kernel: PTX}]"""
    architectures = [a for a in MULTIPROCESSOR if source not in TENSOR_CORE_FILES or a != "sm_75"]
    flags = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures]
    command = [nvcc(), *build.NVCC_FLAGS, f"-I{build.CSRC}", *flags, "--threads", "2", "-Xptxas", "-v", "-keep"]
    command += ["-c", str(build.CSRC / "cuda" / source), "-o", str(folder / "kernels.o")]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    threads, texts = {}, []
    for ptx in folder.glob("*.ptx"):
        entries = list(
            re.finditer(r"\.entry (\w+)\(.*?\.maxntid (\d+).*?^}", ptx.read_text(), re.DOTALL | re.MULTILINE)
        )
        threads |= {entry[1]: int(entry[2]) for entry in entries}
        texts.append({short_name(entry[1]): entry[0] for entry in entries})
    found: dict[str, dict[str, list]] = {}
    pattern = (
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for mangled, architecture, stores, loads, registers, rest in re.findall(pattern, run.stderr, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = [int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads), threads[mangled]]
        found.setdefault(short_name(mangled), {})[architecture] = numbers
    assert found
    assert texts
    return found, texts


@pytest.mark.skipif(not nvcc(), reason="needs nvcc (the CUDA toolkit)")
@pytest.mark.parametrize("source", SOURCES)
def test_resources_are_within_the_budget(source, tmp_path):
    budget = json.loads(BUDGET.read_text())["kernels"][source]
    measured, texts = compile_kernels(source, tmp_path)
    for ptx in texts:
        check_instructions(ptx)
    assert measured.keys() == budget.keys(), "run `python tests/test_cuda_aot.py` for the new budget"
    for kernel, by_architecture in measured.items():
        assert by_architecture.keys() == budget[kernel].keys()
        for architecture, (registers, shared, spilled, threads) in by_architecture.items():
            allowed_registers, allowed_shared, expected_occupancy = budget[kernel][architecture]
            where = f"{kernel} on {architecture}"
            assert spilled == 0, where
            assert registers <= allowed_registers + SLACK, where
            assert shared <= allowed_shared, where
            least = occupancy(architecture, allowed_registers + SLACK, allowed_shared, threads)
            assert least <= occupancy(architecture, registers, shared, threads), where
            assert expected_occupancy == round(occupancy(architecture, *budget[kernel][architecture][:2], threads), 3)


def test_a_kernel_without_its_vector_loads_is_noticed():
    good = {"map_contiguous<8, Apply<__half>>": "ld.global.nc.v4.u32 ; " * 4 + "st.global.v4.u32 ; " * 4}
    check_instructions(good)
    for planted in ("ld.global.nc.v4.u32 ; " * 3 + "st.global.v4.u32 ; " * 4, "ld.global.u16 ; " * 40):
        with pytest.raises(AssertionError, match=r"map_contiguous<8, Apply<__half>>: \d times"):
            check_instructions(dict.fromkeys(good, planted))
    with pytest.raises(AssertionError, match="new_kernel is in neither table"):
        check_instructions({"new_kernel": ""})


def test_every_source_is_in_the_budget_on_every_architecture():
    kernels = json.loads(BUDGET.read_text())["kernels"]
    assert sorted(kernels) == SOURCES
    for source, by_kernel in kernels.items():
        expected = [a for a in MULTIPROCESSOR if source not in TENSOR_CORE_FILES or a != "sm_75"]
        assert all(sorted(by) == sorted(expected) for by in by_kernel.values()), source


def test_occupancy():
    """Worked by hand: 64 registers a thread and 256 threads leave room for 4 blocks of 8 warps."""
    assert occupancy("sm_80", 64, 0, 256) == 32 / 64
    assert occupancy("sm_80", 32, 0, 256) == 1.0
    assert occupancy("sm_80", 32, 81 << 10, 256) == 16 / 64
    assert occupancy("sm_75", 32, 0, 512) == 1.0


def main():
    kernels = {}
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            measured, texts = compile_kernels(source, Path(folder))
        for ptx in texts:
            check_instructions(ptx)
        spilling = [k for k, by in measured.items() if any(spilled for _, _, spilled, _ in by.values())]
        assert not spilling, spilling
        kernels[source] = {
            kernel: {a: [r, s, round(occupancy(a, r, s, t), 3)] for a, (r, s, spilled, t) in by.items()}
            for kernel, by in sorted(measured.items())
        }
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    said = {"nvcc": re.search(r"V([\d.]+)", version)[1], "columns": "registers, shared bytes, occupancy"}
    text = json.dumps(said | {"kernels": kernels}, indent=1)
    BUDGET.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+([\d.]+)\s+\]", r"[\1, \2, \3]", text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
