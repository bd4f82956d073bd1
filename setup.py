"""Builds the compiled parts with CMake; everything else is in pyproject.toml.

Environment: SPARSEKERN_CUDA=auto|on|off, TORCH_CUDA_ARCH_LIST, SPARSEKERN_TORCH_DIR (torch's package folder,
if not the installed one), SPARSEKERN_CUTLASS_DIR (CUTLASS's include folder, if not that of an installed
nvidia-cutlass), CXX, CUDACXX, CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL.
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

ROOT = Path(__file__).resolve().parent
# Gives the headers where no torch is installed, as pinned in pyproject.toml; the library runs on any >= 2.11.
TORCH_REQUIREMENT = "torch==2.13.0"

# Which CUTLASS before 3.8 lacks, and one kernel needs.
CUTLASS_HEADER = "cutlass/gemm/collective/builders/sm90_sparse_config.inl"


def find_torch() -> Path | None:
    """torch's package folder. Build isolation hides it from import, but not from where it was installed."""
    if folder := os.environ.get("SPARSEKERN_TORCH_DIR"):
        return Path(folder)
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((c for c in candidates if (c / "include/torch/csrc/stable/library.h").exists()), None)


def find_cutlass() -> Path | None:
    """CUTLASS's include folder, which only one of the CUDA kernels needs: what nvidia-cutlass installs."""
    if folder := os.environ.get("SPARSEKERN_CUTLASS_DIR"):
        return Path(folder)
    candidates = [
        Path(sysconfig.get_path(name), "cutlass_library/source/include") for name in ("platlib", "purelib")
    ]
    return next((c for c in candidates if (c / CUTLASS_HEADER).exists()), None)


class CMakeBuild(build_ext):
    """One CMake run builds libsparsekern.so and, in editable installs, the developer module ``_native``."""

    def run(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(f"sparsekern needs torch >= 2.11 to build: pip install {TORCH_REQUIREMENT}")
        if cxx := shlex.split(os.environ.get("CXX", "")):
            if not shutil.which(cxx[0]):
                raise SystemExit(f"CXX must name a C++17 compiler to build sparsekern, got {' '.join(cxx)}")
        elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise SystemExit("sparsekern needs a C++17 compiler to build: install g++ or clang++, or set CXX")
        if not (ninja := shutil.which("ninja")) or not shutil.which("cmake"):
            raise SystemExit("sparsekern needs cmake and ninja on PATH to build: pip install cmake ninja")
        inplace = self.inplace or self.editable_mode
        # Python's headers are a package of their own on many systems; only _native needs them.
        native = inplace and Path(sysconfig.get_path("include"), "Python.h").exists()
        package = ROOT / "python/sparsekern" if inplace else Path(self.build_lib).resolve() / "sparsekern"
        # pip's folder for an editable build is a temporary one. Ours stays: only what changed is compiled.
        ours = ROOT / "build" / str(sys.implementation.cache_tag)
        build = ours if inplace else Path(self.build_temp).resolve() / "wheel"
        ccache = shutil.which("ccache") or ""
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER_LAUNCHER": ccache,
            "CMAKE_CXX_COMPILER_LAUNCHER": ccache,
            "CMAKE_INSTALL_PREFIX": package,
            "CMAKE_MAKE_PROGRAM": ninja,  # the last build's may be gone with its isolated environment
            "SPARSEKERN_TORCH": torch,
            "SPARSEKERN_CUTLASS": find_cutlass() or "",
            "SPARSEKERN_CUDA": os.environ.get("SPARSEKERN_CUDA") or "auto",
            "SPARSEKERN_NATIVE": "ON" if native else "OFF",
        }
        if native:
            import pybind11

            options |= {"pybind11_DIR": pybind11.get_cmake_dir(), "Python_EXECUTABLE": sys.executable}
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
            failed = f"cmake {arguments[0]} failed with status {error.returncode}"
            raise SystemExit(f"{failed}; its messages are above") from None

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "sparsekern/libsparsekern.so")]

    def get_source_files(self) -> list[str]:
        sources = (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("csrc/**/*.*")))
        return ["CMakeLists.txt", *sources]


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
