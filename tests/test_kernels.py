"""Every product of every format against dense products in float64; determinism; what must never be read."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    ALL_FORMATS,
    DENSITIES,
    DTYPES,
    LARGE_SHAPES,
    LAYOUTS,
    MASKS,
    MEDIUM_SHAPES,
    SMALL_SHAPES,
    Case,
    cases,
    check_products,
    op,
    random_pattern,
    where,
)
from sparsekern import _library
from sparsekern.doctor.cases import padded
from sparsekern.formats import parse_format

pytestmark = pytest.mark.skipif(
    _library.LOAD_ERROR is not None, reason=f"needs the native kernels: {_library.LOAD_ERROR}"
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("format", MASKS)
def test_small(format, shape, dtype, layout):
    for case in cases([shape], [format], [layout], [dtype]):
        check_products(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MEDIUM_SHAPES, ids=str)
@pytest.mark.parametrize("format", MASKS)
def test_medium(format, shape, dtype, layout):
    for case in cases([shape], [format], [layout], [dtype], sample=8):
        check_products(case)


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("format", MASKS)
def test_large(format, shape):
    for case in cases([shape], [format], ["batch-major", "feature-major"], sample=1):
        check_products(case)


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_every_spec(format):
    for case in cases([(70, 45), (200, 333)], [format], ["batch-major", "feature-major"], sample=2):
        check_products(case)


@pytest.mark.parametrize("format", MASKS)
def test_sizes_around_what_kernels_cut_by(format):
    """Vectors, panels and tiles."""
    chosen = random.Random(torch.initial_seed())
    sizes = [size + off for size in (4, 8, 16, 32, 64, 128, 256, 512, 1024) for off in (-1, 0, 1)]
    for _ in range(40):
        shape = (chosen.choice(sizes), chosen.choice(sizes))
        case = Case(
            format,
            shape,
            chosen.choice(sizes[:18]),
            chosen.choice(DENSITIES),
            chosen.choice(DTYPES),
            chosen.choice(list(LAYOUTS)),
        )
        check_products(case)


def run(code, **environment):
    """Run ``code`` in a new process: the ISA is chosen once, when the library is loaded."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


isas = pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512+bf16"])


def run_on(isa, code):
    """Run ``code``, a test, on this ISA; skip where it is the one in use, or one that this CPU has not."""
    if isa == torch.ops.sparsekern.isa():
        pytest.skip(f"{isa} is what all other tests run on")
    start = f"""
import conftest, sparsekern, torch
torch.manual_seed(conftest.SEED)
if error := torch.ops.sparsekern.isa_error():
    raise SystemExit(error)
assert torch.ops.sparsekern.isa() == {isa!r}
"""
    result = run(start + code, SPARSEKERN_ISA=isa)
    if "SPARSEKERN_ISA must name" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr


@isas
def test_every_isa(isa):
    run_on(
        isa,
        """
from cases import *
for case in cases([(16, 16), (7, 5), (65, 129), (40, 300)], sample=8):
    check_products(case)
""",
    )


@pytest.mark.parametrize("isa", ["avx512+bf16", "generic+bf16"])
def test_dot_instructions(isa):
    """bfloat16 on pairs of numbers; generic+bf16, of editable installs, needs no such instruction."""
    run_on(
        isa,
        """
import test_kernels
from cases import *
formats = [format for format in ALL_FORMATS if "bsr" in format or ":2:" in format]
layouts = ["padded batch-major", "padded feature-major"]
for case in cases([(7, 5), (140, 129)], [*formats, "2:4"], layouts, [torch.bfloat16], sample=1):
    check_products(case)
for format in ("bsr4", "bsr16x8", "bsr32", "2:4", "64:2:8"):
    test_kernels.test_only_the_pattern_is_read(format, 70, torch.bfloat16)
    for bad in (torch.nan, torch.inf):
        test_kernels.test_rows_of_a_batch_do_not_mix(format, torch.bfloat16, bad)
    test_kernels.test_deterministic(format, 70, "batch-major", torch.bfloat16)
    test_kernels.check_tiny_numbers(format)
""",
    )


def check_tiny_numbers(format):
    """Dot instructions take numbers below 2**-126 for 0, and leave 0 where a sum falls below it."""
    pattern = random_pattern(format, (40, 50), 0.5)
    x, values = torch.rand(20, 50).bfloat16(), (2**-129 * torch.rand(pattern.values_shape)).bfloat16()
    y = op(pattern, "linear")(x, values, None, *where(pattern))
    exact = x.double() @ pattern.scatter(values).double().t()
    assert (y.double() - exact).abs().max() <= 50 * 2**-126


