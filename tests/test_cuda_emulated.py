"""The CUDA kernels on the emulator, through their C functions: same source, same results as in float64."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import DTYPES, LAYOUTS, MEDIUM_SHAPES, SMALL_SHAPES, random_pattern
from sparsekern.formats.products import ACTIVATIONS
from tolerance import assert_product
from torch import Tensor

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""


class Matrix(ctypes.Structure):
    """``sk_matrix`` of common.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "features", "stride_batch", "stride_feature")),
    )

    @classmethod
    def of(cls, tensor: Tensor) -> Matrix:
        return cls(tensor.data_ptr(), *tensor.shape, *tensor.stride())


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A library of the ``.cu`` files, compiled as C++ for the emulator."""
    if not COMPILER:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "libkernels.so"
    includes = [f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc/cuda", "tests/emulator")]
    flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC", *includes]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    built = subprocess.run(
        [COMPILER, *flags, "-x", "c++", *sources, "-o", library], capture_output=True, text=True, check=False
    )
    if "_Float16" in built.stderr:
        pytest.skip("the compiler lacks _Float16")
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.sk_csr_linear_cuda.restype = ctypes.c_char_p
    loaded.sk_csr_linear_cuda.argtypes = [
        ctypes.c_int64,
        *[ctypes.c_void_p] * 3,
        ctypes.POINTER(Matrix),
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.POINTER(Matrix),
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return loaded


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 7, 8, 33])
@pytest.mark.parametrize("shape", [*SMALL_SHAPES, MEDIUM_SHAPES[0]], ids=str)
def test_csr_linear(kernels, shape, batch, dtype, layout, activation):
    out_features, in_features = shape
    pattern = random_pattern("csr", shape, 0.3)
    lay = LAYOUTS[layout]
    values = torch.randn(pattern.values_shape).to(dtype)
    bias = torch.randn(out_features).to(dtype) if batch != 7 else None
    x = lay(torch.randn(batch, in_features).to(dtype))
    y = lay(torch.full((batch, out_features), torch.nan).to(dtype))
    error = kernels.sk_csr_linear_cuda(
        out_features,
        pattern.row_ptr.data_ptr(),
        pattern.col_idx.data_ptr(),
        values.data_ptr(),
        Matrix.of(x),
        None if bias is None else bias.data_ptr(),
        list(ACTIVATIONS).index(activation),
        Matrix.of(y),
        DTYPES.index(dtype),
        None,
    )
    assert error is None, error.decode()
    frame = y if y._base is None else y._base
    assert int(frame.isnan().sum()) == frame.numel() - y.numel(), "written beside y"
    if activation is None:
        shift = torch.zeros(out_features, dtype=dtype) if bias is None else bias
        assert_product(y, lambda x, v, b: x @ pattern.scatter(v).t() + b, x, values, shift)
    else:
        exact = torch.nn.functional.linear(
            x.double(), pattern.scatter(values.double()), None if bias is None else bias.double()
        )
        torch.testing.assert_close(y, ACTIVATIONS[activation](exact).to(dtype))
