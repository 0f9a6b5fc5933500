"""Checkpoints: one safetensors file holds everything that the rest of a run depends on.

Tensors: `generator.*`, `discriminator.*`, `ema.*`, `opt_g.*`, `opt_d.*`, `random.*`. The header holds JSON: format
version, configuration, position in training and in the data, optimisers' settings, versions. Loading executes none
of it.
"""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgan.errors import CheckpointError
from fastgan.files import MARK, replacing
from fastgan.train.config import TrainConfig

FORMAT = 1
KEPT = 2
_HEADER = "fastgan"


def write(run: Path, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write checkpoint `step` of `run` so that a crash at any moment leaves either none of it or all of it.

    Afterwards only the newest `KEPT` remain. An OSError (disk full, no permission) leaves the older ones as they were.
    """
    from safetensors.torch import save

    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(run, step)
    # safetensors stores no strides: channels-last tensors are stored as contiguous ones, loading copies into place.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(plain, metadata={_HEADER: json.dumps({"format": FORMAT, **header})})
    with replacing(path, durable=True) as temporary:
        temporary.write_bytes(content)
    for old in saved(run)[:-KEPT]:
        old.unlink()
    for leftover in folder.glob(f".*{MARK}*"):  # of a killed process: a run folder has one writer
        leftover.unlink()
    return path


def path_of(run: Path, step: int) -> Path:
    """Where checkpoint `step` of `run` stands."""
    return run / "checkpoints" / f"step-{step:09d}.safetensors"


def saved(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


def resolve(path: Path) -> Path:
    """The checkpoint file that `path`, a run folder or a checkpoint file, stands for."""
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"{path}: no such run folder or checkpoint")
    found = saved(path)
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint (expected checkpoints/step-*.safetensors in a run folder)")
    return found[-1]


def run_of(path: Path) -> Path:
    """The run folder that `path`, itself or one of its checkpoint files, stands for."""
    file = resolve(path)
    if file.parent.name != "checkpoints":
        raise CheckpointError(f"{file}: lies in no run folder (expected RUN/checkpoints/{file.name})")
    return file.parent.parent


def set_aside_newer(run: Path, step: int) -> None:
    """Rename the checkpoints after `step`: a run that goes on from there has another future."""
    for path in saved(run):
        if int(path.stem.split("-")[1]) > step:
            path.rename(path.with_name(path.name + ".superseded"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a run folder's newest checkpoint, or of a checkpoint file.

    Raises:
        CheckpointError: not there, cut short, not one of fastgan's, or of a newer format.
    """
    file = resolve(path)
    with _opened(file) as content:
        header = _header(file, content.metadata())
        return {name: content.get_tensor(name) for name in content.keys()}, header  # noqa: SIM118 - not a dict


def read_header(path: Path) -> dict[str, Any]:
    """The header alone; errors as in `read`."""
    file = resolve(path)
    with _opened(file) as content:
        return _header(file, content.metadata())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or cut short ({error}).{_older(file)}") from error


def read_config(path: Path) -> TrainConfig:
    """The configuration with which a checkpoint was trained."""
    return TrainConfig.from_json(read_header(path)["config"], str(resolve(path)))


def _header(file: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if not metadata or _HEADER not in metadata:
        raise CheckpointError(f"{file}: a safetensors file, but not a checkpoint of fastgan")
    header = json.loads(metadata[_HEADER])
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{file}: format {header['format']}, written by fastgan {header['versions']['fastgan']}; "
            f"this version reads up to format {FORMAT}: upgrade fastgan"
        )
    return header


def _older(file: Path) -> str:
    """Advice for a damaged file: the newest other checkpoint beside it."""
    others = [path for path in sorted(file.parent.glob("step-*.safetensors")) if path.name < file.name]
    return f" The one before it may be whole: use {others[-1]}" if others else ""


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with names that start with `prefix` and a dot."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `prefixed` on all tensors of a checkpoint."""
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def load_module(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy a checkpoint's `prefix.*` into `module`; CheckpointError names the first tensor that does not fit."""
    state = part(prefix, tensors)
    expected = module.state_dict()
    for name in sorted({*expected, *state}):
        want = list(expected[name].shape) if name in expected else "no such tensor"
        got = list(state[name].shape) if name in state else "no such tensor"
        if want != got:
            raise CheckpointError(
                f"{source}: of another architecture: {prefix}.{name} is {got}, the configured network has {want}"
            )
    module.load_state_dict(state)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of each parameter, named `index.key`."""
    return {
        f"{index}.{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if value is not None
    }


def optimizer_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Learning rates, betas and the like of each parameter group: plain values."""
    return optimizer.state_dict()["param_groups"]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    prefix: str,
    tensors: Mapping[str, Tensor],
    settings: list[dict[str, Any]],
    source: Path,
) -> None:
    """Restore what `optimizer_tensors` and `optimizer_settings` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part(prefix, tensors).items():
        index, key = name.split(".", 1)
        if int(index) >= len(parameters):
            raise CheckpointError(f"{source}: {prefix}.{name}: the configured network has {len(parameters)} parameters")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # Fused optimisers walk a parameter and its moments in memory order: both need the same strides.
            value = torch.empty_like(parameter).copy_(value)
        elif value.dim():
            raise CheckpointError(
                f"{source}: {prefix}.{name} is {list(value.shape)}, the configured network has {list(parameter.shape)}"
            )
        state.setdefault(int(index), {})[key] = value
    groups = [{**group, "betas": tuple(group["betas"])} if "betas" in group else group for group in settings]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def seed_all(seed: int) -> None:
    """Start every global random state from `seed`: a run must not depend on what ran before it in the process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global state is what is meant


def random_states(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All global random states: tensors (torch, CUDA, NumPy) and plain values (Python, the rest of NumPy's)."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global state is what must be saved
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors, {"python": random.getstate(), "numpy": [name, *rest]}


def set_random_states(tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `random_states` gave."""
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, keys, gauss = values["python"]
    random.setstate((version, tuple(keys), gauss))
    name, *rest = values["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))  # noqa: NPY002
