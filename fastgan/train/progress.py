"""What a person sees while training: one live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text


def duration(seconds: float) -> str:
    """`seconds` as people say it: 42s, 3m07s, 2h15m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def line(report: Mapping[str, Any], total_kimg: float) -> str:
    """One report of `log.jsonl` as text."""
    left = (total_kimg - report["kimg"]) * 1000 / max(report["images_per_second"], 1e-9)
    return "  ".join(
        [
            f"step {report['step']:>6}",
            f"kimg {report['kimg']:.1f}/{total_kimg:g}",
            f"{report['images_per_second']:.0f} images/s",
            f"loss G {report.get('loss_g', float('nan')):.3f} D {report['loss_d']:.3f}",
            f"D(x) {report['d_real']:.2f}  D(G(z)) {report['d_fake']:.2f}",
            f"{duration(max(left, 0))} left",
        ]
    )


class Progress:
    """`with Progress(console, total_kimg) as progress: progress.advance(step, kimg); progress.show(report)`."""

    def __init__(self, console: Console, total_kimg: float) -> None:
        self.console, self.total_kimg = console, total_kimg
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._report: Mapping[str, Any] | None = None
        self._updated = 0.0

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def advance(self, step: int, kimg: float) -> None:
        """Note a step that was made; on a terminal the line shows it at once, with the metrics of the last report."""
        if self._live and time.monotonic() - self._updated > 0.25:
            self._updated = time.monotonic()
            if self._report is None:
                self._show(f"step {step:>6}  kimg {kimg:.1f}/{self.total_kimg:g}")
            else:
                self._show(line({**self._report, "step": step, "kimg": kimg}, self.total_kimg))

    def show(self, report: Mapping[str, Any]) -> None:
        """Show a report of `log.jsonl`."""
        self._report = report
        text = line(report, self.total_kimg)
        if self._live:
            self._show(text)
        else:
            self.console.print(text, highlight=False, soft_wrap=True)

    def _show(self, text: str) -> None:
        assert self._live is not None
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))
