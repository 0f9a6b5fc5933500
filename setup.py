"""Only what pyproject.toml cannot say: `kernels/` and `csrc/` are installed inside the `fastgan` package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastgan*"]), "fastgan.kernels"],
    package_dir={"fastgan": "fastgan", "fastgan.kernels": "kernels"},
    package_data={"fastgan": ["data/digits/*", "measured_cpu.json"]},
)
