"""Bad input raises one clear error that names the argument, what it must be and what it was."""

import os
import subprocess
import sys

import numpy as np
import pytest
import sparsekern as sk
import torch
from cases import MASKS, free, random_pattern
from sparsekern.formats import parse_format
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
        sk.SparseLinear(70, 100, sparsity=sparsity, format=format)
    with raises(message):
        sk.SparseLinear.from_dense(nn.Linear(70, 100), sparsity=sparsity, format=format)
    with raises(message):
        sk.prune(torch.randn(100, 70), sparsity, format)
    with raises(message):
        sk.sparsify(nn.Linear(70, 100), sparsity=sparsity, format=format)


@pytest.mark.parametrize(
    ("format", "fixed"), [(f, parse_format(f).fixed_sparsity) for f in MASKS if free(f, 0.9) is None]
)
def test_another_sparsity_than_the_format_s(format, fixed):
    message = rf"sparsity must be {fixed:.6g} or None, as format '{format}' fixes it, got 0\.9$"
    with raises(message):
        sk.SparseLinear(70, 100, sparsity=0.9, format=format)
    with raises(message):
        sk.SparseLinear.from_dense(nn.Linear(70, 100), sparsity=0.9, format=format)
    with raises(message):
        sk.prune(torch.randn(100, 70), 0.9, format)
    with raises(rf"layer 'fc': {message}"):
        sk.sparsify(nn.ModuleDict({"fc": nn.Linear(70, 100)}), sparsity=0.9, format=format)
    for distribution in ("er", "erk"):
        with raises(f"distribution must be 'uniform' for format '{format}', got '{distribution}'"):
            sk.sparsify(nn.Linear(70, 100), distribution=distribution, format=format)
    assert sk.SparseLinear(70, 100, sparsity=fixed, format=format).format == format


@pytest.mark.parametrize("format", [f for f in MASKS if free(f, 0.9) is not None])
def test_a_sparsity_is_needed(format):
    with raises(r"sparsity must be in \[0, 1\), got None"):
        sk.prune(torch.randn(100, 70), None, format)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 100), "in_features must be at least 1, got 0"),
        ((70, 0), "out_features must be at least 1, got 0"),
        ((-3, 100), "in_features must be at least 1, got -3"),
    ],
)
def test_layer_sizes(sizes, message):
    with raises(message):
        sk.SparseLinear(*sizes)


@pytest.mark.parametrize("size", [70.5, "70", None])
@formats
def test_layer_sizes_that_are_no_integers(format, size):
    with raises(f"in_features must be an integer, got {size!r}", TypeError):
        sk.SparseLinear(size, 100, format=format)
    with raises(f"out_features must be an integer, got {size!r}", TypeError):
        sk.SparseLinear(70, size, format=format)


@pytest.mark.parametrize("format", ["coo", "", "CSR", "5:4", "64:3:8", "2:3:4", "bsr7"])
def test_unknown_format(format):
    message = rf"format must be 'csr', 'bsr<side>' .*, 'N:M' .*, or 'V:2:M' .*, got '{format}'$"
    with raises(message):
        sk.SparseLinear(70, 100, format=format)
    with raises(message):
        sk.SparseLinear.from_dense(nn.Linear(70, 100), sparsity=0.5, format=format)
    with raises(message):
        sk.sparsify(nn.Linear(70, 100), format=format)
    with raises(message):
        sk.prune(torch.randn(100, 70), 0.5, format)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: sk.BSR.from_mask(m, block=(7, 4)), r"block must be .* sides from .*, got \(7, 4\)"),
        (lambda m: sk.BSR.from_mask(m, block=32), r"block must be \(height, width\) .*, got 32"),
        (lambda m: sk.NM.from_mask(m, n=5, m=4), "1 <= n <= m <= 16, got n = 5 and m = 4"),
        (lambda m: sk.NM.from_mask(m, n=2, m=17), "1 <= n <= m <= 16, got n = 2 and m = 17"),
        (lambda m: sk.NM.from_mask(m, n=True, m=4), r"n and m must be integers .*, got n = True and m = 4"),
        (lambda m: sk.VNM.from_mask(m, v=6, n=2, m=8), "v must be a positive multiple of 4, .*got v = 6,"),
        (lambda m: sk.VNM.from_mask(m, v=64, n=3, m=8), "n must be 2, .*n = 3 and"),
        (lambda m: sk.VNM.from_mask(m, v=64, n=2, m=3), r"m an integer in \[4, 256\], got .*m = 3"),
    ],
)
def test_options_that_no_format_has(make, message):
    with raises(message):
        make(torch.ones(100, 70, dtype=torch.bool))


