"""`python -m fastgan.train`, and the same from Python: `Trainer(preset("64", data="my_photos")).run()`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgan.train.config import TrainConfig as TrainConfig
    from fastgan.train.config import preset as preset
    from fastgan.train.loop import Trainer as Trainer

__all__ = ["TrainConfig", "Trainer", "preset"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from fastgan.train.loop import Trainer

        return Trainer
    if name in ("TrainConfig", "preset"):
        from fastgan.train import config

        return getattr(config, name)
    raise AttributeError(f"module 'fastgan.train' has no attribute {name!r}")
