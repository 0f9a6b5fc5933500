"""One typed configuration: the command line, the saved `config.json` and the Python API."""

import argparse
import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastgan.errors import FastganError
from fastgan.files import replacing

LossName = Literal[
    "non_saturating",
    "minimax",
    "least_squares",
    "hinge",
    "relativistic_average",
    "relativistic_paired",
    "wasserstein",
]


@dataclass(frozen=True)
class TrainConfig:
    """Train a GAN on images. Without options: on the bundled handwritten digits.

    The defaults shown are those of the preset: `digits` without --data, else the one of the image size.
    """

    data: str = "digits"
    """digits (bundled), a folder of images (sub-folders are classes), .zip, .npy, .npz, IDX, or torchvision:NAME"""
    out: Path | None = None
    """folder for this run, new or empty [default: the next runs/NNNNN-...]"""
    resume: Path | None = None
    """run folder or checkpoint to continue from, bit for bit; other options keep the values saved there"""
    preset: Literal["digits", "32", "64", "128", "256"] | None = None
    """starting values of all options [default: by --data and --image-size]"""

    image_size: int = 32
    """pixels on a side: 16, 32, 64, 128, 256 or 512"""
    channels: Literal[1, 3, 4] | None = None
    """1 grey, 3 RGB, 4 RGB and transparency [default: 1 where every image is grey, else 3]"""
    crop: Literal["center", "random", "none"] = "center"
    """how an image becomes a square: crop at the centre or at random, or squeeze the whole of it"""
    flip: bool = False
    """mirror images left to right at random"""
    cache: Path | None = None
    """folder for prepared data sets [default: FASTGAN_CACHE or ~/.cache/fastgan]"""

    batch_size: int = 32
    """images per step, of all processes together"""
    kimg: float = 140.0
    """length of training in thousands of real images shown"""
    seed: int = 0
    """of weights, latents and the order of the images"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of activations; weights stay fp32 [auto: bf16 (or fp16) on CUDA, fp32 on CPU]"""
    backend: str = "auto"
    """of the fused operations: auto, or one that `python -m fastgan.info` lists"""

    latent_dim: int = 16
    """length of a latent"""
    g_channels: int = 24
    """width of the generator's last hidden layer; deeper layers are up to 8 times as wide"""
    d_channels: int = 16
    """width of the discriminator's first layer; deeper layers are up to 8 times as wide"""
    spectral_norm: bool = False
    """spectral normalisation of the discriminator"""

    loss: LossName = "non_saturating"
    """the game that G and D play"""
    label_smoothing: float = 0.0
    """real images are called real with 1 minus this (one-sided), 0 to 0.5"""
    r1: float = 0.0
    """gamma of the gradient penalty on real images; 0 is off"""
    r2: float = 0.0
    """gamma of the gradient penalty on fake images; 0 is off"""
    penalty_interval: int = 16
    """steps from one R1 or R2 penalty to the next"""
    wgan_gp: float = 0.0
    """lambda of WGAN-GP's penalty, 10 is usual; 0 is off"""
    d_steps: int = 1
    """discriminator updates for each generator update"""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """of both networks"""
    lr_g: float = 8e-3
    """learning rate of the generator"""
    lr_d: float = 4e-3
    """learning rate of the discriminator"""
    beta1: float = 0.5
    """decay of Adam's first moment; momentum of SGD"""
    beta2: float = 0.99
    """decay of Adam's second moment"""
    weight_decay: float = 0.0
    """decoupled with adamw, added to the gradient with adam and sgd"""
    warmup_kimg: float = 2.0
    """learning rates rise linearly over this many thousand images"""
    lr_decay: Literal["none", "cosine"] = "cosine"
    """learning rates after the warm-up: constant, or a half cosine down to 0 at --kimg"""
    clip_grad: float | None = None
    """largest norm of a network's gradient"""
    ema_kimg: float = 10.0
    """half-life of the generator's moving average in thousands of images"""
    ema_rampup: float = 0.05
    """early on the half-life is at most this share of the images shown; 0 is off"""

    report_kimg: float = 5.0
    """thousands of images from one line of log.jsonl to the next"""
    sample_kimg: float = 14.0
    """thousands of images from one sample grid to the next"""
    checkpoint_kimg: float = 35.0
    """thousands of images from one checkpoint to the next; the last two are kept"""
    tensorboard: bool = False
    """also write events for `tensorboard --logdir runs`"""
    dry_run: bool = False
    """two steps through training, saving, resuming and sampling, in a folder that is removed again"""
    debug: bool = False
    """show tracebacks of errors"""

    def check(self) -> None:
        """Raise FastganError for the first value that cannot work, before anything is read or written."""
        from fastgan.nn.models import IMAGE_SIZES

        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                known = ", ".join(str(value) for value in values if value is not None)
                raise FastganError(f"--{_option(name)}: expected one of {known}; got {getattr(self, name)!r}")
        if self.image_size not in IMAGE_SIZES:
            raise FastganError(
                f"--image-size: expected a power of two among {', '.join(map(str, IMAGE_SIZES))}; got {self.image_size}"
            )
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and abs(value) < float("inf")):
                span = f"in [{low:g}, {high:g}]" if high < float("inf") else f"at least {low:g}"
                raise FastganError(f"--{_option(name)}: expected a value {span}; got {value:g}")
        for name in ("lr_g", "lr_d", "kimg", "ema_kimg", "report_kimg", "sample_kimg", "checkpoint_kimg", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise FastganError(f"--{_option(name)}: expected a finite value above 0; got {value:g}")

    def to_json(self) -> dict[str, Any]:
        """Plain values for `config.json` and for a checkpoint's header."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("resume", "dry_run", "debug")
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> "TrainConfig":
        """The inverse of `to_json`; `source` names the file in errors."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise FastganError(
                f"{source}: unknown settings {', '.join(unknown)}; it was written by another version of fastgan"
            )
        paths = {name: Path(values[name]) for name in ("out", "cache") if values.get(name)}
        return cls(**{**values, **paths})


