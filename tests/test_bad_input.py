"""Bad input raises one clear error that names the argument, what it must be and what it was."""

import numpy as np
import pytest
import sparsekern as sk
import torch
from cases import MASKS, random_pattern
from sparsekern.formats import pattern_type
from torch import nn

formats = pytest.mark.parametrize("format", MASKS)
sparsities = pytest.mark.parametrize(
    "sparsity", [1, 1.0, 1.5, -0.1, float("nan"), float("inf"), -float("inf")]
)


def raises(message, kind=ValueError):
    return pytest.raises(kind, match=message)


# --- layers and masks ---


@sparsities
@formats
def test_sparsity_outside_the_range(format, sparsity):
    message = rf"sparsity must be in \[0, 1\), got {sparsity}"
    with raises(message):
        sk.SparseLinear(20, 30, sparsity=sparsity, format=format)
    with raises(message):
        sk.SparseLinear.from_dense(nn.Linear(20, 30), sparsity=sparsity, format=format)
    with raises(message):
        sk.prune(torch.randn(30, 20), sparsity, format)
    with raises(message):
        sk.sparsify(nn.Linear(20, 30), sparsity=sparsity, format=format)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 30), "in_features must be at least 1, got 0"),
        ((20, 0), "out_features must be at least 1, got 0"),
        ((-3, 30), "in_features must be at least 1, got -3"),
    ],
)
def test_layer_sizes(sizes, message):
    with raises(message):
        sk.SparseLinear(*sizes)


@pytest.mark.parametrize("format", ["coo", "", "CSR", "2:3:4"])
def test_unknown_format(format):
    message = rf"format must be one of \[.*'csr'.*\], got '{format}'"
    with raises(message):
        sk.SparseLinear(20, 30, format=format)
    with raises(message):
        sk.SparseLinear.from_dense(nn.Linear(20, 30), sparsity=0.5, format=format)
    with raises(message):
        sk.prune(torch.randn(30, 20), 0.5, format)


@pytest.mark.parametrize("at", [(0, 0), (17, 11)])
@formats
def test_nan_scores(format, at):
    weight = torch.randn(30, 20)
    weight[at] = torch.nan
    message = f"scores must not hold NaN, got one at flat index {at[0] * 20 + at[1]}"
    with raises(message):
        sk.prune(weight, 0.5, format)
    dense = nn.Linear(20, 30)
    dense.weight.data = weight
    with raises(message):
        sk.SparseLinear.from_dense(dense, sparsity=0.5, format=format)


@pytest.mark.parametrize("shape", [(30,), (2, 3, 4), ()])
@formats
def test_prune_takes_a_matrix(format, shape):
    with raises(r"weight must be a matrix \[out, in\], got shape \["):
        sk.prune(torch.randn(shape), 0.5, format)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 4), r"mask must be a dense bool tensor \[out, in\], got torch.float32 \[3, 4\]"),
        (torch.ones(3, 4, dtype=torch.uint8), r"mask must be .* bool .*, got torch.uint8 \[3, 4\]"),
        (torch.ones(12, dtype=torch.bool), r"mask must be .* \[out, in\], got torch.bool \[12\]"),
        (torch.ones(1, 3, 4, dtype=torch.bool), r"mask must be .* \[out, in\], got torch.bool \[1, 3, 4\]"),
        (torch.ones(3, 4, dtype=torch.bool).to_sparse(), "mask must be a dense bool tensor"),
    ],
)
@formats
def test_masks_of_another_kind(format, mask, message):
    with raises(message):
        pattern_type(format).from_mask(mask)
    with raises("mask must|mask must have shape"):
        sk.SparseLinear.from_dense(nn.Linear(4, 3), mask=mask, format=format)
    with raises("must"):
        sk.SparseLinear(4, 3, format=format, sparsity=0.5).set_pattern(mask)


@pytest.mark.parametrize("mask", [[[True]], np.ones((30, 20), dtype=bool), True])
@formats
def test_masks_that_are_no_tensors(format, mask):
    message = rf"mask must be a torch\.Tensor, got {type(mask).__name__}"
    with raises(message, TypeError):
        pattern_type(format).from_mask(mask)
    with raises(message, TypeError):
        sk.SparseLinear.from_dense(nn.Linear(20, 30), mask=mask, format=format)
    with raises(rf"must be .*, got {type(mask).__name__}", TypeError):
        sk.SparseLinear(20, 30, format=format).set_pattern(mask)


@formats
def test_masks_of_another_shape(format):
    mask = torch.ones(20, 30, dtype=torch.bool)
    with raises(r"mask must have shape \[30, 20\], got \[20, 30\]"):
        sk.SparseLinear.from_dense(nn.Linear(20, 30), mask=mask, format=format)
    layer = sk.SparseLinear(20, 30, format=format)
    before = layer.mask
    for pattern in (mask, pattern_type(format).from_mask(mask)):
        with raises(r"(mask|pattern) must have shape [\[(]30, 20[\])], got [\[(]20, 30"):
            layer.set_pattern(pattern)
    assert torch.equal(layer.mask, before)


