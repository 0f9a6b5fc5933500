"""Building at install and just in time: what happens when something is missing, wrong, killed or shared."""

import ast
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from fastgan import build, library
from fastgan.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import build_times  # noqa: E402

LOAD = """
import ctypes, sys
from pathlib import Path
from fastgan import build, library
build.CSRC = Path(sys.argv[1])
library._prebuilt = lambda name: (None, "this is a test")
print(ctypes.CDLL(library._find_or_build("cpu")).answer())
"""


@pytest.fixture
def sources(tmp_path):
    """A small library in place of fastgan's, which takes a fraction of a second to compile."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "registration.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
    )
    (folder / "cpu" / "isa.cpp").write_text("int other() { return 7; }\n")
    return folder


@pytest.fixture
def slow_compiler(tmp_path):
    """A compiler that takes its time, so that a build can be interrupted."""
    script = tmp_path / "slow-c++"
    script.write_text('#!/bin/sh\nfor a in "$@"; do [ "$a" = -c ] && sleep 3; done\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script)


def start(sources, **environment):
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith("FASTGAN_")}
    cleaned |= {"FASTGAN_CACHE": str(sources.parent / "cache")} | environment
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(sources)],
        env=cleaned, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_build(sources):
    """Until the build has begun: its ninja file is there."""
    deadline = time.monotonic() + 60
    while not list((sources.parent / "cache").glob("*/build.ninja")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)


# --- just in time ---------------------------------------------------------------------------------


def test_builds_once_and_says_so(sources):
    code, out, err = finish(start(sources))
    assert (code, out.strip()) == (0, "42"), err
    assert "fastgan: building the cpu library (this is a test): 2 files into" in err
    assert "fastgan: built the cpu library in" in err
    assert finish(start(sources)) == (0, "42\n", "")


def test_changed_source_is_another_library(sources):
    finish(start(sources))
    (sources / "cpu" / "isa.cpp").write_text("int other() { return 8; }\n")
    code, _, err = finish(start(sources))
    assert code == 0
    assert "building the cpu library" in err


def test_compiler_error_is_explained_and_remembered(sources):
    (sources / "registration.cpp").write_text("int f() { return missing_name; }\n")
    code, _, err = finish(start(sources))
    assert code
    assert "BuildError: compiling the cpu library failed:" in err
    assert "registration.cpp:1:18: error:" in err
    assert "missing_name" in err
    _, _, again = finish(start(sources))
    assert "building" not in again
    assert "remembered from an earlier try; FASTGAN_JIT=1 tries again" in again
    _, _, forced = finish(start(sources, FASTGAN_JIT="1"))
    assert "building" in forced


def test_two_processes_at_once_build_once(sources, slow_compiler):
    results = [finish(p) for p in [start(sources, CXX=slow_compiler) for _ in range(2)]]
    assert [code for code, *_ in results] == [0, 0], results
    said = "".join(err for *_, err in results)
    assert said.count("building the cpu library (") == 1
    assert said.count("another process is building the cpu library; waiting for it") <= 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_build_starts_again(sources, slow_compiler, number):
    """Whatever a killed build left behind (objects, its lock file) does no harm."""
    process = start(sources, CXX=slow_compiler)
    wait_for_build(sources)
    os.killpg(process.pid, number)
    code, out, _ = finish(process)
    assert code != 0
    assert out == ""
    assert list((sources.parent / "cache").glob("*.lock"))
    assert not list((sources.parent / "cache").glob("*/libfastgan_cpu.json"))
    code, out, err = finish(start(sources, CXX=slow_compiler))
    assert (code, out.strip()) == (0, "42"), err


def test_stale_lock_file_is_harmless(sources, monkeypatch):
    monkeypatch.setattr(build, "CSRC", sources)
    monkeypatch.setenv("FASTGAN_CACHE", str(sources.parent / "cache"))
    lock = library._jit_folder(build.get_build_parameters("cpu")).with_suffix(".lock")
    lock.write_text("held by a process that is no more")
    code, _, err = finish(start(sources))
    assert code == 0
    assert "waiting" not in err


def test_home_that_cannot_be_written(sources, tmp_path):
    """The temporary folder takes its place."""
    environment = {"FASTGAN_CACHE": "", "XDG_CACHE_HOME": "/proc/nobody", "TMPDIR": str(tmp_path)}
    code, _, err = finish(start(sources, **environment))
    assert code == 0, err
    assert f"{tmp_path}/fastgan-{os.getuid()}/cpu-" in err


def test_cache_that_cannot_be_written_is_named(sources):
    _, _, err = finish(start(sources, FASTGAN_CACHE="/proc/nobody"))
    assert "the build folder /proc/nobody cannot be written" in err
    assert "set FASTGAN_CACHE to another" in err


def test_cache_that_others_can_write_is_refused(sources, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777 | stat.S_ISVTX)
    _, _, err = finish(start(sources, FASTGAN_CACHE=str(shared)))
    assert "can be written by others, who could plant code there" in err


def test_jit_can_be_forbidden(sources):
    _, _, err = finish(start(sources, FASTGAN_JIT="0"))
    assert "this is a test, and FASTGAN_JIT=0 forbids building it" in err
    _, _, err = finish(start(sources, FASTGAN_JIT="yes"))
    assert "FASTGAN_JIT must be 0 or 1, got 'yes'" in err


def test_failure_is_raised_again_at_no_cost(monkeypatch):
    monkeypatch.setattr(library, "_outcomes", {})
    calls = []

    def fail(name):
        calls.append(name)
        raise build.BuildError("nothing works")

    monkeypatch.setattr(library, "_find_or_build", fail)
    for _ in range(2):
        with pytest.raises(BackendError, match="the cpu library is not available: nothing works"):
            library.load("cpu")
    assert calls == ["cpu"]
    assert library.status("cpu") == (False, "the cpu library is not available: nothing works")


def test_library_that_does_not_load_is_explained_and_not_kept(tmp_path, monkeypatch):
    """Its record would call it complete for ever, and ninja its file up to date."""
    monkeypatch.setattr(library, "_outcomes", {})
    bad = tmp_path / "libfastgan_cpu.so"
    bad.write_bytes(b"cut short")
    library.write_record(tmp_path / "libfastgan_cpu.json", {})
    monkeypatch.setattr(library, "_find_or_build", lambda _: bad)
    with pytest.raises(BackendError, match=r"built but does not load: .*too short.*FASTGAN_JIT=1 builds it anew"):
        library.load("cpu")
    assert [f.name for f in tmp_path.iterdir()] == ["failure.json"]
    assert "does not load" in json.loads((tmp_path / "failure.json").read_text())["error"]


def test_installed_library_that_does_not_load_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_outcomes", {})
    monkeypatch.setattr(library, "_package_file", lambda name: tmp_path / name)
    bad = tmp_path / "libfastgan_cpu.so"
    bad.write_bytes(b"cut short")
    monkeypatch.setattr(library, "_find_or_build", lambda _: bad)
    with pytest.raises(BackendError, match="Install fastgan again"):
        library.load("cpu")
    assert bad.is_file()


# --- built for X, running Y -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("machine", "riscv64", "it was built for machine riscv64, running "),
        ("sources", "0123", "it was built for sources 0123, running "),
        ("cuda", "10.2", "it was built for CUDA major version 10, running "),
    ],
)
def test_library_of_another_world_is_not_loaded(key, value, message):
    import platform

    import torch

    record = {
        "machine": platform.machine(),
        "sources": build.source_digest("cuda"),
        "cuda": torch.version.cuda or "none",
    }
    assert library.mismatch(record, "cuda") == ""
    assert library.mismatch(record | {key: value}, "cuda").startswith(message)


def test_library_with_a_damaged_record_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_package_file", lambda name: tmp_path / name)
    (tmp_path / "libfastgan_cpu.json").write_text("{")
    record, reason = library._prebuilt("cpu")
    assert record is None
    assert reason.startswith("its record is damaged (")


# --- what is missing or wrong ---------------------------------------------------------------------


def fake_nvcc(folder: Path, release: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "nvcc"
    script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    script.chmod(0o755)
    return folder


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = r"no C\+\+ compiler was found \(looked for CXX=no-such-compiler\). Install one, e.g. `apt install g"
    with pytest.raises(build.BuildError, match=message):
        build.get_build_parameters("cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(build.BuildError, match=r"looked for c\+\+, g\+\+ and clang\+\+ on PATH"):
        build.get_build_parameters("cpu")


def test_no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    message = rf"nvcc was not found \(looked in CUDA_HOME={tmp_path}\). Install the CUDA toolkit 13.x"
    with pytest.raises(build.BuildError, match=message):
        build.find_cuda("13.2")


def test_wrong_cuda_major(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", "11.8")))
    message = r"nvcc is CUDA 11.8 .*, but torch was built for CUDA 13.2; the major versions must agree. Install"
    with pytest.raises(build.BuildError, match=message):
        build.find_cuda("13.2")


def test_another_minor_version_is_fine(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", "13.9")))
    assert build.find_cuda("13.2").version == (13, 9)


def test_torch_without_cuda():
    with pytest.raises(build.BuildError, match="this torch is built without CUDA"):
        build.find_cuda(None)


@pytest.mark.parametrize(
    ("asked", "version", "expected"),
    [
        ("", (13, 0), ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")),
        ("", (12, 4), ("7.5", "8.0", "9.0+PTX")),
        ("8.6", (13, 0), ("8.6",)),
        ("8.0;9.0a+PTX", (13, 0), ("8.0", "9.0a+PTX")),
        ("8.0 9.0,10.0", (13, 0), ("8.0", "9.0", "10.0")),
        ("Ampere", (13, 0), ("8.0", "8.6+PTX")),
    ],
)
def test_architectures(monkeypatch, asked, version, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build.cuda_architectures(version) == expected
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == asked


def test_unknown_architecture_lists_the_known(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Pascaline")
    with pytest.raises(build.BuildError, match=r"has 'Pascaline'; expected .* the names Turing, Ampere, Ada,"):
        build.cuda_architectures((13, 0))


def test_gencode_flags():
    assert build.gencode(("8.0", "9.0+PTX")) == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    )


# --- docs/building.md ------------------------------------------------------------------------------


def test_page_shows_the_measured_times():
    text = build_times.PAGE.read_text(encoding="utf-8")
    measured = json.loads(build_times.RESULT.read_text())
    assert build_times.written(text, measured) == text, "run python benchmarks/build_times.py"
    (value, *_) = measured["seconds"].values()
    assert f"{value} s" in text


def message_patterns():
    """What each text in the code looks like once its variables are filled in."""
    for file in (build.__file__, library.__file__, ROOT / "setup.py"):
        nodes = list(ast.walk(ast.parse(Path(file).read_text())))
        whole = [node for node in nodes if isinstance(node, ast.JoinedStr)]
        inside = {part for node in whole for part in node.values}
        whole += [node for node in nodes if isinstance(node, ast.Constant) and node not in inside]
        for node in whole:
            parts = [getattr(part, "value", None) for part in getattr(node, "values", [node])]
            fixed = [part if isinstance(part, str) else None for part in parts]
            if len("".join(filter(None, fixed))) > 20:
                yield "".join(".+" if text is None else re.escape(text.replace("`", "'")) for text in fixed)


def test_page_quotes_what_the_code_says():
    said = "|".join(message_patterns())
    section = build_times.PAGE.read_text(encoding="utf-8").partition("## What can go wrong")[2].partition("\n## ")[0]
    rows = "".join(row for row in section.splitlines() if row.startswith("| "))
    quoted = [quote for quote in re.findall("`([^`]+)`", rows) if len(quote) > 40 and not quote.startswith("test_")]
    assert len(quoted) > 15
    for quote in quoted:
        assert re.fullmatch(said, quote) or re.fullmatch(said, quote.removeprefix("fastgan: ")), quote
    assert not re.fullmatch(said, "nvcc was not found (looked everywhere); install it, then install fastgan again")


# --- setup.py and the wheel -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that git knows or would know."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of the project's files")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_setup(checkout, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=checkout, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_install_without_nvcc_succeeds_and_says_what_is_missing(checkout, tmp_path):
    missing = {"CUDA_HOME": str(tmp_path), "FASTGAN_BUILD_CPU": "0"}
    result = run_setup(checkout, "build_ext", f"--build-lib={tmp_path}", **missing)
    assert result.returncode == 0, result.stderr
    told = " ".join(result.stderr.split())
    assert "fastgan: the cuda library was not built:" in told
    assert "install fastgan again. Everything else works without it." in told or "built without CUDA" in told
    record = (tmp_path / "fastgan" / "libfastgan_cuda.json").read_text()
    assert '"error"' in record
    assert not (tmp_path / "fastgan" / "libfastgan_cuda.so").exists()


def test_missing_nvcc_is_an_error_when_cuda_was_asked_for(checkout, tmp_path):
    asked = {"CUDA_HOME": str(tmp_path), "FASTGAN_BUILD_CPU": "0", "FASTGAN_BUILD_CUDA": "1"}
    result = run_setup(checkout, "build_ext", f"--build-lib={tmp_path}", **asked)
    assert result.returncode
    assert "FASTGAN_BUILD_CUDA=1, but the library cannot be built:" in result.stderr


def test_unknown_build_option_is_an_error(checkout, tmp_path):
    result = run_setup(checkout, "build_ext", f"--build-lib={tmp_path}", FASTGAN_BUILD_CPU="maybe")
    assert result.returncode
    assert "FASTGAN_BUILD_CPU must be 0 or 1, got 'maybe'" in result.stderr


def test_wheel_holds_every_source_and_builds_elsewhere(checkout, tmp_path):
    """Installed into a folder of its own, far from the sources, the wheel compiles its CPU library just in time."""
    neither = {"FASTGAN_BUILD_CPU": "0", "FASTGAN_BUILD_CUDA": "0"}
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    subprocess.run(command, cwd=checkout, env=os.environ | neither, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("fastgan-*-py3-none-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (checkout / "csrc").rglob("*"):
        if file.is_file():
            assert f"fastgan/csrc/{file.relative_to(checkout / 'csrc')}" in names
    for file in (checkout / "kernels").glob("*.py"):
        assert f"fastgan/kernels/{file.name}" in names
    target = tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import fastgan, torch; from fastgan import build, library; library.load('cpu'); "
        "print(fastgan.__file__, build.CSRC, torch.ops.fastgan_cpu.instruction_set())"
    )
    environment = os.environ | {"PYTHONPATH": str(target), "FASTGAN_CACHE": str(tmp_path / "cache")}
    environment |= {"CXXFLAGS": "-O0"}  # that the sources are complete shows without optimising, too
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    where, csrc, instruction_set = result.stdout.split()
    assert Path(where).is_relative_to(target)
    assert Path(csrc) == target / "fastgan" / "csrc"
    assert instruction_set in build.INSTRUCTION_SETS
    assert "FASTGAN_BUILD_CPU=0 left it out" in result.stderr