@pytest.mark.parametrize("at", [(0, 0), (17, 11)])
@formats
def test_nan_scores(format, at):
    weight = torch.randn(100, 70)
    weight[at] = torch.nan
    message = f"scores must not hold NaN, got one at flat index {at[0] * 70 + at[1]}"
    with raises(message):
        sk.prune(weight, free(format, 0.5), format)
    dense = nn.Linear(70, 100)
    dense.weight.data = weight
    with raises(message):
        sk.SparseLinear.from_dense(dense, sparsity=free(format, 0.5), format=format)


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        ([[1.0]], TypeError, r"weight must be a torch\.Tensor, got list"),
        (np.ones((100, 70)), TypeError, r"weight must be a torch\.Tensor, got ndarray"),
        (None, TypeError, r"weight must be a torch\.Tensor, got NoneType"),
        (torch.ones(100, 70, dtype=torch.bool), ValueError, r"float64 or integers, got torch\.bool, "),
        (torch.ones(100, 70).to_sparse(), ValueError, r"weight must be a dense .*, torch\.sparse_coo$"),
        (torch.ones(100, 70, dtype=torch.complex64), ValueError, r"float16, .*, got torch\.complex64, "),
        (torch.ones(100, 70).to(torch.float8_e4m3fn), ValueError, r"float16, .*, got torch\.float8_e4m3fn, "),
    ],
    ids=["list", "ndarray", "None", "bool", "sparse", "complex", "float8"],
)
@formats
def test_prune_takes_dense_real_numbers(format, weight, kind, message):
    with raises(message, kind):
        sk.prune(weight, free(format, 0.5), format)
    with raises(message.replace("weight", "scores"), kind):
        parse_format(format).prune(weight, free(format, 0.5))


@pytest.mark.parametrize("sparsity", ["0.5", [0.5], True, torch.tensor(0.5), 0.5j])
@formats
def test_a_sparsity_that_is_no_number(format, sparsity):
    message = r"sparsity must be a number in \[0, 1\), got "
    for call in (
        lambda: sk.prune(torch.randn(100, 70), sparsity, format),
        lambda: sk.SparseLinear(70, 100, sparsity=sparsity, format=format),
        lambda: sk.SparseLinear.from_dense(nn.Linear(70, 100), sparsity=sparsity, format=format),
        lambda: sk.sparsify(nn.Linear(70, 100), sparsity=sparsity, format=format),
    ):
        with raises(message, TypeError):
            call()
    with raises(r"sparsity of '' must be a number in \[0, 1\), got '0\.5'", TypeError):
        sk.sparsify(nn.Linear(70, 100), distribution={"": "0.5"}, format=format)


