"""How the C++ and CUDA sources in `csrc/` become libraries, at install and just in time.

`get_build_parameters("cpu" | "cuda")` says which files are compiled with which flags and how they are linked;
`build` runs ninja on that. Nothing here imports torch or fastgan, so `setup.py` loads this file by its path.

Both libraries use LibTorch's stable ABI as of torch 2.10: they compile in seconds and survive torch upgrades.
They are plain shared libraries (no Python symbols), loaded by `torch.ops.load_library`.

Environment: `CXX`, `CXXFLAGS` (appended, also when linking), `CUDA_HOME`, `TORCH_CUDA_ARCH_LIST`, `MAX_JOBS`.
"""

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("cpu", "cuda")
# The stable ABI that the libraries are compiled against, so the least torch that loads them.
TORCH_MINIMUM = (2, 10)
TORCH_TARGET_VERSION = f"0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}000000000000"
NVCC_FLAGS = ("-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden")

_HERE = Path(__file__).resolve().parent
CSRC = next((p for p in (_HERE / "csrc", _HERE.parent / "csrc") if p.is_dir()), _HERE / "csrc")

# A chain, each set holding the one before it. `csrc/cpu/*.isa.cpp` is compiled once per set, the rest once.
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}

# torch's names for architectures, which TORCH_CUDA_ARCH_LIST may use.
_ARCH_NAMES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}


class BuildError(Exception):
    """The library cannot be built here; the message says what is missing or wrong and what to do about it."""


