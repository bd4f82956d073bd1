"""Builds the compiled parts with CMake; everything else is in pyproject.toml.

Environment: SPARSEKERN_CUDA=auto|on|off, TORCH_CUDA_ARCH_LIST, SPARSEKERN_TORCH_DIR (torch's package folder, if not the
installed one), CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_REQUIREMENT = "torch==2.13.0"  # whose headers are used where no torch is installed; the library runs on >= 2.11


def find_torch() -> Path | None:
    """torch's package folder. Build isolation hides it from import, but its headers are where it was installed."""
    if folder := os.environ.get("SPARSEKERN_TORCH_DIR"):
        return Path(folder)
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((c for c in candidates if (c / "include/torch/csrc/stable/library.h").exists()), None)


class CMakeBuild(build_ext):
    """One CMake run builds libsparsekern.so and, in editable installs, the developer module ``_native``."""

    def run(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(f"sparsekern needs torch >= 2.11 to build: pip install {TORCH_REQUIREMENT}")
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise SystemExit("sparsekern needs a C++17 compiler to build: install g++ (>= 9) or clang++, or set CXX")
        inplace = self.inplace or self.editable_mode
        package = ROOT / "python/sparsekern" if inplace else Path(self.build_lib).resolve() / "sparsekern"
        build = Path(self.build_temp).resolve() / ("inplace" if inplace else "wheel")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": package,
            "SPARSEKERN_TORCH": torch,
            "SPARSEKERN_CUDA": os.environ.get("SPARSEKERN_CUDA") or "auto",
            "SPARSEKERN_NATIVE": "ON" if inplace else "OFF",
        }
        if inplace:
            import pybind11

            options |= {"pybind11_DIR": pybind11.get_cmake_dir(), "Python_EXECUTABLE": sys.executable}
        if shutil.which("ccache"):
            options |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CMAKE_CUDA_COMPILER_LAUNCHER": "ccache"}
        arguments = [f"-D{key}={value}" for key, value in options.items()]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        build.mkdir(parents=True, exist_ok=True)
        self._cmake("-G", "Ninja", "-S", str(ROOT), "-B", str(build), *arguments)
        self._cmake("--build", str(build))
        self._cmake("--install", str(build))

    def _cmake(self, *arguments: str) -> None:
        try:
            subprocess.run(["cmake", *arguments], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"cmake {arguments[0]} failed with status {error.returncode}; its messages are above") from None

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "sparsekern/libsparsekern.so")]

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """Tagged py3-none-<platform>: the library binds to torch's stable ABI and to no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # The extension stands for whatever CMake builds; it makes the package platform-specific.
    ext_modules=[Extension("sparsekern.libsparsekern", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    setup_requires=[] if find_torch() else [TORCH_REQUIREMENT],
)
