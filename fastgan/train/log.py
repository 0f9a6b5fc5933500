"""The run's measurements over time: `log.jsonl`, one JSON object a line, and TensorBoard events on request."""

import json
from pathlib import Path
from typing import Any

from fastgan.errors import FastganError
from fastgan.files import replacing


class Log:
    """Appends reports to `RUN/log.jsonl`. Going on from `step` first drops the lines after it, so none stands twice."""

    def __init__(self, run: Path, step: int, tensorboard: bool) -> None:
        path = run / "log.jsonl"
        kept = [entry for entry in read_log(run) if entry["step"] <= step] if path.exists() else []
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the object
        self._events: Any = None
        if tensorboard:
            self._events = _summary_writer()(str(run), purge_step=step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._events:
            for name, value in entry.items():
                if name != "step":
                    self._events.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def require_tensorboard() -> None:
    """Raise FastganError that says how to get it where TensorBoard is not installed."""
    _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FastganError("--tensorboard needs the extra: pip install 'fastgan[tensorboard]'") from error
    return SummaryWriter


def read_log(run: Path) -> list[dict[str, Any]]:
    """The reports of a run in order; a last line that a crash cut short is left out."""
    entries = []
    for text in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return entries
