"""The developer module ``_native``: the same kernels on numpy arrays, on each instruction set of this CPU."""

import random

import numpy as np
import pytest
import torch
from cases import BATCHES, DENSITIES, MEDIUM_SHAPES, SMALL_SHAPES, random_pattern
from tolerance import Exact

native = pytest.importorskip("sparsekern._native", reason="needs the module _native, which wheels leave out")

ISAS = ("generic", "avx2", "avx512")


def arrays(pattern):
    return [tensor.numpy() for tensor in pattern.tensors()]


def require(isa):
    pattern = arrays(random_pattern("csr", (2, 2), 1.0))
    try:
        native.csr_linear(np.ones((1, 2)), np.ones(4), pattern, isa=isa)
    except ValueError as error:
        pytest.skip(str(error))


def check(isa, shape, batch, density):
    case = f"on {isa}, {shape=}, {batch=}, {density=}"
    pattern = random_pattern("csr", shape, density)
    weight = pattern.scatter
    x, grad = torch.randn(batch, shape[1]), torch.randn(batch, shape[0])
    values = torch.randn(pattern.nnz)
    y = native.csr_linear(x.numpy(), values.numpy(), arrays(pattern), isa=isa)
    Exact(lambda x, v: x @ weight(v).t(), x, values).check(torch.from_numpy(y), f"linear {case}")
    if batch == 0:
        return
    gradients = native.csr_linear_backward(grad.numpy(), x.numpy(), values.numpy(), arrays(pattern), isa=isa)
    for got, exact in zip(
        gradients,
        (
            Exact(lambda g, v: g @ weight(v), grad, values),
            Exact(lambda g, x: pattern.gather(g.t() @ x), grad, x),
            Exact(lambda g: g.sum(0), grad),
        ),
        strict=True,
    ):
        exact.check(torch.from_numpy(got), f"backward {case}")


@pytest.mark.parametrize("shape", SMALL_SHAPES + MEDIUM_SHAPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_csr(isa, shape):
    require(isa)
    sample = random.Random(torch.initial_seed()).sample([(b, d) for b in BATCHES for d in DENSITIES], 8)
    for batch, density in sample:
        check(isa, shape, batch, density)


def test_isa_is_restored():
    before = native.isa()
    for isa in ISAS:
        require(isa)
        assert native.isa() == before


def test_bad_arguments():
    pattern = random_pattern("csr", (30, 20), 0.5)
    w = arrays(pattern)
    x, values, grad = np.ones((4, 20), "f4"), np.ones(pattern.nnz, "f4"), np.ones((4, 30), "f4")
    with pytest.raises(ValueError, match='isa must be one that this CPU has, got "sse9"'):
        native.csr_linear(x, values, w, isa="sse9")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        native.fma_peak(0)
    bad_patterns = [
        *(w[:-1], [*w, w[0]], [array.reshape(-1) for array in w], [array[:1] for array in w]),
        *([*w[:i], w[i].astype("i8"), *w[i + 1 :]] for i in (0, 2, 3, 4, 5)),  # 1, col_idx, is not read
    ]
    for bad in bad_patterns:
        with pytest.raises(ValueError, match=r"pattern must be the 6 arrays of CSR\.tensors\(\)"):
            native.csr_linear(x, values, bad)
    with pytest.raises(ValueError, match=r"float32 \[batch, features\]"):
        native.csr_linear(x[0], values, w)
    for bad in ((x[:, :-1], values), (x, values[:-1])):
        with pytest.raises(ValueError, match=r"x must be \[batch, in\], values \[nnz\]"):
            native.csr_linear(*bad, w)
    for bad in ((grad[:3], x, values), (grad[:0], x[:0], values)):
        with pytest.raises(ValueError, match="the same batch of at least 1"):
            native.csr_linear_backward(*bad, w)
    for bad in ((grad[:, :-1], x, values), (grad, x[:, :-1], values), (grad, x, values[:-1])):
        with pytest.raises(ValueError, match=r"grad must be \[batch, out\], x \[batch, in\], values \[nnz\]"):
            native.csr_linear_backward(*bad, w)
