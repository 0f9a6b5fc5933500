"""How a card is filled by the fused stack's convolutions, and how much of what they multiply counts: from the launches
of a DCGAN step on `meta` tensors, with the tiles that each card would be given. Counted, not measured.

    python benchmarks/waves.py [--json F]

A launch is a number of programs for a number of places: multiprocessors, times the programs that share one (one of 8
warps, for its registers, or two of 4; more may fit). Programs over places, rounded up, are its *waves*; what the last
wave leaves empty is its *tail*. A step is taken to last as long as its multiplications, full places or not.

A persistent loop (as many programs as places, each with several tiles) has the same tail: tiles stay whole. What it can
save is the start of a tile's pipeline in all waves but the first, stages - 1 steps beside the tile's own.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from fastgan.kernels import conv_bn_act_tiles, conv_bn_act_wgrad
from traffic import BF16, PROVIDERS, Count, networks, running

from fastgan import GanStep
from fastgan.command import run_configured


class Card(NamedTuple):
    multiprocessors: int
    capability: int


CARDS = {"A100": Card(108, 8), "H100": Card(132, 9), "B200": Card(148, 10)}


class Filling(NamedTuple):
    """One launch of a convolution: its programs and places, a program's steps, the multiplications of a step, those of
    the launch that count, and the channels of its output (0: a weight's gradient)."""

    programs: int
    places: int
    steps: int
    stages: int
    step: int
    useful: int
    out_channels: int

    @property
    def issued(self) -> int:
        return self.programs * self.steps * self.step

    @property
    def room(self) -> int:
        """Multiplications that its waves have places for."""
        return self.waves * self.places * self.steps * self.step

    @property
    def saved(self) -> int:
        """Of a persistent loop, at most."""
        return (self.waves - 1) * self.places * min(self.stages - 1, self.steps) * self.step

    @property
    def waves(self) -> int:
        return -(-self.programs // self.places)


class Fillings(Count):
    """`with Fillings.all() as count: ...` collects `count.fillings`."""

    def __init__(self) -> None:
        super().__init__()
        self.fillings: list[Filling] = []

    def triton(self, kernel: Any, grid: Any, tensor: Any, *args: Any, **meta: Any) -> None:
        super().triton(kernel, grid, tensor, *args, **meta)
        if "BK" in meta:
            named = dict(zip(kernel.arg_names, args, strict=False))
            steps = named["per_split"] if "per_split" in named else _steps(named["channels"], **meta)
            places = conv_bn_act_tiles.multiprocessors(tensor) * (8 // meta["num_warps"])
            step, useful = meta["BM"] * meta["BN"] * meta["BK"], self.launches[-1].operations // 2
            out_channels = named.get("out_channels", 0)
            self.fillings.append(
                Filling(math.prod(grid), places, steps, meta["num_stages"], step, useful, out_channels)
            )


def _steps(channels: int, KERNEL: Any, STEP: Any, BK: int, FOLD: bool, **_: Any) -> int:
    """Of a program of the convolution; where the phases differ, of the longest."""
    taps = math.prod(-(-size // step) for size, step in zip(KERNEL, STEP, strict=True))
    return -(-taps * channels // BK) if FOLD else taps * -(-channels // BK)


@contextmanager
def on(card: Card) -> Iterator[None]:
    """Within it tiles are chosen for a card."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(conv_bn_act_tiles, "capability", lambda _: card.capability))
        for module in (conv_bn_act_tiles, conv_bn_act_wgrad):
            stack.enter_context(patch.object(module, "multiprocessors", lambda _: card.multiprocessors))
        yield


def fillings(card: Card, image_size: int, batch_size: int, width: int = 64) -> list[Filling]:
    """Of the convolutions of a step."""
    made = networks(image_size, width)
    step = GanStep(*made, *(torch.optim.SGD(net.parameters(), 0.1) for net in made),
                   latents=lambda n: torch.empty(n, 100, **BF16))  # fmt: skip
    real = torch.empty(batch_size, 3, image_size, image_size, **BF16)
    with on(card), running(PROVIDERS["fused"]), Fillings.all() as count:
        step(real.contiguous(memory_format=torch.channels_last))
    return count.fillings


def summary(found: list[Filling]) -> dict[str, float]:
    """Launches by their waves, and shares: of places that stay empty, of what a persistent loop could save, and of the
    multiplications that count, in all and where the output has 1 or 3 channels."""
    room, saved = sum(one.room for one in found), sum(one.saved for one in found)
    images = [one for one in found if one.out_channels in (1, 3)]
    return {
        "launches": len(found),
        "of one wave": sum(one.waves == 1 for one in found),
        "of two waves": sum(one.waves == 2 for one in found),
        "of more": sum(one.waves > 2 for one in found),
        "places empty": 1 - sum(one.issued for one in found) / room,
        "persistent saves at most": saved / (room + saved),
        "counts": sum(one.useful for one in found) / sum(one.issued for one in found),
        "counts at the ends": sum(one.useful for one in images) / sum(one.issued for one in images),
    }


@dataclass
class WavesConfig:
    """Count how the fused stack's convolutions fill cards."""

    sizes: tuple[int, ...] = (64, 128)
    """pixels on a side"""
    batches: tuple[int, ...] = (32, 128)
    """images per step"""
    json: Path | None = None
    """write the counts here"""
    debug: bool = False
    """show tracebacks of errors"""


def waves(config: WavesConfig) -> None:
    rows = [
        {"image_size": size, "batch_size": batch, "card": name, **summary(fillings(card, size, batch))}
        for size in config.sizes for batch in config.batches for name, card in CARDS.items()
    ]  # fmt: skip
    for row in rows:
        print(*(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    if config.json is not None:
        config.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_configured(WavesConfig, "python benchmarks/waves.py", waves, sys.argv[1:]))