@pytest.mark.parametrize(
    ("sizes", "format", "parts"),
    [
        ((64, 10), "bsr64", "1 blocks of 64 x 64"),
        ((64, 10), "bsr4x64", "3 blocks of 4 x 64"),
        ((3, 1), "csr", "3 weights"),
    ],
)
def test_a_sparsity_that_keeps_nothing(sizes, format, parts):
    """The default of 0.9, too. An explicit empty mask is no accident."""
    count = int(parts.split()[0])
    message = rf"sparsity must be at most {1 - 1 / count:.9g} to keep one of {parts}, got 0\.9: "
    with raises(message):
        sk.SparseLinear(*sizes, format=format)
    with raises(message):
        sk.SparseLinear.from_dense(nn.Linear(*sizes), sparsity=0.9, format=format)
    with raises(f"layer 'fc': {message}"):
        sk.sparsify(nn.ModuleDict({"fc": nn.Linear(*sizes)}), format=format)
    alive = sk.SparseLinear(*sizes, sparsity=1 - 1 / count, format=format)
    assert alive.mask.any()
    empty = torch.zeros(sizes[::-1], dtype=torch.bool)
    assert not sk.SparseLinear.from_dense(nn.Linear(*sizes), mask=empty, format=format).mask.any()
    alive.set_pattern(empty)
    assert alive(torch.randn(2, sizes[0])).shape == (2, sizes[1])


@pytest.mark.parametrize("shape", [(100,), (2, 3, 4), ()])
@formats
def test_prune_takes_a_matrix(format, shape):
    with raises(r"weight must be a matrix \[out, in\], got shape \["):
        sk.prune(torch.randn(shape), free(format, 0.5), format)


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
        parse_format(format).from_mask(mask)
    with raises(message):
        sk.SparseLinear.from_dense(nn.Linear(4, 3), mask=mask, format=format)
    layer = sk.SparseLinear(4, 3, sparsity=free(format, 0.4), format=format)
    with raises(message):
        layer.set_pattern(mask)


@pytest.mark.parametrize("mask", [[[True]], np.ones((100, 70), dtype=bool), True])
@formats
def test_masks_that_are_no_tensors(format, mask):
    message = rf"mask must be a torch\.Tensor, got {type(mask).__name__}"
    with raises(message, TypeError):
        parse_format(format).from_mask(mask)
    with raises(message, TypeError):
        sk.SparseLinear.from_dense(nn.Linear(70, 100), mask=mask, format=format)
    layer = sk.SparseLinear(70, 100, format=format)
    with raises(message, TypeError):
        layer.set_pattern(mask)


@formats
def test_masks_of_another_shape(format):
    mask = MASKS[format](70, 100, 0.5)
    with raises(r"mask must have shape \[100, 70\], got \[70, 100\]"):
        sk.SparseLinear.from_dense(nn.Linear(70, 100), mask=mask, format=format)
    layer = sk.SparseLinear(70, 100, format=format)
    before = layer.mask
    for pattern in (mask, parse_format(format).from_mask(mask)):
        with raises(r"(mask|pattern) must have shape [\[(]100, 70[\])], got [\[(]70, 100"):
            layer.set_pattern(pattern)
    assert torch.equal(layer.mask, before)


@pytest.mark.parametrize(
    ("format", "changed", "message"),
    [
        ("bsr4", (9, 5), r"constant within each 4 x 4 block, but block \(2, 1\) holds 1 of 16"),
        ("bsr16x8", (99, 69), r"constant within each 16 x 8 block, but block \(6, 8\) holds 1 of 24"),
        ("2:4", (9, 5), r"exactly 2 of each 4 columns, but row 9, group 1 \(columns 4 to 7\) holds"),
        ("5:11", (99, 69), r"exactly 4 of each 4 columns, but row 99, group 6 \(columns 66 to 69\) holds 3"),
        ("4:2:5", (9, 5), r"exactly 2 of each 5 columns, but row 9, group 1 \(columns 5 to 9\) holds"),
    ],
)
def test_masks_that_do_not_fit(format, changed, message):
    """The message says where. CSR takes any mask."""
    mask = MASKS[format](100, 70, 0.0)
    mask[changed] = ~mask[changed]
    layer = sk.SparseLinear(70, 100, sparsity=free(format, 0.5), format=format)
    before = layer.mask
    with raises(message):
        layer.set_pattern(mask)
    assert torch.equal(layer.mask, before)
    with raises(message):
        parse_format(format).from_mask(mask)
    with raises(message):
        sk.SparseLinear.from_dense(nn.Linear(70, 100), mask=mask, format=format)


