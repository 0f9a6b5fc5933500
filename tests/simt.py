"""The CUDA kernels on the host: `simt()` is the module of csrc/simt, built at its first use.

Tensors travel as NumPy arrays; bf16, which NumPy lacks, as the integers that hold its bits.
"""

import functools
import importlib.machinery
import importlib.util

import numpy as np
import torch

from fastgan import build, library

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/cuda/element.h


@functools.cache
def simt():
    path = library.build_just_in_time("simt", "the tests run the CUDA kernels on the host")
    name = build.library_filename("simt").removesuffix(".so")
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def to_input(tensor: torch.Tensor) -> np.ndarray:
    """A read-only array on the tensor's memory: input of a kernel, which must be dense and whose order is kept."""
    bits = tensor.detach()
    if bits.dtype in (torch.float16, torch.bfloat16):
        bits = bits.view(torch.int16)
    array = bits.numpy()
    array.flags.writeable = False
    return array


def to_output(tensor: torch.Tensor) -> np.ndarray:
    """A writable array on the tensor's memory: what the kernel must fill."""
    bits = tensor.detach()
    if bits.dtype in (torch.float16, torch.bfloat16):
        bits = bits.view(torch.int16)
    return bits.numpy()


def run_clean(function, *arguments, seed: int = 0):
    """Call a launcher with threads in the order of `seed`; any report fails the test."""
    module = simt()
    module.take_reports()
    module.set_seed(seed)
    function(*arguments)
    reports = module.take_reports()
    assert not reports, "\n".join(str(r) for r in reports)