# What training from the presets' sizes needs: wider networks and the textbook's slower rates as images grow.
# The default values above are the preset `digits`.
_PHOTOS: dict[str, Any] = {
    "flip": True,
    "latent_dim": 100,
    "g_channels": 64,
    "d_channels": 64,
    "lr_g": 2e-4,
    "lr_d": 2e-4,
    "beta2": 0.999,
    "warmup_kimg": 0.0,
    "lr_decay": "none",
    "batch_size": 64,
    "ema_kimg": 10.0,
    "report_kimg": 4.0,
    "sample_kimg": 100.0,
    "checkpoint_kimg": 100.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "32": {**_PHOTOS, "image_size": 32, "kimg": 4000.0},
    "64": {**_PHOTOS, "image_size": 64, "kimg": 5000.0},
    "128": {**_PHOTOS, "image_size": 128, "kimg": 8000.0, "r1": 0.5, "batch_size": 32},
    "256": {**_PHOTOS, "image_size": 256, "kimg": 10000.0, "r1": 2.0, "batch_size": 16, "spectral_norm": True},
}


def preset_for(data: str, image_size: int | None) -> str:
    """The preset for a data source and an image size (None: not given)."""
    if data == "digits":
        return "digits"
    return str(min(max(image_size or 64, 32), 256))


def preset(name: str, **changes: Any) -> TrainConfig:
    """The configuration of a preset with `changes`; the start of a run from Python."""
    if name not in PRESETS:
        raise FastganError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return TrainConfig(**{**PRESETS[name], "preset": name, **changes})


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that command-line `arguments` ask for; usage errors exit with 2."""
    first = _first_look(arguments)
    if first.resume is not None:
        from fastgan.train.checkpoint import read_config

        return _parse(arguments, dataclasses.replace(read_config(first.resume), resume=first.resume))
    name = first.preset or preset_for(first.data, first.image_size)
    defaults = preset(name if name in PRESETS else "digits")  # a wrong name is reported by the full parser
    if first.image_size is None and first.preset is None and first.data != "digits":
        defaults = dataclasses.replace(defaults, image_size=64)
    return _parse(arguments, defaults)


def _first_look(arguments: Sequence[str]) -> argparse.Namespace:
    """The options that decide the defaults of all others; what is wrong with them the full parser says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="?", default="digits", const="digits")
    parser.add_argument(
        "--image-size", "--image_size", nargs="?", type=lambda text: int(text) if text.isdigit() else None
    )
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--resume", nargs="?", type=Path)
    return parser.parse_known_args(list(arguments))[0]


def _parse(arguments: Sequence[str], defaults: TrainConfig) -> TrainConfig:
    import tyro

    return tyro.cli(TrainConfig, prog="python -m fastgan.train", args=list(arguments), default=defaults)


# What a resumed run may change. None of it enters the mathematics of the steps, but kimg, which stretches a cosine
# decay, as asked, and data, which may have moved: the pixels themselves are compared.
_RESUMABLE = frozenset(
    "data kimg report_kimg sample_kimg checkpoint_kimg tensorboard dry_run debug resume cache device backend".split()  # noqa: SIM905
)


def check_resumable(saved: TrainConfig, given: TrainConfig) -> None:
    """Raise FastganError for the first setting of `given` that a run saved with `saved` cannot take."""
    for item in dataclasses.fields(TrainConfig):
        old, new = getattr(saved, item.name), getattr(given, item.name)
        if old != new and item.name not in _RESUMABLE:
            raise FastganError(
                f"--resume: --{_option(item.name)} is {old} in the saved run and cannot become {new}; "
                f"only these may change: {', '.join(sorted(_option(name) for name in _RESUMABLE - {'resume'}))}"
            )


def _option(name: str) -> str:
    return name.replace("_", "-")


def _choices() -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for name, annotation in typing.get_type_hints(TrainConfig).items():
        parts = typing.get_args(annotation) if typing.get_origin(annotation) is not Literal else (annotation,)
        literals = [part for part in parts if typing.get_origin(part) is Literal]
        if literals:
            optional = (None,) if type(None) in parts else ()
            found[name] = (*typing.get_args(literals[0]), *optional)
    return found


_CHOICES = _choices()
_RANGES = (
    ("batch_size", 2, float("inf")),
    ("seed", 0, 2**63 - 1),
    ("latent_dim", 1, float("inf")),
    ("g_channels", 1, float("inf")),
    ("d_channels", 1, float("inf")),
    ("label_smoothing", 0, 0.5),
    ("r1", 0, float("inf")),
    ("r2", 0, float("inf")),
    ("wgan_gp", 0, float("inf")),
    ("penalty_interval", 1, float("inf")),
    ("d_steps", 1, float("inf")),
    ("beta1", 0, 0.99999),
    ("beta2", 0, 0.99999),
    ("weight_decay", 0, float("inf")),
    ("warmup_kimg", 0, float("inf")),
    ("ema_rampup", 0, 1),
)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write `config` as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(config.to_json(), indent=2) + "\n", encoding="utf-8")
