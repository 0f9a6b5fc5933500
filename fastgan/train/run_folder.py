"""The folder of a run: found, and held by one process at a time."""

import fcntl
from pathlib import Path
from typing import IO

from fastgan.errors import FastganError
from fastgan.train import checkpoint
from fastgan.train.config import TrainConfig


def make_run_folder(config: TrainConfig) -> Path:
    """Create `config.out`, or the next free runs/NNNNN-name; FastganError where something is there already."""
    if config.out is not None:
        if config.out.exists() and not _is_free(config.out):
            raise FastganError(
                f"--out: {config.out} is there already and not empty; choose another folder, "
                f"or go on with --resume {config.out}"
            )
        config.out.mkdir(parents=True, exist_ok=True)
        return config.out
    name = Path(config.data).stem if not config.data.startswith("torchvision:") else config.data.split(":")[1]
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    for _ in range(1000):
        numbers = [int(path.name[:5]) for path in runs.iterdir() if path.name[:5].isdigit()]
        folder = runs / f"{max(numbers, default=0) + 1:05d}-{name}-{config.image_size}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another process took the number
            continue
    raise FastganError("runs/: no free run number; pass --out")


def _is_free(folder: Path) -> bool:
    """Whether a run may begin in `folder`: nothing is there but what a run left that never saved a checkpoint."""
    own = {".lock", "config.json", "log.jsonl", "samples", "checkpoints", "report.html"}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= own and not checkpoint.saved(folder)


def lock(run: Path) -> IO[str]:
    """Hold `run` for this process until the file is closed or the process ends, however it ends."""
    lock = open(run / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - held for as long as the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise FastganError(
            f"{run}: another process is training in this folder; wait for it or choose another"
        ) from None
    return lock
