"""`python -m fastgan.sample RUN`: images from a trained generator, as pictures, an array or a film."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import fastgan.command
from fastgan import images
from fastgan.data import to_uint8
from fastgan.devices import choose_device
from fastgan.errors import CheckpointError, FastganError
from fastgan.files import replacing
from fastgan.nn import Generator
from fastgan.train import checkpoint
from fastgan.train.config import TrainConfig

_SUFFIXES = {".png": "grid", ".npy": "npy", ".gif": "gif", ".mp4": "mp4", "": "png"}


@dataclass(frozen=True)
class Options:
    """Draw images from a trained generator."""

    run: Annotated[Path, tyro.conf.Positional]
    """run folder, or one of its checkpoints"""
    out: Path | None = None
    """file, or a folder for single images [default: samples.png in the run folder]"""
    n: int = 64
    """number of images; of a film, how many move side by side"""
    seed: int = 0
    """of the latents: the same seed gives the same images, whatever --n"""
    format: Literal["auto", "grid", "png", "npy", "gif", "mp4"] = "auto"
    """one grid, single PNGs, an array [N, H, W, C] of uint8, or a film through latent space [auto: by --out]"""
    truncation: float | None = None
    """redraw latent components beyond plus or minus this: fewer odd images, less variety; 0.5 to 2 is usual"""
    weights: Literal["ema", "generator"] = "ema"
    """the moving average, or the weights of the last step"""
    columns: int | None = None
    """images side by side in a grid [default: square]"""
    frames: int = 120
    """length of a film"""
    fps: int = 24
    """frames of a film per second"""
    batch_size: int = 64
    """images generated at once"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    debug: bool = False
    """show tracebacks of errors"""


def build_generator(config: TrainConfig, channels: int) -> Generator:
    """The untrained generator of a run."""
    return Generator(config.image_size, channels, config.latent_dim, config.g_channels)


def load_generator(path: str | Path, *, weights: Literal["ema", "generator"] = "ema", device: str = "cpu") -> Generator:
    """The trained generator of a run folder or checkpoint, in eval mode, without gradients.

    `generator(latents)` maps [N, generator.latent_dim] to images [N, C, H, W] in [-1, 1].

    Raises:
        CheckpointError: there is none, it is damaged, or of another architecture.
    """
    tensors, header = checkpoint.read(Path(path))
    source = checkpoint.resolve(Path(path))
    generator = build_generator(TrainConfig.from_json(header["config"], str(source)), header["channels"])
    checkpoint.load_module(generator, weights, tensors, source)
    return generator.eval().requires_grad_(False).to(torch.device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]


