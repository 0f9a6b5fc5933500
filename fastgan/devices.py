"""Device, precision and backend as commands are asked for them."""

import os

import torch

from fastgan.backends import why_not
from fastgan.errors import BackendError, FastganError


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. FastganError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FastganError(f"--device: expected auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise FastganError(f"--device: expected auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FastganError(f"--device: {name} was asked for, but torch {torch.__version__} finds no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastganError(f"--device: {name} was asked for; there are {torch.cuda.device_count()} CUDA devices")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations; `auto` is 16 bits where the hardware multiplies them faster."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise FastganError("--precision: fp16 is for CUDA; on a CPU take fp32 or bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def check_backend(name: str, device: torch.device, precision: torch.dtype) -> None:
    """Raise BackendError where the backend that was asked for cannot run, in the words of `fastgan.info`, and
    FastganError for a FASTGAN_CPU that cannot be: before there is a run folder."""
    if name != "auto" and (reason := why_not(name, device=device.type, dtype=precision)) is not None:
        raise BackendError(f"--backend: {reason}; auto chooses for each operation")
    if name == "auto" and device.type == "cpu" and "FASTGAN_CPU" in os.environ:
        why_not("cpu")  # for the error alone: without a kernel auto takes PyTorch's
