"""`python -m fastgan.info`: what runs here, and for each backend that does not, why and what to do."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

import fastgan.command
from fastgan import backends, library
from fastgan.build import LIBRARIES, BuildError, find_cuda, find_cxx
from fastgan.versions import cpu_name, versions


@dataclass
class InfoConfig:
    """Show versions, devices, compilers, the compiled libraries, and which backends run here. Builds nothing."""

    debug: bool = False
    """show tracebacks of errors"""


def info() -> str:
    """Versions, devices, compilers, libraries and backends of this machine, as the command prints them. Builds
    nothing."""
    import_module("fastgan.ops")  # declares the operations
    lines = [f"{name:<10} {version}" for name, version in versions().items()]
    lines.append(f"{'cpu':<10} {cpu_name()}, {torch.get_num_threads()} threads, {_instructions()}")
    lines += [f"{'cuda':<10} {device}" for device in _cuda_devices()]
    lines.append(f"{'c++':<10} {_found(lambda: ' '.join(find_cxx()))}")
    lines.append(f"{'nvcc':<10} {_found(lambda: str(find_cuda(torch.version.cuda).nvcc))}")
    lines.append("")
    lines += [f"{'library':<10} {name:<7} {library.status(name)[1]}" for name in LIBRARIES]
    lines += [f"{'backend':<10} {backend:<7} {_state(backend)}" for backend in backends.BACKENDS]
    return "\n".join(lines)


def _state(backend: str) -> str:
    reason = backends.why_not(backend, operation="")  # asks for no kernel, whose library might have to be built
    if reason is None and backend in LIBRARIES and library.status(backend)[0]:
        return "not built yet; its first use builds the library"
    if (reason := reason or backends.why_not(backend)) is not None:
        return f"not available: {reason}"
    return f"available, {torch.ops.fastgan_cpu.instruction_set()} kernels" if backend == "cpu" else "available"


def _instructions() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return [f"no device (torch is {built})"]
    return [
        f"{index}: {torch.cuda.get_device_name(index)}, sm_{''.join(map(str, torch.cuda.get_device_capability(index)))}"
        for index in range(torch.cuda.device_count())
    ]


def _found(find: Callable[[], str]) -> str:
    try:
        return find()
    except BuildError as error:
        return f"not found: {error}"


def main(arguments: Sequence[str]) -> int:
    return fastgan.command.run_configured(InfoConfig, "python -m fastgan.info", lambda _: print(info()), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