def draw_latents(n: int, latent_dim: int, seed: int, truncation: float | None = None) -> Tensor:
    """Latents [n, latent_dim] from normal(0, 1), the first of which do not depend on n.

    `truncation` > 0 redraws components outside +-truncation (Brock et al., 2019, arXiv:1809.11096). The global random
    state is left alone.
    """
    source = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        row = torch.randn(latent_dim, generator=source)
        while truncation is not None and (outside := row.abs() > truncation).any():
            row[outside] = torch.randn(int(outside.sum()), generator=source)
        rows.append(row)
    return torch.stack(rows)


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The point `share` of the way from `start` to `end` [N, D] on great circles, where normal latents live."""
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)[:, None]
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    mixed = (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / sine.clamp_min(1e-6)
    return torch.where(sine > 1e-4, mixed, torch.lerp(start, end, share))


def sample(options: Options) -> Path:
    """Do what `options` ask; returns the file or folder written. Errors leave what was there before."""
    kind, out = _output(options)
    _check(options)
    device = choose_device(options.device)
    generator = load_generator(options.run, weights=options.weights, device=str(device))
    if kind in ("gif", "mp4"):
        _save_film(kind, _film(generator, options), out, options.fps)
        return out
    latents = draw_latents(options.n, generator.latent_dim, options.seed, options.truncation)
    batches = (_images(generator, chunk) for chunk in latents.split(options.batch_size))
    if kind == "grid":
        out.parent.mkdir(parents=True, exist_ok=True)
        images.save_png(images.grid(np.concatenate(list(batches)), options.columns), out)
    elif kind == "npy":
        shape = (options.n, generator.image_size, generator.image_size, generator.channels)
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary, open(temporary, "wb") as file:
            # Written, not mapped into memory: on a full disk a mapping dies of a signal instead of an error.
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                file.write(batch.tobytes())
    else:
        out.mkdir(parents=True, exist_ok=True)
        digits = max(5, len(str(options.n - 1)))
        for index, image in enumerate(image for batch in batches for image in batch):
            images.save_png(image, out / f"{index:0{digits}d}.png")
    return out


def _check(options: Options) -> None:
    for name in ("n", "frames", "fps", "batch_size"):
        if getattr(options, name) < 1:
            raise FastganError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if options.columns is not None and options.columns < 1:
        raise FastganError(f"--columns: expected at least 1, got {options.columns}")
    if not 0 <= options.seed < 2**63:
        raise FastganError(f"--seed: expected 0 to 2^63 - 1, got {options.seed}")
    if options.truncation is not None and not options.truncation >= 0.01:
        raise FastganError(f"--truncation: expected at least 0.01, got {options.truncation:g}")


def _output(options: Options) -> tuple[str, Path]:
    """What to write and where to."""
    kind: str = options.format
    if options.out is None:
        folder = _run_folder(options.run)
        kind = "grid" if kind == "auto" else kind
        names = {"grid": "samples.png", "png": "samples-png", "npy": "samples.npy"}
        return kind, folder / names.get(kind, f"samples.{kind}")
    if kind == "auto":
        suffix = "" if options.out.is_dir() else options.out.suffix.lower()
        if suffix not in _SUFFIXES:
            raise FastganError(f"--out: expected a folder or {', '.join(filter(None, _SUFFIXES))}; got {options.out}")
        kind = _SUFFIXES[suffix]
    if kind == "png" and options.out.exists() and not options.out.is_dir():
        raise FastganError(f"--out: single PNGs go into a folder; {options.out} is a file")
    if kind != "png" and options.out.is_dir():
        raise FastganError(f"--out: --format {kind} writes one file; {options.out} is a folder")
    return kind, options.out


def _run_folder(path: Path) -> Path:
    try:
        return checkpoint.run_of(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; say where to write with --out") from error


def _images(generator: Generator, latents: Tensor) -> np.ndarray:
    parameter = next(generator.parameters())
    with torch.no_grad():
        return to_uint8(generator(latents.to(parameter.device)))


def _film(generator: Generator, options: Options, stops: int = 4) -> Iterator[np.ndarray]:
    """Frames [H, W, C] of `n` images that each travel through `stops` latents and back to the first."""
    drawn = draw_latents(options.n * stops, generator.latent_dim, options.seed, options.truncation)
    path = drawn.view(options.n, stops, -1)
    for frame in range(options.frames):
        at = frame / options.frames * stops
        leg = int(at)
        latents = slerp(path[:, leg], path[:, (leg + 1) % stops], at - leg)
        shown = np.concatenate([_images(generator, chunk) for chunk in latents.split(options.batch_size)])
        yield images.grid(shown, options.columns)


def _save_film(kind: str, frames: Iterator[np.ndarray], out: Path, fps: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "gif":
        first, *rest = [images.picture(frame) for frame in frames]
        with replacing(out) as temporary:
            first.save(temporary, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        return
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401 - imageio finds it on its own; without it the error would come mid-way
    except ImportError as error:
        raise FastganError("--format mp4 needs the extra: pip install 'fastgan[video]'; gif works without") from error
    with (
        replacing(out) as temporary,
        imageio.get_writer(temporary, format="FFMPEG", fps=fps, macro_block_size=2, codec="libx264") as writer,
    ):
        for frame in frames:
            rgb = np.repeat(frame, 3, axis=2) if frame.shape[2] == 1 else frame[..., :3]
            writer.append_data(  # type: ignore[attr-defined]
                np.pad(rgb, ((0, rgb.shape[0] % 2), (0, rgb.shape[1] % 2), (0, 0)))
            )


def main(arguments: Sequence[str]) -> int:
    def run() -> None:
        options = tyro.cli(Options, prog="python -m fastgan.sample", args=list(arguments))
        print(sample(options))

    return fastgan.command.run_command(run, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
