"""Loading the compiled libraries: `load("cpu")` makes `torch.ops.fastgan_cpu` exist, `load("cuda")` likewise.

A library built by `pip install` is taken when it fits the sources and the running torch; otherwise it is built
just in time, once, into a folder named after its content. `FASTGAN_JIT=1` always takes the just-in-time library
and `FASTGAN_JIT=0` never. `FASTGAN_CACHE` moves the folder (default: `~/.cache/fastgan`).
"""

import contextlib
import fcntl
import json
import os
import platform
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fastgan import build
from fastgan.errors import BackendError, FastganError

_outcomes: dict[str, BackendError | None] = {}
_mutex = threading.Lock()
_FAILURE = "failure.json"


def load(library: str) -> None:
    """Make the operators of `library` ("cpu" or "cuda") exist under `torch.ops`, building them if need be.

    The outcome is remembered: a failure is raised as the same `BackendError` on every later call, at no cost. A value
    of FASTGAN_CPU that cannot be is a `FastganError`: nothing runs in the place of what was asked for.
    """
    import torch

    with _mutex:
        if library not in _outcomes:
            try:
                path = _find_or_build(library)
                try:
                    torch.ops.load_library(path)
                except OSError as error:
                    raise build.BuildError(_discard(path, library, error.__cause__ or error)) from error
                if library == "cpu":
                    _check_instruction_set()
                _outcomes[library] = None
            except build.BuildError as error:
                _outcomes[library] = BackendError(f"the {library} library is not available: {error}")
    if (failure := _outcomes[library]) is not None:
        raise failure


def _check_instruction_set() -> None:
    import torch

    try:
        torch.ops.fastgan_cpu.instruction_set()
    except RuntimeError as error:
        raise FastganError("".join(str(error).partition("FASTGAN_CPU")[1:])) from None


def status(library: str) -> tuple[bool, str]:
    """(whether `load` would have to build `library` first, where it comes from or why it is missing), for
    `python -m fastgan.info`. Never builds."""
    if (failure := _outcomes.get(library)) is not None:
        return False, str(failure)
    try:
        path, reason = _find(library)
    except build.BuildError as error:
        return False, f"not available: {error}"
    return (True, f"will be built just in time at its first use ({reason})") if path is None else (False, reason)


def _find(library: str) -> tuple[Path | None, str]:
    """(its file, where it comes from), or (None, why it has to be built now); BuildError where neither will do."""
    reason = "FASTGAN_JIT=1"
    if not _asked_anew():
        record, reason = _prebuilt(library)
        if record is not None:
            return _package_file(build.library_filename(library)), f"built at install ({_summary(record)})"
        if os.environ.get("FASTGAN_JIT") == "0":
            raise build.BuildError(f"{reason}, and FASTGAN_JIT=0 forbids building it now. Install fastgan again.")
    folder = _jit_folder(build.get_build_parameters(library))
    if (folder / _record_name(library)).is_file():
        return folder / build.library_filename(library), f"built just in time before ({reason})"
    if not _asked_anew():
        _raise_remembered(folder)
    return None, reason


def _find_or_build(library: str) -> Path:
    path, reason = _find(library)
    return path or build_just_in_time(library, reason, retry=_asked_anew())


def _asked_anew() -> bool:
    """Whether FASTGAN_JIT asks for a just-in-time library whatever was installed, and whatever failed before."""
    jit = os.environ.get("FASTGAN_JIT", "")
    if jit not in ("", "0", "1"):
        raise build.BuildError(f"FASTGAN_JIT must be 0 or 1, got {jit!r}")
    return jit == "1"


def _raise_remembered(folder: Path) -> None:
    failure = folder / _FAILURE
    if failure.is_file():
        error = json.loads(failure.read_text())["error"]
        raise build.BuildError(f"{error} (remembered from an earlier try; FASTGAN_JIT=1 tries again)")