def test_an_unknown_isa_is_reported():
    result = run("import sparsekern, torch; print(torch.ops.sparsekern.isa_error())", SPARSEKERN_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert "SPARSEKERN_ISA must name an instruction set of this CPU (" in result.stdout
    assert 'got "sse9"' in result.stdout


def run_all(pattern, x, values, bias, grad):
    y = op(pattern, "linear")(x, values, bias, *where(pattern))
    return [y, *op(pattern, "linear_backward")(grad, x, values, *where(pattern), True, True, True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["batch-major", "feature-major"])
@pytest.mark.parametrize("batch", [1, 8, 64, 300])
@pytest.mark.parametrize("format", MASKS)
@pytest.mark.usefixtures("keep_threads")
def test_deterministic(format, batch, layout, dtype):
    pattern = random_pattern(format, (900, 700), 0.1)
    x, grad = (LAYOUTS[layout](torch.randn(batch, size).to(dtype)) for size in (700, 900))
    values, bias = torch.randn(pattern.values_shape).to(dtype), torch.randn(900).to(dtype)
    forward = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        first = run_all(pattern, x, values, bias, grad)
        for _ in range(3):
            again = run_all(pattern, x, values, bias, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{threads} threads"
        forward.append(first[0])
    assert all(torch.equal(forward[0], y) for y in forward), "the forward product depends on the thread count"


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("format", MASKS)
@pytest.mark.usefixtures("keep_threads")
def test_threads(format, threads):
    torch.set_num_threads(threads)
    for case in cases([(333, 129), (130, 1000)], [format], ["batch-major", "feature-major"], sample=3):
        check_products(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 7, 70])
@pytest.mark.parametrize("format", MASKS)
def test_only_the_pattern_is_read(format, batch, dtype):
    """A column of x that W does not use, and a row of grad that it does not use, may hold anything."""
    if parse_format(format).fixed_sparsity is None:
        pattern = random_pattern(format, (60, 150), 0.03)
    else:  # such formats use every row: let all of them use the same columns
        pattern = parse_format(format).from_mask(parse_format(format).prune(torch.rand(150).expand(60, -1)))
    mask = pattern.to_mask()
    unused_inputs, unused_outputs = ~mask.any(0), ~mask.any(1)
    assert unused_inputs.any()
    assert unused_outputs.any() or parse_format(format).fixed_sparsity is not None
    x, grad = torch.randn(batch, 150).to(dtype), torch.randn(batch, 60).to(dtype)
    x[:, unused_inputs] = torch.nan
    grad[:, unused_outputs] = torch.nan
    values, bias = torch.randn(pattern.values_shape).to(dtype), torch.randn(60).to(dtype)
    y, grad_x, grad_values, grad_bias = run_all(pattern, x, values, bias, grad)
    assert y.isfinite().all()
    assert torch.equal(y[:, unused_outputs], bias[unused_outputs].expand(batch, -1))
    assert grad_x.isfinite().all()
    assert not grad_x[:, unused_inputs].any()
    assert grad_values.isfinite().all()
    assert torch.equal(grad_bias.isnan(), unused_outputs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", MASKS)
def test_rows_of_a_batch_do_not_mix(format, dtype, bad):
    pattern = random_pattern(format, (40, 50), 0.5)
    x, grad = torch.randn(70, 50).to(dtype), torch.randn(70, 40).to(dtype)
    x[33], grad[33] = bad, bad
    values = torch.randn(pattern.values_shape).to(dtype)
    y, grad_x, _, _ = run_all(pattern, x, values, None, grad)
    others = torch.arange(70) != 33
    used_outputs, used_inputs = pattern.to_mask().any(1), pattern.to_mask().any(0)
    assert y[others].isfinite().all()
    assert grad_x[others].isfinite().all()
    assert not y[33, used_outputs].isfinite().any()
    assert not grad_x[33, used_inputs].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", MASKS)
def test_results_have_the_layout_of_their_input(format, layout):
    pattern = random_pattern(format, (30, 20), 0.3)
    x, grad = (LAYOUTS[layout](torch.randn(9, size)) for size in (20, 30))
    y, grad_x, _, _ = run_all(pattern, x, torch.randn(pattern.values_shape), None, grad)
    assert y.stride() == ((1, 9) if "feature-major" in layout else (30, 1))
    assert grad_x.stride() == ((1, 9) if "feature-major" in layout else (20, 1))


@pytest.mark.parametrize("format", MASKS)
def test_inputs_are_left_alone(format):
    pattern = random_pattern(format, (90, 130), 0.1)
    inputs = [
        padded(torch.randn(33, 130)),
        torch.randn(pattern.values_shape),
        torch.randn(90),
        torch.randn(33, 90),
    ]
    before = [tensor.clone() for tensor in [*inputs, *pattern.tensors()]]
    run_all(pattern, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, [*inputs, *pattern.tensors()], strict=True))
