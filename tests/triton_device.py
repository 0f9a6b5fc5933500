"""Where the Triton tests run: on the card under `pytest -m gpu`, else on the CPU under the mended interpreter."""

from importlib.metadata import version

import pytest
import torch

if torch.cuda.is_available():
    DEVICE, MARKS = "cuda", [pytest.mark.gpu]
else:
    # Not from the module: Triton's own device functions see at its import whether they are interpreted.
    OLD = tuple(map(int, version("triton").split(".")[:2])) < (3, 8)
    if not OLD:  # a newer one that is not the mended one is an error
        import interpreter  # noqa: F401
    from fastgan.kernels import conv_bn_act_tiles as tiles

    DEVICE = "cpu"
    MARKS = (
        [pytest.mark.skip(reason="tests/interpreter.py mends the interpreter of Triton 3.8 and newer")] if OLD else []
    )
    # A tile operation costs the interpreter a millisecond, whatever its size: the convolutions get few, large ones.
    # Tests of ragged tiles and deep reductions ask for small ones themselves.
    tiles._HALVES = tiles._TF32 = tiles._PLAIN = (tiles.Tile(256, 128, 1024, 4, 1),)

# Of the tests that hold every backend to the definition; "cpu" is skipped by conftest.py where it cannot be built.
BACKENDS = ["eager", "triton"] if DEVICE == "cuda" else ["eager", "triton", "cpu"]
