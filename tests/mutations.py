"""Mutants of the CUDA kernels: each barrier, bounds check and mask of csrc/cuda taken away, one at a time.

`python tests/mutations.py` runs on each mutant the tests of its operation (the kernels on the host) and keeps the score
in tests/mutation_score.json; what is there already is not run again, so it may be stopped at any moment.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastgan import build

ROOT = Path(__file__).resolve().parent.parent
SCORE = Path(__file__).with_name("mutation_score.json")
CUDA = build.CSRC / "cuda"

# file: the tests that must notice, the quickest first
TESTS = {
    "bn_act.cu": ["test_bn_act_cuda.py"],
    "bn_act_backward.cu": ["test_bn_act_cuda.py"],
    "normalise.cuh": ["test_bn_act_cuda.py"],
    "channels.cuh": ["test_bn_act_cuda.py"],
    "pipeline.cuh": ["test_gan_bce_cuda.py", "test_bn_act_cuda.py"],
    "total.cuh": ["test_gan_bce_cuda.py", "test_bn_act_cuda.py"],
    "device.cuh": ["test_gan_bce_cuda.py", "test_bn_act_cuda.py"],
    "dispatch.cuh": ["test_gan_bce_cuda.py"],
    "gan_bce.cu": ["test_gan_bce_cuda.py"],
    "adam_ema.cu": ["test_adam_ema.py"],
    "conv_bn_act.cu": ["test_conv_bn_act_cuda.py"],
    "tensor_core.cuh": ["test_conv_bn_act_cuda.py"],
}

# Where something guard-like may stand. What follows the match up to the closing bracket or the semicolon is mutated.
_CONDITION = re.compile(
    r"\b(?:if|while)(?: constexpr)? \(|\bfor \((?!auto)[^;()]*(?:\([^;()]*\)[^;()]*)*;|\bbool \w+ = "
)
_CLAMP = re.compile(r"(?<![\w:])min\(")
_LOOSE = re.compile(r" (?:[<>]=?|[!=]=|\?) ")  # a comparison or a choice that none of those holds
# Loops over so many elements that the compiler knows how many: nothing at run time can lead them astray.
_CONSTANT_LOOP = re.compile(
    r"\w+ (?:< (?:V|size|floats|sums|chunk|depth|in_flight|stages - 1|warps_per_block|rows_per_thread"
    r"|bce_threads / warp|\d+)|> 0)$"
)

# (file, the line or a part of it): why it is no barrier, bounds check or mask.
NOT_GUARDS: dict[tuple[str, str], str] = {
    ("channels.cuh", "std::conditional_t"): "at compile time",
    ("channels.cuh", "if constexpr"): "chooses between two expressions at compile time",
    ("channels.cuh", "while (lanes < most_lanes"): "host: how wide a block is; any width is right",
    ("channels.cuh", "rows_grid(rows, V), block_threads"): "host: chooses the kernel of the layout",
    ("channels.cuh", "return dim3("): "host: how many blocks; each walks the whole grid's stride, any number is right",
    ("channels.cuh", "if (shape.channels_last)"): "host: chooses the kernel of the layout",
    ("channels.cuh", "if (!shape.channels_last)"): "host: chooses the layout",
    ("channels.cuh", "int error = shape.channels_last"): "host: chooses the kernel of the layout",
    ("channels.cuh", "? FASTGAN_LAUNCH"): "host: chooses the kernel of the layout",
    ("channels.cuh", "if (error) return error"): "host: hands a failed launch on",
    ("bn_act.cu", "if (vectors_fit"): "host: see vectors_fit",
    ("bn_act_backward.cu", "if (vectors_fit"): "host: see vectors_fit",
    ("bn_act.cu", "shape.channels_last ? position"): "chooses the address by the layout",
    ("bn_act_backward.cu", "bool constant ="): "host: whether statistics are constants; a case of the definition",
    ("bn_act_backward.cu", "constant ? "): "host: as above",
    ("bn_act_backward.cu", "grad_weight == nullptr"): "a case of the definition: constant statistics",
    ("bn_act.cu", "deviations < 0 ?"): "arithmetic",
    ("total.cuh", "float gone ="): "arithmetic",
    ("total.cuh", "if (isfinite(sum))"): "arithmetic",
    ("gan_bce.cu", "BceHalf half = blockIdx.x == 0"): "chooses the half",
    ("gan_bce.cu", "float p = x >= 0"): "arithmetic",
    ("gan_bce.cu", "if (target != 0)"): "arithmetic: 0 * infinity",
    ("gan_bce.cu", "if (other != 0)"): "arithmetic: 0 * infinity",
    ("gan_bce.cu", "half.n ? value.of[i]"): "a case of the definition: an absent half counts 0",
    ("adam_ema.cu", "o.decoupled ?"): "a case of the definition",
    ("adam_ema.cu", "batch.count = min("): "host: see the loop's launches",
    ("adam_ema.cu", "if (blocks == 0) continue"): "host: a launch of no blocks is an error on the device only",
    ("adam_ema.cu", "if (int error ="): "host: hands a failed launch on",
    ("adam_ema.cu", "for (int first = 0; first < count"): "host: launches",
    ("adam_ema.cu", "for (int t = 0; t < batch.count"): "host: launches",
    ("tensor_core.cuh", "if constexpr"): "chooses an instruction at compile time",
    ("conv_bn_act.cu", "int output ="): "host arithmetic",
    ("conv_bn_act.cu", "int taps ="): "host arithmetic",
    ("conv_bn_act.cu", "int count = phase"): "host arithmetic",
    ("conv_bn_act.cu", "if (grid.x == 0)"): "host: a launch of no blocks is an error on the device only",
    ("conv_bn_act.cu", "return element =="): "host: chooses the element type",
    ("conv_bn_act.cu", "count > 0 ? (sum + lost)"): "arithmetic: 0 / 0",
    ("conv_bn_act.cu", "static_assert"): "at compile time",
    ("adam_ema.cu", "static_assert"): "at compile time",
    ("tensor_core.cuh", '"r"(valid ? 16 : 0)'): "PTX, which the host does not run; its callers' conditions are mutated",
}

NOT_NOTICED, NOT_RUN = "not noticed", "not run"
# Mutants that no test can notice, and why.
EQUIVALENT: dict[str, str] = {
    "conv_bn_act.cu: [wait_copies<0>(); -> ;]": (
        "after the last step only empty groups are open: copy() closes one for each step beyond the last, too"
    ),
    "bn_act.cu: int64_t count = shape.n * shape.hw, samples = [min(count, int64_t{shift_samples}) -> count];": (
        "the shift may be the mean of any number of values; taking all of them only costs time"
    ),
    "channels.cuh: unsigned vectors = size % vector == 0 ? size / vector : "
    "[size < before -> true] ? 0 : (size - before) / vector;": (
        "planes without whole vectors are read element by element: the same results, more slowly"
    ),
    "conv_bn_act.cu: copy_async_16(&to.a[row][chunk_], [from -> true] ? from : x_, from != nullptr);": (
        "the address of a copy that is not valid is not read"
    ),
    "conv_bn_act.cu: copy_async_16(&to.b[row][chunk_], "
    "[inside -> true] ? weight_ + offset + s.channel : weight_, inside);": (
        "the address of a copy that is not valid is not read"
    ),
}


class Mutant(NamedTuple):
    """One change of one line."""

    file: str
    number: int  # of the line, from 0
    start: int
    end: int
    new: str

    @property
    def key(self) -> str:
        """Which change it is, wherever the line moves to."""
        lines = (CUDA / self.file).read_text().splitlines()
        line = lines[self.number]
        changed = f"{line[: self.start]}[{line[self.start : self.end]} -> {self.new}]{line[self.end :]}".strip()
        before = sum(text.strip() == line.strip() for text in lines[: self.number])
        return f"{self.file}: {changed}" + (f" #{before + 1}" if before else "")


def closing(text: str, start: int, ends: tuple[str, ...] = ()) -> int:
    """Where the bracket that is open at `start`, or the statement, ends; `ends` may end it, too."""
    level = 0
    for i in range(start, len(text)):
        if text[i] in "([{":
            level += 1
        elif text[i] in ")]}":
            if level == 0:
                return i
            level -= 1
        elif level == 0 and (text[i] == ";" or (ends and text.startswith(ends, i))):
            return i
    raise ValueError(f"a condition goes over the end of its line: {text}")


def opening(text: str, end: int) -> int:
    """Where the expression that `end` is in begins: after an open bracket, a comma, `return` or `=`."""
    level, i = 0, end
    while i > 0 and not (level == 0 and (text[i - 1] in "([{,?:" or text[:i].endswith(("return ", " = ")))):
        i -= 1
        level += (text[i] in ")]}") - (text[i] in "([{")
    return i + len(text[i:]) - len(text[i:].lstrip())


def parts(text: str, start: int, end: int, separator: str) -> list[tuple[int, int]]:
    """The ranges between separators that stand in no bracket of their own."""
    found, level, first, i = [], 0, start, start
    while i < end:
        level += (text[i] in "([{") - (text[i] in ")]}")
        if level == 0 and text.startswith(separator, i):
            found.append((first, i))
            i += len(separator)
            first = i
        else:
            i += 1
    return [*found, (first, end)]


def sites(text: str) -> list[tuple[int, int, str]]:
    """Every guard-like piece of a line: (start, end, what to put there)."""
    found = [
        (m.start(), m.end(), ";") for m in re.finditer(r"__syncthreads\(\);|(?<!void )wait_copies<[^>]*>\(\);", text)
    ]
    found += [
        (m.start(), m.end(), "0xffffu") for m in re.finditer(r"(?<=_sync\()all_lanes|(?<=collective\()all_lanes", text)
    ]
    for match in _CLAMP.finditer(text):
        end = closing(text, match.end())
        first = parts(text, match.end(), end, ",")[0]
        found.append((match.start(), end + 1, text[slice(*first)]))
    constant = []
    for match in _CONDITION.finditer(text):
        start = match.end() + (match[0].startswith("for"))
        end = closing(text, start)
        if match[0].startswith("for"):
            if _CONSTANT_LOOP.fullmatch(text[start:end].strip()):
                constant.append((start, end))
                continue
            found.append((start, end, text[start:end].replace(" < ", " <= ").replace(" >= ", " > ")))
            continue
        leaves = re.match(r"\) (?:return|continue)", text[end:])
        separator, new = ("||", "false") if leaves else ("&&", "true")
        if match[0].startswith("while"):
            new = "false"
        for a, b in parts(text, start, end, separator):
            piece = text[a:b]
            found.append((a + len(piece) - len(piece.lstrip()), a + len(piece.rstrip()), new))
    covered = [(a, b) for a, b, _ in found] + constant
    for match in _LOOSE.finditer(text):
        if not any(a <= match.start() <= b for a, b in covered):
            choice = match[0] == " ? "
            span = opening(text, match.start()), match.start() if choice else closing(text, match.end(), (", ", " ? "))
            found.append((*span, "true"))
            covered.append(span)
    return sorted(found)


def listed(name: str, text: str) -> str | None:
    """Why a line holds no guard."""
    return next((reason for (file, part), reason in NOT_GUARDS.items() if file == name and part in text), None)


def code_lines(name: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate((CUDA / name).read_text().splitlines()):
        code = line.split("//")[0].rstrip()
        if not code.lstrip().startswith(("#", "template <")):
            yield number, code


def mutants() -> list[Mutant]:
    """All of them, in the order of files and lines."""
    found = []
    for name in sorted(f.name for f in CUDA.glob("*.cu*")):
        for number, code in code_lines(name):
            if listed(name, code) is None:
                found += [Mutant(name, number, *site) for site in sites(code)]
    return found


class Workshop:
    """A copy of the project whose libraries are built in place, so that a mutant recompiles what it touches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("fastgan", "csrc", "tests", "kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "tests" / "conftest.py").write_text(
            "from pathlib import Path\n"
            "from fastgan import build, library\n"
            "def in_place(name, reason, retry=False):\n"
            "    folder = Path(__file__).parent.parent / 'build' / name\n"
            "    output = folder / build.library_filename(name)\n"
            "    build.build(build.get_build_parameters(name), folder, output)\n"
            "    return output\n"
            "library.build_just_in_time = in_place\n"
        )

    def red_test(self, tests: list[str]) -> str | None:
        """The first test that fails; None when all pass. A crash or a mutant that never ends counts as noticed."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", "cuda"]
        command += [f"--rootdir={self.folder}", *(str(self.folder / "tests" / test) for test in tests)]
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        try:
            run = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900, check=False
            )
        except subprocess.TimeoutExpired:
            return "it never ends"
        if run.returncode == 0:
            return None
        assert "failed: " not in run.stdout or "BuildError" not in run.stdout, run.stdout[-3000:]
        red = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", run.stdout, re.MULTILINE)
        return red[1] if red else f"exit status {run.returncode}"

    def noticed(self, mutant: Mutant) -> str | None:
        """The test that turns red on the mutant."""
        path = self.folder / "csrc" / "cuda" / mutant.file
        original = path.read_text()
        lines = original.splitlines()
        line = lines[mutant.number]
        lines[mutant.number] = line[: mutant.start] + mutant.new + line[mutant.end :]
        path.write_text("\n".join(lines) + "\n")
        try:
            return self.red_test(TESTS[mutant.file])
        finally:
            path.write_text(original)


def load_score() -> dict[str, str]:
    return json.loads(SCORE.read_text()) if SCORE.is_file() else {}


def main() -> None:
    score, todo = load_score(), mutants()
    score = {m.key: score.get(m.key, NOT_RUN) for m in todo}
    SCORE.write_text(json.dumps(score, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for mutant in todo:
            if score[mutant.key] not in (NOT_RUN, NOT_NOTICED) or mutant.key in EQUIVALENT:
                continue
            start = time.monotonic()
            score[mutant.key] = workshop.noticed(mutant) or NOT_NOTICED
            print(f"{time.monotonic() - start:6.1f} s  {mutant.key}\n          {score[mutant.key]}", flush=True)
            SCORE.write_text(json.dumps(score, indent=1) + "\n")


if __name__ == "__main__":
    main()