def test_rows_of_a_tile_that_use_too_many_columns():
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, [0, 1, 8, 9]] = True
    mask[5, 8:] = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    mask[6, 8:] = torch.tensor([0, 0, 0, 0, 1, 0, 0, 1], dtype=torch.bool)
    with raises(
        "at most 4 columns in each 4 x 8 tile, but row tile 1, group 1 "
        r"\(rows 4 to 7, columns 8 to 15\) uses 6"
    ):
        parse_format("4:2:8").from_mask(mask)


@formats
def test_from_dense_arguments(format):
    dense = nn.Linear(70, 100)
    mask = MASKS[format](100, 70, 0.5)
    wrong = [{"sparsity": 0.5, "mask": mask}]
    if free(format, 0.5) is not None:  # the others have a sparsity of their own
        wrong.append({})
    for options in wrong:
        with raises("exactly one of sparsity and mask must be given, got") as caught:
            sk.SparseLinear.from_dense(dense, **options, format=format)
        assert len(str(caught.value)) < 200, "the message prints a whole mask"
    with raises("linear must be .*Linear, got Conv2d", TypeError):
        sk.SparseLinear.from_dense(nn.Conv2d(3, 3, 3), sparsity=free(format, 0.5), format=format)


@formats
def test_gather_and_scatter(format):
    pattern = random_pattern(format, (100, 70), 0.3)
    with raises(r"dense must have shape \[100, 70\], got \[70, 100\]"):
        pattern.gather(torch.randn(70, 100))
    with raises(r"values must have shape \[.*\], got \[.*1"):
        pattern.scatter(torch.randn(*pattern.values_shape, 1))


@formats
def test_a_state_without_its_tensors(format):
    pattern = random_pattern(format, (100, 70), 0.3)
    for name in pattern.state_names:
        state = dict(pattern.state())
        del state[name]
        with raises(name, (ValueError, KeyError)):
            parse_format(format).from_state((100, 70), state)


@formats
def test_set_pattern_takes_its_own_format(format):
    layer = sk.SparseLinear(70, 100, format=format)
    other = "csr" if format != "csr" else "2:4"
    with raises(f"pattern must be of format '{format}', got '{other}'"):
        layer.set_pattern(random_pattern(other, (100, 70), 0.5))


