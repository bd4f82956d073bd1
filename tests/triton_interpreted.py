"""Triton's kernels under its interpreter: ``test_triton.py`` runs this file, with ``TRITON_INTERPRET=1``.

A step of a tile takes milliseconds, so shapes are small and odd, and cases few and random. The GPU that tiles
are chosen for has 3 multiprocessors: programs have many tiles all the same.
"""

from __future__ import annotations

import random

import pytest
import sparsekern as sk
import torch
from cases import LAYOUTS, Case, check_products, op, random_pattern
from sparsekern import Pattern
from sparsekern.benchmark import tune_triton
from sparsekern.doctor import cases as doctor
from sparsekern.doctor.check import check as checked
from sparsekern.doctor.check import unavailable
from sparsekern.formats.products import ACTIVATIONS
from sparsekern.formats.triton_products import FORMATS, LIBRARY, missing
from sparsekern.nn import SparseLinear
from tolerance import Exact, assert_product
from torch import Tensor
from torch.library import opcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = {
    "csr": ("csr",),
    "bsr": ("bsr4", "bsr8x64", "bsr16", "bsr32x4", "bsr128"),
    "nm": ("2:4", "1:4", "2:8", "3:5"),
    "vnm": ("64:2:8", "4:2:5", "16:2:16"),
}
"""By stem: what is tried of each format."""
ALL = [pytest.param(spec, id=f"{stem}-{spec}") for stem in FORMATS for spec in SPECS[stem]]
ONE_EACH = [pytest.param(SPECS[stem][0], id=f"{stem}-{SPECS[stem][0]}") for stem in FORMATS]

specs = pytest.mark.parametrize("spec", ALL)
one_each = pytest.mark.parametrize("spec", ONE_EACH)
once = pytest.mark.parametrize("spec", ONE_EACH[:1])


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    for format in FORMATS:
        assert missing(format, "cpu") is None


def where(pattern: Pattern) -> tuple[list[Tensor], list[int]]:
    return pattern.gpu_operands


