"""Draw the pictures of how-gans-work.md: `python docs/plots.py` reads docs/data/RUN/ and writes docs/images/RUN.png.

Each folder of docs/data holds a run's `config.json`, `log.jsonl` and last sample grid (`samples.png`), as
`python -m fastgan.train` wrote them.
"""

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fastgan.train.log import read_log

HERE = Path(__file__).parent
DPI = 100


def draw(run: Path) -> Figure:
    """Losses and D's mean outputs over training, and the last grid pixel by pixel."""
    figure = Figure(figsize=(9.8, 3.1), dpi=DPI)
    losses, beliefs = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.055, right=0.685, top=0.88, bottom=0.16, wspace=0.22)
    entries = read_log(run)
    for axis, title, series in (
        (losses, "loss", {"loss_g": "generator", "loss_d": "discriminator"}),
        (beliefs, "mean output of the discriminator", {"d_real": "D(x)", "d_fake": "D(G(z))"}),
    ):
        for key, label in series.items():
            axis.plot([entry["kimg"] for entry in entries], [entry[key] for entry in entries], label=label, linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("kimg", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    _equilibrium(losses, math.log(4), "log 4")
    _equilibrium(beliefs, 0.5, "1/2")
    beliefs.set_ylim(-0.02, 1.02)
    for axis in (losses, beliefs):
        axis.legend(frameon=False, fontsize=8)
    with Image.open(run / "samples.png") as grid:
        left, bottom = figure.bbox.width - grid.width - 10, (figure.bbox.height - grid.height) / 2
        figure.figimage(np.asarray(grid), left, bottom, cmap="gray", vmin=0, vmax=255, origin="upper")
    return figure


def _equilibrium(axis: Axes, value: float, text: str) -> None:
    """Where the discriminator's curve would be if it could not tell real from fake."""
    axis.axhline(value, color="black", linewidth=0.7, linestyle=":")
    axis.annotate(text, (0.99, value), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom")


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 128 colours: half the size of a full one, and nothing to be seen of it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def variety(run: Path, side: int = 32, gap: int = 2) -> float:
    """How much the images of the grid differ: deviation over images at each pixel, mean over pixels, 0 to 127.5."""
    with Image.open(run / "samples.png") as opened:
        grid = np.asarray(opened, np.float64)
    cell = side + gap
    tiles = np.pad(grid, ((0, gap), (0, gap))).reshape(grid.shape[0] // cell + 1, cell, -1, cell)
    return float(tiles[:, :side, :, :side].transpose(0, 2, 1, 3).reshape(-1, side, side).std(0).mean())


def main(out: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Draw every run of docs/data into the folder `out`; returns the files written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for run in sorted(path.parent for path in (HERE / "data").glob("*/log.jsonl")):
        path = out / f"{run.name}.png"
        save(draw(run), path)
        say(f"{path}: variety of the samples {variety(run):.1f}")
        written.append(path)
    return written


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "images")
