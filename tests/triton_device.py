"""Where the Triton tests run: on the card under `pytest -m gpu`, else on the CPU under the mended interpreter."""

import pytest
import torch

if torch.cuda.is_available():
    DEVICE, MARKS = "cuda", [pytest.mark.gpu]
else:
    import interpreter  # noqa: F401

    DEVICE, MARKS = "cpu", []
