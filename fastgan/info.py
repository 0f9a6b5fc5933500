"""`python -m fastgan.info`: what runs here, and for each backend that does not, why and what to do."""

import sys

import torch

import fastgan.command
from fastgan import backends
from fastgan.build import BuildError, find_cuda, find_cxx
from fastgan.versions import cpu_name, versions


def info() -> str:
    """Versions, devices, compilers and backends of this machine, as the command prints them. Builds nothing."""
    lines = [f"{name:<10} {version}" for name, version in versions().items()]
    lines.append(f"{'cpu':<10} {cpu_name()}, {torch.get_num_threads()} threads, {_instructions()}")
    lines += [f"{'cuda':<10} {device}" for device in _cuda_devices()]
    lines.append(f"{'c++':<10} {_found(lambda: ' '.join(find_cxx()))}")
    lines.append(f"{'nvcc':<10} {_found(lambda: str(find_cuda(torch.version.cuda).nvcc))}")
    lines.append("")
    for backend, reason in backends.available().items():
        state = "available" if reason is None else f"not available: {reason}"
        if backend == "cpu" and reason is None:
            state += f", {torch.ops.fastgan_cpu.instruction_set()} kernels"
        lines.append(f"{'backend':<10} {backend:<7} {state}")
    return "\n".join(lines)


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


def _found(find) -> str:
    try:
        return find()
    except BuildError as error:
        return f"not found: {error}"


if __name__ == "__main__":
    sys.exit(fastgan.command.run_command(lambda: print(info()), debug=False))
