"""Where the Triton tests run: on the card under `pytest -m gpu`, else on the CPU under the mended interpreter."""

import pytest
import torch

if torch.cuda.is_available():
    DEVICE, MARKS = "cuda", [pytest.mark.gpu]
else:
    import interpreter  # noqa: F401
    from fastgan.kernels import conv_bn_act_tiles as tiles

    DEVICE, MARKS = "cpu", []
    # A tile operation costs the interpreter a millisecond, whatever its size: the convolutions get few, large ones.
    # Tests of ragged tiles and deep reductions ask for small ones themselves.
    tiles._HALVES = tiles._TF32 = tiles._PLAIN = (tiles.Tile(256, 128, 1024, 4, 1),)
