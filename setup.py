"""Builds the CPU kernels with the package (all else is in pyproject.toml).

Without a compiler the installation still succeeds: the package then says why its kernels are missing, and
runs the portable implementation.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("ops", "cpu")


def _load_build_module():
    spec = importlib.util.spec_from_file_location("scarlet_build", KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = _load_build_module()


class BuildKernels(build_ext):
    """Compiles by our own rules: a plain shared library, each file with its own flags."""

    def get_ext_filename(self, fullname):
        """A fixed name: the library holds no Python module."""
        return str(Path(*fullname.split(".")[:-1], kernels.LIBRARY))

    def build_extension(self, ext):
        """Compile, or leave a note that says why not."""
        in_place = self.inplace or self.editable_mode
        folder = KERNELS if in_place else Path(self.get_ext_fullpath(ext.name)).parent
        if failure := kernels.build_or_note(folder):
            print(f"scarlet_jax: the CPU kernels were not built: {failure}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """Nothing to copy: an editable build compiles in place."""


class PythonAgnosticWheel(bdist_wheel):
    """One wheel a platform: the library does not depend on the Python that built it."""

    def get_tag(self):
        """`py3-none-PLATFORM`."""
        return "py3", "none", super().get_tag()[2]


sources = [str(KERNELS / name) for name in kernels.source_names()]
setup(
    ext_modules=[
        Extension(
            "scarlet_jax.ops.cpu.kernels",
            sources,
            depends=[str(path) for path in sorted(KERNELS.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PythonAgnosticWheel},
)