@dataclass(frozen=True)
class Unit:
    """One compilation: `command` is the compiler with its flags, without source and output."""

    source: Path
    object: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class BuildParameters:
    """All that decides a library's content. `metadata` travels beside the library and is compared at load."""

    library: str
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    libraries: tuple[str, ...]
    metadata: dict[str, str]

    @property
    def digest(self) -> str:
        """Changes with every source, flag, compiler and torch version that could change the library."""
        commands = [[u.source.name, u.object, *u.command] for u in self.units]
        text = json.dumps([commands, self.link, self.libraries, self.metadata], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def library_filename(library: str) -> str:
    return f"libfastgan_{library}.so"


def get_build_parameters(library: str) -> BuildParameters:
    """The build of `library` with this machine's compilers and the torch that Python would import.

    "cpu" and "cuda" are fastgan's; "simt" is the tests' module that runs the CUDA kernels on the host.
    Raises `BuildError` when it cannot be built here.
    """
    recipes = {"cpu": _cpu, "cuda": _cuda, "simt": _simt}
    if library not in recipes:
        raise BuildError(f"library must be one of {', '.join(recipes)}; got {library!r}")
    if not CSRC.is_dir():
        raise BuildError(
            f"the C++ sources are missing: expected the folder {CSRC}. Install fastgan from its wheel or repository."
        )
    cxx = find_cxx()
    metadata = {
        "library": library,
        "sources": source_digest(library),
        "machine": platform.machine(),
        "compiler": _version_line(cxx),
    }
    return recipes[library](cxx, metadata)


def _cxx_flags() -> tuple[str, ...]:
    extra = tuple(shlex.split(os.environ.get("CXXFLAGS", "")))
    return (
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
        f"-I{CSRC}",
        *extra,
    )


def _link(cxx: tuple[str, ...]) -> tuple[str, ...]:
    return (*cxx, "-shared", *shlex.split(os.environ.get("CXXFLAGS", "")))


def _unit(source: Path, command: tuple[str, ...], tag: str = "") -> Unit:
    return Unit(source, f"{source.parent.name}_{source.name}{tag}.o", command)


def _cpu(cxx: tuple[str, ...], metadata: dict[str, str]) -> BuildParameters:
    torch = find_torch()
    sets = [s for s in INSTRUCTION_SETS if _supports(cxx, s)]
    flags = (*_cxx_flags(), *torch.flags("cpu"), *(f"-DFASTGAN_HAS_{s.upper()}" for s in sets))
    command = (*cxx, "-O3", *flags)
    files = sorted((CSRC / "cpu").glob("*.cpp"))
    units = [_unit(f, command) for f in (CSRC / "registration.cpp", *files) if not f.name.endswith(".isa.cpp")]
    # Sets in ascending order: the linker keeps the first of several copies of an inline function, so code of one
    # set can only ever call library templates compiled for that set or a smaller one.
    for s in sets:
        # No default runs the plain kernels, and -O3 takes twice as long to compile them.
        per_set = (*cxx, "-O2" if s == "plain" else "-O3", *flags, f"-DFASTGAN_ISA={s}", *INSTRUCTION_SETS[s])
        units += [_unit(f, per_set, f".{s}") for f in files if f.name.endswith(".isa.cpp")]
    libraries = (*torch.libraries, "-ltorch_cpu")
    return BuildParameters("cpu", tuple(units), _link(cxx), libraries, metadata | torch.metadata)


def _cuda(cxx: tuple[str, ...], metadata: dict[str, str]) -> BuildParameters:
    torch = find_torch()
    cuda = find_cuda(torch.cuda)
    architectures = cuda_architectures(cuda.version)
    release = ".".join(map(str, cuda.version))
    metadata |= torch.metadata | {"cuda": release, "architectures": ";".join(architectures)}
    host = (*cxx, "-O3", *_cxx_flags(), *torch.flags("cuda"), "-DUSE_CUDA", f"-I{cuda.home / 'include'}")
    device = (str(cuda.nvcc), f"-ccbin={cxx[-1]}", *NVCC_FLAGS, f"-I{CSRC}", *gencode(architectures))
    units = [_unit(CSRC / "registration.cpp", host)]
    units += [_unit(f, host) for f in sorted((CSRC / "cuda").glob("*.cpp"))]
    units += [_unit(f, device) for f in sorted((CSRC / "cuda").glob("*.cu"))]
    libraries = (*torch.libraries, "-ltorch_cpu", "-ltorch_cuda", f"-L{cuda.library_folder}", "-lcudart")
    return BuildParameters("cuda", tuple(units), _link(cxx), libraries, metadata)


def _simt(cxx: tuple[str, ...], metadata: dict[str, str]) -> BuildParameters:
    pybind11 = _find_package("pybind11", "pybind11") / "include"
    python = (f"-I{pybind11}", f"-isystem{sysconfig.get_paths()['include']}")
    host = (*cxx, "-O1", *_cxx_flags(), "-DFASTGAN_SIMT", *python)
    # Instrumented, but linked without the sanitizer's library: simt/memory.cpp takes its place.
    kernel = (
        *cxx,
        "-xc++",
        "-O1",
        "-g",
        *_cxx_flags(),
        "-DFASTGAN_SIMT",
        "-ffp-contract=off",
        "-fsanitize=thread",
    )
    units = [_unit(f, host) for f in sorted((CSRC / "simt").glob("*.cpp"))]
    units += [_unit(f, kernel) for d in ("simt", "cuda") for f in sorted((CSRC / d).glob("*.cu"))]
    return BuildParameters("simt", tuple(units), _link(cxx), (), metadata | {"python": sys.version.split()[0]})


# What a compiler must know of a set beside its flags: clang took AMX's before it could ask a processor for it.
_TRIALS = {
    "amx": """
#include <immintrin.h>
int main() {
  _tile_dpbf16ps(0, 1, 2);
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
}
"""
}


@functools.cache
def _supports(cxx: tuple[str, ...], name: str) -> bool:
    if name == "plain":
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    command = [*cxx, *INSTRUCTION_SETS[name], "-c", "-x", "c++", "-", "-o", os.devnull]
    source = _TRIALS.get(name, "int main() {}")
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def source_digest(library: str) -> str:
    """A digest of the sources of `library` and of this file, which holds the flags."""
    folders = [CSRC, CSRC / library, *([CSRC / "cuda"] if library == "simt" else [])]
    files = [f for folder in folders for f in folder.glob("*") if f.is_file()]
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(files):
        digest.update(str(file.relative_to(CSRC)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# --- what the machine offers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    folder: Path
    version: str
    cuda: str | None

    @property
    def metadata(self) -> dict[str, str]:
        return {"torch_abi": ".".join(map(str, TORCH_MINIMUM)), "torch": self.version}

    @property
    def libraries(self) -> tuple[str, ...]:
        return (f"-L{self.folder / 'lib'}",)

    def flags(self, library: str) -> tuple[str, ...]:
        target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        return (target, f"-DFASTGAN_LIBRARY_{library.upper()}", f"-isystem{self.folder / 'include'}")


def _find_package(name: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"{name} is not installed for {sys.executable}; run `pip install '{requirement}'`.")
    return Path(next(iter(spec.submodule_search_locations)))


def find_torch() -> Torch:
    """The torch that `import torch` would take, without importing it."""
    folder = _find_package("torch", "torch>=2.10")
    version = runpy.run_path(str(folder / "version.py"))
    number = tuple(int(n) for n in re.findall(r"\d+", version["__version__"])[:2])
    if number < TORCH_MINIMUM:
        raise BuildError(
            f"torch {version['__version__']} is too old: fastgan's libraries need torch >= 2.10 (LibTorch's "
            "stable ABI). Run `pip install --upgrade torch`."
        )
    return Torch(folder, version["__version__"], version.get("cuda"))


def find_cxx() -> tuple[str, ...]:
    """The C++ compiler as command words: `CXX`, or the first of c++, g++ and clang++ on PATH."""
    asked = os.environ.get("CXX")
    candidates = [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]
    for words in candidates:
        if words and shutil.which(words[0]):
            return tuple(words)
    looked = f"CXX={asked}" if asked else "c++, g++ and clang++ on PATH"
    raise BuildError(
        f"no C++ compiler was found (looked for {looked}). Install one, e.g. `apt install g++`, "
        "`dnf install gcc-c++` or `conda install gxx`, or set CXX."
    )


@functools.cache
def _version_line(cxx: tuple[str, ...]) -> str:
    run = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False)
    return (run.stdout or run.stderr).strip().split("\n")[0]


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    home: Path
    library_folder: Path
    version: tuple[int, int]


def find_cuda(torch_cuda: str | None) -> Cuda:
    """The CUDA toolkit, which must have the CUDA major version of torch."""
    if torch_cuda is None:
        raise BuildError(
            "this torch is built without CUDA, so CUDA kernels have nothing to run on. On a machine with an NVIDIA "
            "GPU install a CUDA build of torch (https://pytorch.org/get-started/locally)."
        )
    major = torch_cuda.split(".")[0]
    home_asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home_asked:
        nvcc, looked = Path(home_asked) / "bin" / "nvcc", f"CUDA_HOME={home_asked}"
    else:
        nvcc, looked = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"), "PATH and /usr/local/cuda"
    advice = (
        f"Install the CUDA toolkit {major}.x (https://developer.nvidia.com/cuda-toolkit-archive, or `conda install "
        f"-c nvidia cuda-nvcc={major} cuda-cudart-dev={major}`), put its nvcc on PATH or set CUDA_HOME, and install "
        "fastgan again. Everything else works without it."
    )
    if not nvcc.is_file():
        raise BuildError(f"nvcc was not found (looked in {looked}). {advice}")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+)\.(\d+)", said.stdout)
    if not match:
        raise BuildError(f"{nvcc} --version failed: {(said.stderr or said.stdout).strip()[:200]!r}. {advice}")
    version = (int(match[1]), int(match[2]))
    if str(version[0]) != major:
        raise BuildError(
            f"nvcc is CUDA {version[0]}.{version[1]} ({nvcc}), but torch was built for CUDA {torch_cuda}; the "
            f"major versions must agree. {advice}"
        )
    # nvcc on PATH may be a wrapper elsewhere: ask nvcc itself where its toolkit is.
    dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    home = Path(top[1].strip() if top else nvcc.resolve().parent.parent).resolve()
    folders = [home / "lib64", home / "targets" / f"{platform.machine()}-linux" / "lib", home / "lib"]
    library_folder = next((f for f in folders if list(f.glob("libcudart.so*"))), folders[0])
    return Cuda(nvcc, home, library_folder, version)


def cuda_architectures(version: tuple[int, int]) -> tuple[str, ...]:
    """Compute capabilities such as ("8.0", "9.0+PTX"): `TORCH_CUDA_ARCH_LIST`, or a default for this nvcc.

    The default has one entry per binary-compatible family from 7.5 up, and PTX of the last for later ones.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not asked:
        known = [("7.5", (10, 0)), ("8.0", (11, 0)), ("9.0", (11, 8)), ("10.0", (12, 8)), ("12.0", (12, 8))]
        default = [arch for arch, since in known if version >= since]
        return (*default[:-1], f"{default[-1]}+PTX")
    words = [w for word in re.split(r"[;, ]+", asked) if word for w in _ARCH_NAMES.get(word, word).split(";")]
    for word in words:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", word):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {word!r}; expected compute capabilities such as '8.0;9.0+PTX' or the "
                f"names {', '.join(_ARCH_NAMES)}."
            )
    return tuple(words)


def gencode(architectures: tuple[str, ...]) -> tuple[str, ...]:
    flags = []
    for arch in architectures:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)


# --- running the build ----------------------------------------------------------------------------------------


def build(parameters: BuildParameters, folder: Path, output: Path) -> None:
    """Compile and link with ninja in `folder` (kept: a second call redoes only what changed) into `output`.

    Raises `BuildError` with the compiler's first error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(parameters, output))
    jobs = os.environ.get("MAX_JOBS")
    command = [*_find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if "interrupted by user" in run.stdout:
        raise KeyboardInterrupt  # ninja heard it; this process may ignore SIGINT, as in a shell's background
    if run.returncode:
        log = folder / "build.log"
        log.write_text(run.stdout)
        error = first_error(run.stdout)
        raise BuildError(f"compiling the {parameters.library} library failed: {error} (the whole log: {log})")


def first_error(log: str) -> str:
    """The first line of a build log that names an error, or its last line."""
    lines = [line.strip() for line in log.strip().splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\berror\b|undefined reference|cannot find|not found|Killed", line)]
    return (named or lines or ["no output"])[0 if named else -1]


def _find_ninja() -> list[str]:
    # The one of the running interpreter's environment first: it is a dependency, though perhaps not on PATH.
    beside = Path(sys.executable).with_name("ninja")
    if beside.is_file():
        return [str(beside)]
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found; run `pip install ninja`.")
    return [found]


def _ninja_file(parameters: BuildParameters, output: Path) -> str:
    def path(p: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    def words(command: tuple[str, ...]) -> str:
        return " ".join(shlex.quote(w).replace("$", "$$") for w in command)

    lines = [
        "rule compile",
        "  command = $compiler -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {words(parameters.link)} $in {words(parameters.libraries)} -o $out",
    ]
    # Kernels first: they take the longest, and one that starts last would leave the other cores idle.
    for unit in sorted(parameters.units, key=lambda u: not u.source.name.endswith((".cu", ".isa.cpp"))):
        lines.append(f"build {path(unit.object)}: compile {path(unit.source)}")
        lines.append(f"  compiler = {words(unit.command)}")
    lines.append(f"build {path(output)}: link {' '.join(path(u.object) for u in parameters.units)}")
    return "\n".join(lines) + "\n"
