"""Memory: what the forward pass keeps for the backward pass, and the peak of a process that trains."""

import ctypes
import dataclasses
import gc
import json
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgan.backends import use_backend
from fastgan.bench.cases import Case
from fastgan.bench.steps import providers


def kept_bytes(network: nn.Module, input: Tensor, backend: str | None) -> int:
    """Bytes that `network(input)` keeps for its backward pass, the parameters and buffers not counted: the storages
    that pass through saved-tensor hooks, each once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    gc.collect()
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(input)
    assert output.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


def case_kept_bytes(case: Case, device: torch.device, backend: str | None) -> dict[str, int]:
    """`kept_bytes` of the generator and of the discriminator, at the case's batch and precision."""
    generator, discriminator = case.networks(device)
    inputs = torch.randn(case.batch_size, case.latent_dim, device=device), case.images(device)
    with torch.autocast(device.type, case.dtype, enabled=case.precision != "fp32"):
        return {
            name: kept_bytes(network, input.contiguous(), backend)
            for name, network, input in zip(
                ("generator", "discriminator"), (generator, discriminator), inputs, strict=True
            )
        }


def peak_bytes(case: Case, provider: str, device: torch.device) -> int | None:
    """What two steps need at their peak, beyond a process that has loaded everything: measured in one of its own.
    None where the system does not tell, and where that process fails, which is said."""
    arguments = [json.dumps(dataclasses.asdict(case)), provider, str(device)]
    done = subprocess.run([sys.executable, "-m", __name__, *arguments], capture_output=True, text=True)
    if (code := done.returncode) != 0:
        ended = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        last = "".join(done.stderr.splitlines()[-1:])
        print(f"no peak memory of {provider} in {case.name}: its process ended with {ended}. {last}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _peak(case: Case, provider: str, device: torch.device) -> int | None:
    competitor = providers(device, options=True)[provider]
    competitor.step(dataclasses.replace(case, batch_size=2), device)()  # libraries loaded, threads started
    _give_back_freed()
    before = _status("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated(device)
    step = competitor.step(case, device)
    for _ in range(2):
        step()
    after = _status("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    return None if before is None or after is None else after - before


def _give_back_freed() -> None:
    """To the system, where the C library can: else what the first step freed counts as taken, its reuse as nothing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int | None:
    """Bytes that Linux reports of this process under `key`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    case, provider, device = sys.argv[1:]
    print(json.dumps(_peak(Case(**json.loads(case)), provider, torch.device(device))))