@formats
def test_from_dense_arguments(format):
    dense = nn.Linear(20, 30)
    mask = torch.ones(30, 20, dtype=torch.bool)
    for options in ({}, {"sparsity": 0.5, "mask": mask}):
        with raises("exactly one of sparsity and mask must be given, got") as caught:
            sk.SparseLinear.from_dense(dense, **options, format=format)
        assert len(str(caught.value)) < 200, "the message prints a whole mask"
    with raises("linear must be .*Linear, got Conv2d", TypeError):
        sk.SparseLinear.from_dense(nn.Conv2d(3, 3, 3), sparsity=0.5, format=format)


@formats
def test_gather_and_scatter(format):
    pattern = random_pattern(format, (30, 20), 0.3)
    with raises(r"dense must have shape \[30, 20\], got \[20, 30\]"):
        pattern.gather(torch.randn(20, 30))
    with raises(r"values must have shape \[.*\], got \[.*1"):
        pattern.scatter(torch.randn(*pattern.values_shape, 1))


def test_a_state_without_its_tensors():
    with raises(r"col_idx", (ValueError, KeyError)):
        sk.CSR.from_state((30, 20), {"row_ptr": torch.zeros(31, dtype=torch.int32)})


# --- linear ---


def arguments(format):
    pattern = random_pattern(format, (30, 20), 0.3)
    return {"x": torch.randn(5, 20), "values": torch.randn(pattern.values_shape), "pattern": pattern}


BAD_ARGUMENTS = {
    "x too wide": ({"x": torch.randn(5, 21)}, r"x must have shape \(\.\.\., 20\), got \(5, 21\)"),
    "x transposed": ({"x": torch.randn(20, 5)}, r"x must have shape \(\.\.\., 20\), got \(20, 5\)"),
    "x a number": ({"x": torch.randn(())}, r"x must have shape \(\.\.\., 20\), got \(\)"),
    "x float64": ({"x": torch.randn(5, 20).double()}, r"values must be torch\.float64 .* got torch\.float32"),
    "x bfloat16": (
        {"x": torch.randn(5, 20).bfloat16()},
        r"values must be torch\.bfloat16 .* got torch\.float32",
    ),
    "x integers": (
        {"x": torch.ones(5, 20, dtype=torch.int64)},
        r"must be .*(float|int64).* got torch\.(float32|int64)",
    ),
    "x on meta": ({"x": torch.randn(5, 20, device="meta")}, r"must be .*on meta.* got .*cpu"),
    "values too few": (lambda a: {"values": a["values"][:-1]}, r"values must .*\[\d+\].* got .*\[\d+\]"),
    "values too many": (
        lambda a: {"values": torch.randn(10**5)},
        r"values must .*\[\d+\].* got .*\[100000\]",
    ),
    "values 2-D": (lambda a: {"values": a["values"][None]}, r"values must .*\[\d+\].* got .*\[1, \d+\]"),
    "values float64": (
        lambda a: {"values": a["values"].double()},
        r"values must be torch\.float32 .* got torch\.float64",
    ),
    "values on meta": (
        lambda a: {"values": a["values"].to("meta")},
        r"values must be .* on cpu.* got .*on meta",
    ),
    "bias too short": ({"bias": torch.randn(29)}, r"bias must .*\[30\].* got .*\[29\]"),
    "bias 2-D": ({"bias": torch.randn(1, 30)}, r"bias must .*\[30\].* got .*\[1, 30\]"),
    "bias float64": ({"bias": torch.randn(30).double()}, r"bias must .*float32.* got .*float64"),
    "bias on meta": (
        {"bias": torch.randn(30, device="meta")},
        r"must .*on cpu.* got .*(meta|another device)",
    ),
    "pattern on meta": (
        lambda a: {"pattern": a["pattern"].to("meta")},
        r"must .*on cpu.* got .*(meta|another device)",
    ),
    "values strided": (
        lambda a: {"values": a["values"].repeat_interleave(2)[::2]},
        "values must be contiguous",
    ),
    "bias strided": ({"bias": torch.randn(60)[::2]}, "bias must be contiguous"),
    "no such backend": ({"backend": "cutlass"}, r"backend must be one of \('auto', .*\), got 'cutlass'"),
}


@pytest.mark.parametrize("backend", ["native", "reference", "auto"])
@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@formats
def test_linear(format, name, backend):
    good = {**arguments(format), "backend": backend}
    change, message = BAD_ARGUMENTS[name]
    if backend == "reference" and name.endswith("strided"):
        return  # torch's own matmul takes any strides
    bad = {**good, **(change(good) if callable(change) else change)}
    # The arguments of the native kernels are checked once, in C++, whose errors are RuntimeErrors.
    with raises(message, (ValueError, RuntimeError)):
        sk.linear(**bad)
    assert sk.linear(**good).shape == (5, 30)