@formats
@pytest.mark.parametrize("make", [lambda v: v.to("meta"), lambda v: v.int(), lambda v: v.cfloat(), list])
def test_set_pattern_takes_values_that_are_numbers(format, make):
    layer = sk.SparseLinear(70, 100, format=format)
    pattern, values = layer.pattern, layer.values.detach().clone()
    with raises("values must be a tensor of floating-point numbers, got"):
        layer.set_pattern(random_pattern(format, (100, 70), 0.5), make(values))
    assert layer.pattern is pattern
    assert torch.equal(layer.values, values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_layers_of_floating_point_numbers(dtype):
    with raises(f"dtype must be one of .*, got {dtype}"):
        sk.SparseLinear(70, 100, dtype=dtype)


# --- linear ---


def arguments(format):
    pattern = random_pattern(format, (100, 70), 0.3)
    while not pattern.nnz:  # one of 100 with few blocks: then there are no values to leave out
        pattern = random_pattern(format, (100, 70), 0.3)
    return {"x": torch.randn(5, 70), "values": torch.randn(pattern.values_shape), "pattern": pattern}


BAD_ARGUMENTS = {
    "x too wide": ({"x": torch.randn(5, 71)}, r"x must have shape \(\.\.\., 70\), got \(5, 71\)"),
    "x transposed": ({"x": torch.randn(70, 5)}, r"x must have shape \(\.\.\., 70\), got \(70, 5\)"),
    "x a number": ({"x": torch.randn(())}, r"x must have shape \(\.\.\., 70\), got \(\)"),
    "x float64": ({"x": torch.randn(5, 70).double()}, r"values must be torch\.float64 .* got torch\.float32"),
    "x bfloat16": (
        {"x": torch.randn(5, 70).bfloat16()},
        r"values must be torch\.bfloat16 .* got torch\.float32",
    ),
    "x integers": (
        {"x": torch.ones(5, 70, dtype=torch.int64)},
        r"must be .*(float|int64).* got torch\.(float32|int64)",
    ),
    "x on meta": ({"x": torch.randn(5, 70, device="meta")}, r"must be .*on meta.* got .*cpu"),
    "values too few": (
        lambda a: {"values": a["values"][:-1]},
        r"values must .*\[\d+[\d, ]*\].* got .*\[\d+[\d, ]*\]",
    ),
    "values too many": (
        lambda a: {"values": torch.randn(10**5)},
        r"values must .*\[\d+[\d, ]*\].* got .*\[100000\]",
    ),
    "values of more dimensions": (
        lambda a: {"values": a["values"][None]},
        r"values must .*\[\d+[\d, ]*\].* got .*\[1, \d+[\d, ]*\]",
    ),
    "values float64": (
        lambda a: {"values": a["values"].double()},
        r"values must be torch\.float32 .* got torch\.float64",
    ),
    "values on meta": (
        lambda a: {"values": a["values"].to("meta")},
        r"values must be .* on cpu.* got .*on meta",
    ),
    "bias too short": ({"bias": torch.randn(99)}, r"bias must .*\[100\].* got .*\[99\]"),
    "bias 2-D": ({"bias": torch.randn(1, 100)}, r"bias must .*\[100\].* got .*\[1, 100\]"),
    "bias float64": ({"bias": torch.randn(100).double()}, r"bias must .*float32.* got .*float64"),
    "bias on meta": (
        {"bias": torch.randn(100, device="meta")},
        r"must .*on cpu.* got .*(meta|another device)",
    ),
    "pattern on meta": (
        lambda a: {"pattern": a["pattern"].to("meta")},
        r"must .*on cpu.* got .*(meta|another device)",
    ),
    "values strided": (
        lambda a: {"values": a["values"].repeat_interleave(2, -1)[..., ::2]},
        "values must be contiguous",
    ),
    "bias strided": ({"bias": torch.randn(200)[::2]}, "bias must be contiguous"),
    "no such backend": ({"backend": "cutlass"}, r"backend must be one of \('auto', .*\), got 'cutlass'"),
}


@pytest.mark.parametrize("backend", ["native", "dense", "reference", "auto"])
@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@formats
def test_linear(format, name, backend):
    good = {**arguments(format), "backend": backend}
    change, message = BAD_ARGUMENTS[name]
    if backend != "native" and name.endswith("strided"):
        return  # torch's own matmul takes any strides, and auto may choose it
    bad = {**good, **(change(good) if callable(change) else change)}
    # The arguments of the native kernels are checked once, in C++, whose errors are RuntimeErrors.
    with raises(message, (ValueError, RuntimeError)):
        sk.linear(**bad)
    assert sk.linear(**good).shape == (5, 100)


# --- SPARSEKERN_CHECK=1 ---


@formats
def test_index_tensors_that_were_written_to(format, monkeypatch):
    from sparsekern import ops

    good = arguments(format)
    monkeypatch.setattr(ops, "CHECK", True)
    y = sk.linear(**good)
    for i in range(len(good["pattern"].tensors())):
        pattern = good["pattern"].to("cpu")._map(torch.clone)
        pattern.tensors()[i].view(torch.uint8).view(-1)[0] ^= 1
        with raises("must"):
            sk.linear(**{**good, "pattern": pattern})
    assert torch.equal(sk.linear(**good), y)


@pytest.mark.parametrize(("setting", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_setting_of_the_check(setting, on):
    env = {name: value for name, value in os.environ.items() if name != "SPARSEKERN_CHECK"}
    env |= {} if setting is None else {"SPARSEKERN_CHECK": setting}
    code = "from sparsekern import ops; print(ops.CHECK)"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(on)
