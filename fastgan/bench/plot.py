"""The picture of measured cases: images per second beside those of the stock step."""

import hashlib
import json
from pathlib import Path

from fastgan.bench.results import Row, best_other, times_as_fast
from fastgan.files import replacing

_DATA = "Data"  # the PNG's text field that holds the digest of what was drawn


def digest(rows: list[Row]) -> str:
    """What `draw` writes into the picture, so that a test sees whether it belongs to the data."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def drawn_from(path: Path) -> str | None:
    """The digest that a picture of `draw` carries."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.info.get(_DATA)


def draw(rows: list[Row], machine: str, path: Path) -> None:
    """Bars of the speed relative to the stock step, with confidence intervals, as a PNG."""
    from matplotlib.figure import Figure  # takes a second: only where there is something to draw

    figure = Figure(figsize=(8, 1.1 + 0.48 * len(rows)), dpi=100, layout="constrained")
    axis = figure.subplots()
    for offset, label, colour in ((0.2, "best eager or compiled", "#9aa5b1"), (-0.2, "fastgan", "#2f6fde")):
        bars = [times_as_fast(row, "stock", best_other(row) if offset > 0 else "fastgan") for row in rows]
        places = [len(rows) - 1 - index + offset for index in range(len(rows))]
        below, above = [bar.median - bar.low for bar in bars], [bar.high - bar.median for bar in bars]
        axis.barh(
            places, [bar.median for bar in bars], 0.36, xerr=(below, above), label=label, color=colour, ecolor="#333"
        )
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [row["case"] for row in reversed(rows)], fontsize=8)
    axis.set_xlabel(f"times the speed of the stock PyTorch step on {machine}", fontsize=8)
    axis.tick_params(labelsize=8)
    figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={_DATA: digest(rows), "Software": None})
