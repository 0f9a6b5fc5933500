"""`report.html`: one self-contained page that shows what a run learnt, how, and how fast."""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from fastgan import images
from fastgan.explanation import explain
from fastgan.files import replacing
from fastgan.train.log import read_log
from fastgan.train.progress import duration
from fastgan.versions import device_name, versions

if TYPE_CHECKING:
    from fastgan.train.loop import Trainer

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastgan: $name</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
  img, svg { max-width: 100%; height: auto } img { image-rendering: pixelated }
  table { border-collapse: collapse; font-size: 0.9rem }
  td, th { padding: 0.15rem 1.2rem 0.15rem 0; text-align: left; vertical-align: top }
  th { font-weight: 600; color: #555 } .columns { columns: 2 24rem } .note { color: #666; font-size: 0.9rem }
</style></head><body>
<h1>$name</h1><p>$summary</p>
<h2>Newest samples</h2>$newest
<p class="note">From the moving average of the generator's weights, in eval mode.</p>
<h2>How fixed latents evolved</h2>$evolution
<p class="note">A row is a moment of training, a column is one latent: $moments.</p>
<h2>Curves</h2>$curves
<p class="note">Healthy: both losses stay within a band and D(x) stays above D(G(z)) without either reaching 0 or 1.
Collapsing: the generator's loss climbs while D(G(z)) falls to 0.</p>
<h2>Layers</h2><table><tr><th>network</th><th>layer</th><th>operation</th><th>shape</th><th>backend</th><th>why</th></tr>
$layers</table>
<h2>Configuration</h2><div class="columns"><table>$config</table></div>
<h2>Versions</h2><table>$versions</table>
</body></html>
""")


def write_report(run: Path, trainer: "Trainer", layers: list[tuple[str, ...]]) -> None:
    """Write `run/report.html`, whole or not at all, from the run's log, samples, configuration and `layer_rows`."""
    entries = read_log(run)
    grids = sorted((run / "samples").glob("kimg-*.png"))
    last: Mapping[str, Any] = entries[-1] if entries else {}
    rate = f"{np.median([entry['images_per_second'] for entry in entries]):.0f}" if entries else "-"
    page = _PAGE.substitute(
        name=html.escape(run.name),
        summary=html.escape(
            f"{trainer.data.source}, {trainer.config.image_size} x {trainer.config.image_size}: "
            f"{last.get('kimg', 0):.1f} of {trainer.config.kimg:g} kimg in {duration(last.get('seconds', 0.0))}, "
            f"{rate} images/s (median) on {trainer.device} ({device_name(trainer.device)})."
        ),
        newest=_picture(grids[-1].read_bytes(), "newest samples", 512) if grids else "none yet",
        evolution=_evolution(grids),
        moments=", ".join(f"{_kimg_of(path):g} kimg" for path in _chosen(grids)) or "none yet",
        curves=_curves(entries) if entries else "none yet",
        layers=_rows(layers),
        config=_rows(trainer.config.to_json().items()),
        versions=_rows(versions().items()),
    )
    with replacing(run / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def layer_rows(trainer: "Trainer") -> list[tuple[str, ...]]:
    """(network, layer, operation, input shape, backend, why) of each fused operation in a training step."""
    size, batch = trainer.config.image_size, trainer.processes.part(trainer.config.batch_size)
    images_like = torch.zeros(batch, trainer.data.channels, size, size, device=trainer.device)
    latents = torch.zeros(batch, trainer.config.latent_dim, device=trainer.device)
    rows: list[tuple[str, ...]] = []
    for title, network, sample in (
        ("generator", trainer.generator, latents),
        ("discriminator", trainer.discriminator, images_like.contiguous(memory_format=torch.channels_last)),
    ):
        with trainer.step.precision(trainer.device):
            layers = explain(network, sample, None if trainer.config.backend == "auto" else trainer.config.backend)
        for layer in layers:
            shape = " x ".join(map(str, layer.shape))
            rows.append((title, layer.name, layer.operation, shape, layer.decision.backend, layer.decision.reason))
    return rows


def _kimg_of(path: Path) -> float:
    return float(re.sub(r"[^\d.]", "", path.stem))


def _chosen(grids: list[Path], most: int = 10) -> list[Path]:
    """At most `most` of the grids, evenly spread, first and last included."""
    if len(grids) <= most:
        return grids
    return [grids[round(index)] for index in np.linspace(0, len(grids) - 1, most)]


def _evolution(grids: list[Path], columns: int = 8) -> str:
    """The first images of chosen grids below each other."""
    strips = []
    for path in _chosen(grids):
        with Image.open(path) as opened:
            size = (opened.width - 7 * 2) // 8  # a grid of 64: 8 images and 7 gaps of 2 pixels across
            strips.append(np.atleast_3d(np.asarray(opened.crop((0, 0, columns * (size + 2) - 2, size)))))
    if not strips:
        return "none yet"
    return _picture(images.png(images.grid(np.stack(strips), columns=1)), "evolution of fixed latents", 512)


def _picture(png: bytes, text: str, width: int) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{text}" width="{width}" src="data:image/png;base64,{data}">'


def _curves(entries: list[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    panels = (
        ("loss", {"loss_g": "generator", "loss_d": "discriminator"}),
        ("mean output of the discriminator", {"d_real": "D(x)", "d_fake": "D(G(z))"}),
        ("images/s", {"images_per_second": ""}),
        ("learning rate", {"lr_g": "generator", "lr_d": "discriminator"}),
    )
    for axis, (title, series) in zip(axes.flat, panels, strict=True):
        for key, label in series.items():
            points = [(entry["kimg"], entry[key]) for entry in entries if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=label or None, linewidth=1.2)
        axis.set(title=title, xlabel="kimg")
        axis.grid(alpha=0.3)
        if any(series.values()):
            axis.legend(frameon=False)
    axes.flat[1].set_ylim(0, 1)
    axes.flat[2].set_ylim(bottom=0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _rows(rows: Iterable[tuple[Any, ...]]) -> str:
    return "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