def check(case: Case) -> None:
    check_products(case, LIBRARY, where, needs=[(True, True, True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@specs
def test_products(spec: str, dtype: torch.dtype) -> None:
    shape, batch = random.choice([(7, 5), (21, 38), (38, 21), (17, 70)]), random.choice((1, 5, 17, 33, 65))
    check(Case(spec, shape, batch, random.choice((0.1, 0.4)), dtype, random.choice(list(LAYOUTS))))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: f"bsr-{dtype}")
def test_tiles_of_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of them serves: which one is chosen is a matter of speed."""
    from sparsekern.triton_kernels import bsr_tiles, common

    configs = bsr_tiles.configs
    common.forget()
    monkeypatch.setattr(bsr_tiles, "configs", lambda *at: [random.choice(list(configs(*at)))])
    spec, shape = random.choice((("bsr128", (140, 20)), ("bsr64x16", (70, 50)), ("bsr16x64", (20, 140))))
    check(Case(spec, shape, random.choice((19, 70)), 0.5, dtype, random.choice(list(LAYOUTS))))
    common.forget()


@pytest.mark.parametrize("stem", [stem for stem in FORMATS if stem != "bsr"], ids="{}-".format)
def test_tiles_of_rows(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise, of formats whose rows list their values."""
    from sparsekern.triton_kernels import csr_weight, groups_launch

    dtype, lay = random.choice(DTYPES), random.choice(list(LAYOUTS))
    tiles = csr_weight.TILES_LONG if dtype == torch.float32 else csr_weight.TILES
    monkeypatch.setattr(csr_weight, "tile", lambda *at: random.choice(tiles))
    groups = groups_launch.LONG if dtype == torch.float32 else groups_launch.SHORT
    monkeypatch.setattr(groups_launch, "choice", lambda *at: random.choice(groups))
    spec, shape = random.choice(SPECS[stem]), random.choice(((70, 50), (20, 90)))
    check(Case(spec, shape, random.choice((19, 70)), random.choice((0.005, 0.5)), dtype, lay))


@one_each
def test_the_empty(spec: str) -> None:
    for shape, batch in (((9, 6), 0), ((0, 6), 3), ((6, 0), 3)):
        check(Case(spec, shape, batch, 0.0, torch.float32, "batch-major"))
    check(Case(spec, (40, 20), 5, 0.0, torch.float32, "feature-major"))


@one_each
def test_activations_and_bias(spec: str) -> None:
    pattern = random_pattern(spec, (37, 50), 0.3)
    x, values, bias = torch.randn(9, 50), torch.randn(pattern.values_shape), torch.randn(37)
    y = Exact(lambda x, v, b: x @ pattern.scatter(v).t() + b, x, values, bias)
    for name, function in ACTIVATIONS.items():
        with torch.no_grad():
            got = sk.linear(x, values, pattern, bias, activation=name, backend="triton")
        y.check_activated(function, got, f"{spec} {name}")


@one_each
def test_only_the_pattern_is_read(spec: str) -> None:
    """What W does not use may hold anything, and rows of a batch do not mix."""
    kind = sk.formats.parse_format(spec)
    free = kind.fixed_sparsity is None
    scores = torch.rand(20, 70) if free else torch.rand(70).expand(20, -1)
    pattern = kind.from_mask(kind.prune(scores, 0.9 if free else None))
    mask = pattern.to_mask()
    x, grad = torch.randn(9, 70).bfloat16(), torch.randn(9, 20).bfloat16()
    if free:  # N:M and V:N:M are multiplied with their zeros
        x[:, ~mask.any(0)], grad[:, ~mask.any(1)] = torch.nan, torch.nan
    x[4], grad[4] = torch.inf, torch.inf
    values, others = torch.randn(pattern.values_shape).bfloat16(), torch.arange(9) != 4
    at = where(pattern)
    assert op(pattern, "linear", LIBRARY)(x, values, None, *at)[others].isfinite().all()
    assert op(pattern, "linear_backward_input", LIBRARY)(grad, values, *at)[others].isfinite().all()
    assert op(pattern, "linear_backward_weight", LIBRARY)(grad[others], x[others], *at).isfinite().all()


@one_each
def test_strided_values_and_bias_are_refused(spec: str) -> None:
    pattern = random_pattern(spec, (20, 30), 0.4)
    x, values = torch.randn(3, 30), torch.randn(pattern.values_shape)
    apart = values.repeat_interleave(2, -1)[..., ::2]
    with pytest.raises(ValueError, match="values must be contiguous, got strides"):
        sk.linear(x, apart, pattern, backend="triton")
    with pytest.raises(ValueError, match="bias must be contiguous, got strides"):
        sk.linear(x, values, pattern, torch.randn(1).expand(20), backend="triton")
    with pytest.raises(ValueError, match="values must be contiguous"):
        op(pattern, "linear_backward_input", LIBRARY)(torch.randn(3, 20), apart, *where(pattern))


@one_each
def test_results_have_the_layout_of_their_input(spec: str) -> None:
    pattern = random_pattern(spec, (30, 20), 0.3)
    values = torch.randn(pattern.values_shape)
    for layout, lay in LAYOUTS.items():
        x, grad = lay(torch.randn(9, 20)), lay(torch.randn(9, 30))
        y = op(pattern, "linear", LIBRARY)(x, values, None, *where(pattern))
        grad_x = op(pattern, "linear_backward_input", LIBRARY)(grad, values, *where(pattern))
        assert y.stride() == ((1, 9) if "feature-major" in layout else (30, 1))
        assert grad_x.stride() == ((1, 9) if "feature-major" in layout else (20, 1))


def second_derivatives(pattern: Pattern, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, values, bias, grad, u, v, w = (tensor.detach().requires_grad_() for tensor in tensors)
    y = sk.linear(x, values, pattern, bias, backend=backend)
    first = torch.autograd.grad(y, (x, values, bias), grad, create_graph=True)
    return torch.autograd.grad(first, (grad, x, values), (u, v, w))


@one_each
def test_second_derivatives(spec: str) -> None:
    pattern = random_pattern(spec, (23, 18), 0.4)
    values, bias = torch.randn(pattern.values_shape), torch.randn(23)
    x, grad, u = (torch.randn(5, size) for size in (18, 23, 18))
    inputs = (x, values, bias, grad, u, torch.randn_like(values), torch.randn_like(bias))
    got = second_derivatives(pattern, "triton", *inputs)
    assert_product(got, lambda *inputs: second_derivatives(pattern, "reference", *inputs), *inputs)


@once
def test_opcheck(spec: str) -> None:
    pattern = random_pattern(spec, (10, 14), 0.4)
    values, x = torch.randn(pattern.values_shape, requires_grad=True), torch.randn(3, 14, requires_grad=True)
    opcheck(op(pattern, "linear", LIBRARY), (x, values, None, *where(pattern)))


@once
def test_a_compiled_layer(spec: str) -> None:
    """Opaque under the interpreter; what is compiled of it is ``test_triton_compiled.py``'s."""
    free = sk.formats.parse_format(spec).fixed_sparsity is None
    layer = SparseLinear(14, 10, sparsity=0.5 if free else None, format=spec)
    layer.backend = "triton"
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (9, 4):
        x = torch.randn(batch, 14, requires_grad=True)
        y, expected = compiled(x), layer(x)
        assert torch.equal(y, expected)
        inputs = (x, layer.values, layer.bias)
        got, wanted = (torch.autograd.grad(z.square().sum(), inputs) for z in (y, expected))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@one_each
def test_what_doctor_and_tune_call(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for product in doctor.TRITON:
        case = doctor.Case("cpu", spec, product, torch.float32, (9, 14), 3, 0.4, "batch-major", seed=1)
        assert unavailable("cpu", spec, product, torch.float32) is None
        assert checked(case) <= 1.0
    monkeypatch.setattr(tune_triton, "SHAPE", (16, 20))
    monkeypatch.setattr(tune_triton, "BATCHES", (3, 5))
    for call in tune_triton._calls(spec, torch.float32, 5, "cpu"):
        assert call().isfinite().all()
