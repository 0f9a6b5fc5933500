"""What pyproject.toml cannot say: `kernels/` and `csrc/` are installed inside the `fastgan` package, and the
libraries are built by fastgan/build.py. `FASTGAN_BUILD_CUDA=0` leaves the CUDA one out, `=1` makes its absence an
error; `FASTGAN_BUILD_CPU` likewise."""

import importlib.util
import json
import os
import sys
import textwrap
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_by_path(path):
    spec = importlib.util.spec_from_file_location("fastgan_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_by_path(ROOT / "fastgan" / "build.py")


class BuildLibraries(build_ext):
    """Builds what can be built. Beside each library lies its record: how it was built, or why it was not."""

    def run(self):
        self.built = []
        for library in build.LIBRARIES:
            asked = os.environ.get(f"FASTGAN_BUILD_{library.upper()}", "")
            if asked not in ("", "0", "1"):
                sys.exit(f"FASTGAN_BUILD_{library.upper()} must be 0 or 1, got {asked!r}")
            self.build_library(library, asked)

    def build_library(self, library, asked):
        folder = Path("fastgan") if self.inplace else Path(self.build_lib) / "fastgan"
        folder.mkdir(parents=True, exist_ok=True)
        output = (folder / build.library_filename(library)).resolve()
        output.unlink(missing_ok=True)
        try:
            if asked == "0":
                raise build.BuildError(f"FASTGAN_BUILD_{library.upper()}=0 left it out")
            parameters = build.get_build_parameters(library)
            build.build(parameters, (Path(self.build_temp) / library).resolve(), output)
            record = parameters.metadata
            self.built.append(output.name)
        except build.BuildError as error:
            if asked == "1":
                sys.exit(f"fastgan: FASTGAN_BUILD_{library.upper()}=1, but the library cannot be built: {error}")
            if asked != "0":
                report(library, error)
            record = {"error": str(error)}
        output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        self.built.append(output.with_suffix(".json").name)

    # What setuptools asks for to copy and to list the results (its SubCommand protocol).
    def get_outputs(self):
        return [str(Path(self.build_lib) / "fastgan" / name) for name in self.built]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class PlatformWheel(bdist_wheel):
    """The libraries hold no Python symbols: one wheel serves every Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def report(library, error):
    text = f"fastgan: the {library} library was not built: {error}"
    print(
        "\n" + textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n",
        file=sys.stderr,
    )


setup(
    packages=[*find_packages(include=["fastgan*"]), "fastgan.kernels", "fastgan.csrc"],
    package_dir={"fastgan": "fastgan", "fastgan.kernels": "kernels", "fastgan.csrc": "csrc"},
    package_data={"fastgan": ["data/digits/*", "*.json"], "fastgan.csrc": ["**/*"]},
    # Named so that setuptools knows the package is not pure Python; BuildLibraries knows the sources.
    ext_modules=[Extension("fastgan.libraries", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
