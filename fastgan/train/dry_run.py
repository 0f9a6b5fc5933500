"""`--dry-run`: proves that data, training, saving, resuming and sampling work here before hours are spent."""

import dataclasses
import tempfile
from pathlib import Path

from rich.console import Console

from fastgan.errors import Interrupted
from fastgan.sample import Options, sample
from fastgan.train.config import TrainConfig
from fastgan.train.loop import Trainer
from fastgan.train.processes import Processes


def dry_run(config: TrainConfig) -> None:
    """Two real steps with `config`'s data and networks, in a temporary folder; raises what a real run would raise."""
    console = Console(highlight=False, markup=False)
    processes = Processes()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(processes.told(folder)) / "run"
        step = config.batch_size / 1000
        first = dataclasses.replace(config, out=run, resume=None, kimg=step, tensorboard=False)
        try:
            Trainer(first, console).run()
            Trainer(dataclasses.replace(first, resume=run, kimg=2 * step), console).run()
        except Interrupted as stop:
            raise KeyboardInterrupt from stop  # what it saved goes with the folder
        if processes.leads:
            sample(Options(run=run, out=Path(folder) / "samples.png", n=4, device=config.device))
    if processes.leads:
        console.print("dry run: data, two steps, saving, resuming and sampling all work")