def _discard(path: Path, library: str, error: BaseException) -> str:
    """Remove a library that does not load, or its record would call it complete for ever, and say so; one that came
    with the installation is left to its installer."""
    said = f"it was built but does not load: {error}"
    if path.parent == _package_file(path.name).parent:
        return f"{said}. Install fastgan again, or set FASTGAN_JIT=1 to build it anew."
    write_record(path.with_name(_FAILURE), {"error": said})
    path.with_name(_record_name(library)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return f"{said}. FASTGAN_JIT=1 builds it anew."


# --- the library that came with the installation --------------------------------------------------------------


def _package_file(name: str) -> Path:
    return Path(__file__).resolve().parent / name


def _record_name(library: str) -> str:
    return f"libfastgan_{library}.json"


def _prebuilt(library: str) -> tuple[dict[str, str] | None, str]:
    """(its record, "") when usable here, else (None, why not)."""
    try:
        record = json.loads(_package_file(_record_name(library)).read_text())
    except FileNotFoundError:
        return None, "it was not built at install"
    except ValueError as error:
        return None, f"its record is damaged ({error})"
    if "error" in record:
        return None, f"it was not built at install: {record['error']}"
    if not _package_file(build.library_filename(library)).is_file():
        return None, "its file is missing"
    reason = mismatch(record, library)
    return (None, reason) if reason else (record, "")


def mismatch(record: dict[str, str], library: str) -> str:
    """Why a library with this record must not be loaded here (built for X, running Y); empty when it may be."""
    checks = [
        ("machine", record.get("machine"), platform.machine()),
        ("sources", record.get("sources"), build.source_digest(library)),
    ]
    if library == "cuda":
        import torch

        built, running = record.get("cuda", "none"), torch.version.cuda or "none"
        checks.append(("CUDA major version", built.split(".")[0], running.split(".")[0]))
    for what, built_for, here in checks:
        if built_for != here:
            return f"it was built for {what} {built_for}, running {here}"
    return ""


def _summary(record: dict[str, str]) -> str:
    cuda = f", CUDA {record['cuda']} for {record['architectures']}" if "cuda" in record else ""
    return f"{record['compiler']}{cuda}, torch ABI {record['torch_abi']}"


def write_record(path: Path, record: dict[str, str]) -> None:
    """Write whole or not at all: the record is what says that the library beside it is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


# --- just in time ---------------------------------------------------------------------------------------------


def build_just_in_time(library: str, reason: str, retry: bool = False) -> Path:
    """The file of the library built from the present sources: at once when it was built before."""
    parameters = build.get_build_parameters(library)
    folder = _jit_folder(parameters)
    output, record, failure = (
        folder / build.library_filename(library),
        folder / _record_name(library),
        folder / _FAILURE,
    )
    if record.is_file():
        return output
    with _lock(folder.with_suffix(".lock"), library):
        if record.is_file():  # another process built it while this one waited
            return output
        if not retry:
            _raise_remembered(folder)
        start = time.monotonic()
        count = len(parameters.units)
        _say(f"building the {library} library ({reason}): {count} files into {folder}")
        try:
            build.build(parameters, folder, output)
        except build.BuildError as error:
            write_record(failure, {"error": str(error)})
            raise
        failure.unlink(missing_ok=True)
        write_record(record, parameters.metadata)
        _say(f"built the {library} library in {time.monotonic() - start:.1f} s")
    return output


def _jit_folder(parameters: build.BuildParameters) -> Path:
    return _cache_root() / f"{parameters.library}-{parameters.digest}"


def _cache_root() -> Path:
    """A folder that can be written and that nobody else can write to: what lies there is executed."""
    asked = os.environ.get("FASTGAN_CACHE")
    if asked:
        return _writable(Path(asked).expanduser())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan"
    try:
        return _writable(home)
    except build.BuildError:
        return _writable(Path(tempfile.gettempdir()) / f"fastgan-{os.getuid()}")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise build.BuildError(
            f"the build folder {folder} cannot be written ({error.strerror}); set FASTGAN_CACHE to another"
        ) from error
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise build.BuildError(
            f"the build folder {folder} can be written by others, who could plant code there; "
            "set FASTGAN_CACHE to a folder of your own"
        )
    return folder


@contextlib.contextmanager
def _lock(path: Path, library: str) -> Iterator[None]:
    """One builder at a time. The system frees the lock when its holder dies, so a left-over file is harmless."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process is building the {library} library; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"fastgan: {text}", file=sys.stderr, flush=True)
