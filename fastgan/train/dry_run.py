"""`--dry-run`: proves that data, training, saving, resuming and sampling work here before hours are spent."""

import dataclasses
import tempfile
from pathlib import Path

from rich.console import Console

from fastgan.sample import Options, sample
from fastgan.train.config import TrainConfig
from fastgan.train.loop import Trainer


def dry_run(config: TrainConfig) -> None:
    """Two real steps with `config`'s data and networks, in a temporary folder; raises what a real run would raise."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        step = config.batch_size / 1000
        first = dataclasses.replace(config, out=run, resume=None, kimg=step, tensorboard=False)
        Trainer(first, console).run()
        Trainer(dataclasses.replace(first, resume=run, kimg=2 * step), console).run()
        sample(Options(run=run, out=Path(folder) / "samples.png", n=4))
    console.print("dry run: data, two steps, saving, resuming and sampling all work")
