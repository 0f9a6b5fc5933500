"""What several tests share: a tiny data set and configurations of a second's training."""

from importlib.util import find_spec

import numpy as np
import pytest
from pair import pair  # noqa: F401  two processes in one group
from planted import planted_kernels  # noqa: F401  a fixture of the kernels' tests

from fastgan import backends
from fastgan.train import preset

if find_spec("triton") is not None:
    import triton_device  # noqa: F401  Triton's kernels see at import whether they are interpreted
    from convolution_cases import chains_of_fp32_are_cut, full_precision, small_tiles  # noqa: F401  fixtures likewise
else:

    class WithoutTriton(pytest.Module):
        """A module of tests that is skipped where it cannot be imported without Triton."""

        def collect(self):
            try:
                return super().collect()
            except self.CollectError as error:
                if getattr(error.__cause__, "name", None) != "triton":
                    raise
                pytest.skip("Triton is not installed (Linux: pip install triton)", allow_module_level=True)

    def pytest_pycollect_makemodule(module_path, parent):
        return WithoutTriton.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def needs_the_cpu_kernels(request):
    """Skip a test with parameter backend="cpu" where they cannot run, with the reason."""
    given = getattr(request.node, "callspec", None)
    if given and given.params.get("backend") == "cpu" and (reason := backends.why_not("cpu", device="cpu")) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """60 grey images of 16 x 16: bright squares at random places, as an .npy file."""
    random = np.random.default_rng(0)
    images = np.zeros((60, 16, 16), np.uint8)
    for image in images:
        top, left = random.integers(0, 8, 2)
        image[top : top + 8, left : left + 8] = 255
    path = tmp_path_factory.mktemp("data") / "squares.npy"
    np.save(path, images)
    return path


@pytest.fixture
def tiny(tiny_images, tmp_path):
    """`tiny(out="run", kimg=0.1, ...)`: a configuration that trains in about a second."""

    def make(**changes):
        values = {
            "data": str(tiny_images),
            "out": tmp_path / changes.pop("out", "run"),
            "cache": tiny_images.parent / "cache",
            "image_size": 16,
            "batch_size": 8,
            "kimg": 0.16,
            "latent_dim": 6,
            "g_channels": 4,
            "d_channels": 4,
            "ema_kimg": 0.05,
            "report_kimg": 0.04,
            "sample_kimg": 0.08,
            "checkpoint_kimg": 0.04,
            "device": "cpu",
        }
        return preset("digits", **{**values, **changes})

    return make


@pytest.fixture
def arguments(tiny):
    """The command-line arguments of `tiny(...)`."""

    def make(**changes):
        config = tiny(**changes)
        values = config.to_json()
        given = [name for name in values if values[name] != preset("digits").to_json()[name]]
        return [text for name in given for text in (f"--{name.replace('_', '-')}", str(values[name]))]

    return make
