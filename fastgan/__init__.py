"""fastgan trains image GANs on verified fused kernels.

Importing it is cheap and never builds anything; each name below is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastgan.backends import use_backend as use_backend
    from fastgan.ema import Ema as Ema
    from fastgan.explanation import explain as explain
    from fastgan.nn.fusion import fuse as fuse
    from fastgan.step import GanStep as GanStep

_HOME = {
    "Ema": "fastgan.ema",
    "GanStep": "fastgan.step",
    "explain": "fastgan.explanation",
    "fuse": "fastgan.nn.fusion",
    "use_backend": "fastgan.backends",
}
_SUBMODULES = ("data", "losses", "nn", "ops", "optim")

__all__ = ["__version__", *_HOME, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return import_module(f"fastgan.{name}")
    raise AttributeError(f"module 'fastgan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
