"""A corrupted ``state_dict`` is refused: the error names what is wrong, and the layer stays as it was."""

import copy
import io

import pytest
import sparsekern as sk
import torch
from cases import MASKS, free
from layers import assert_equal_layers, detached, make_layer
from torch import nn

formats = pytest.mark.parametrize("format", MASKS)


def corrupted(name, change):
    def corrupt(state):
        state[name] = change(state[name].clone())

    return corrupt


def put(index, number):
    def change(tensor):
        tensor[index] = number
        return tensor

    return change


def removed(name):
    def corrupt(state):
        del state[name]

    return corrupt


CSR_CORRUPTIONS = {
    "column too large": (
        corrupted("col_idx", put(5, 70)),
        r"col_idx must be in \[0, 70\), got values from \d to 70",
    ),
    "column negative": (
        corrupted("col_idx", put(5, -1)),
        r"col_idx must be in \[0, 70\), got values from -1 to",
    ),
    "column huge": (
        corrupted("col_idx", put(0, 2**31 - 1)),
        r"col_idx must be in .* got values from \d to 2147483647",
    ),
    "columns unsorted": (
        corrupted("col_idx", lambda t: t.flip(0)),
        "col_idx must ascend strictly within each row",
    ),
    "columns repeated": (
        corrupted("col_idx", torch.zeros_like),
        "col_idx must ascend strictly within each row",
    ),
    "columns truncated": (
        corrupted("col_idx", lambda t: t[:-1]),
        "row_ptr must run from 0 to nnz = 179, got 0 to 180",
    ),
    "columns int64": (
        corrupted("col_idx", torch.Tensor.long),
        r"col_idx must be int32 \[nnz\], got torch.int64 \[180\]",
    ),
    "columns float": (
        corrupted("col_idx", torch.Tensor.float),
        r"col_idx must be int32 \[nnz\], got torch.float32",
    ),
    "columns 2-D": (
        corrupted("col_idx", lambda t: t[None]),
        r"col_idx must be int32 \[nnz\], got torch.int32 \[1, 180\]",
    ),
    "columns empty": (
        corrupted("col_idx", lambda t: t[:0]),
        "row_ptr must run from 0 to nnz = 0, got 0 to 180",
    ),
    "rows overflow": (
        corrupted("row_ptr", lambda t: put(2, -2 * 10**9)(put(1, 2 * 10**9)(t))),
        "row_ptr must not decrease",
    ),
    "rows decrease": (
        corrupted("row_ptr", put(3, 10**6)),
        "row_ptr must not decrease, got a decrease after row 3",
    ),
    "rows start late": (
        corrupted("row_ptr", put(0, 1)),
        "row_ptr must run from 0 to nnz = 180, got 1 to 180",
    ),
    "rows end late": (
        corrupted("row_ptr", put(-1, 181)),
        "row_ptr must run from 0 to nnz = 180, got 0 to 181",
    ),
    "rows truncated": (
        corrupted("row_ptr", lambda t: t[:-1]),
        r"row_ptr must have out_features \+ 1 = 101 elements, got 100",
    ),
    "rows int64": (
        corrupted("row_ptr", torch.Tensor.long),
        r"row_ptr must be int32 \[101\], got torch.int64 \[101\]",
    ),
    "rows missing": (removed("row_ptr"), r'Missing key.*"row_ptr"'),
    "columns missing": (removed("col_idx"), r'Missing key.*"col_idx"'),
}
CORRUPTIONS = {
    "values truncated": (
        corrupted("values", lambda t: t[:-1]),
        r"values must have shape \[180\], got \[179\]",
    ),
    "values 2-D": (corrupted("values", lambda t: t[None]), r"values must have shape \[180\], got \[1, 180\]"),
    "values missing": (removed("values"), r'Missing key.*"values"'),
    "values no tensor": (lambda s: s.update(values=[1.0]), r"values must be a dense torch.Tensor, got list"),
    "values sparse": (
        lambda s: s.update(values=s["values"].to_sparse()),
        r"values must be a dense torch.Tensor, got a torch.sparse_coo one",
    ),
    "values bool": (
        lambda s: s.update(values=s["values"] > 0),
        r"values must be floating-point numbers, got torch.bool",
    ),
}
ALL = [
    *(pytest.param("csr", *case, id=name) for name, case in CSR_CORRUPTIONS.items()),
    *(
        pytest.param(format, *case, id=f"{format} {name}")
        for format in MASKS
        for name, case in CORRUPTIONS.items()
    ),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("sparsity", [0.7, 0.5], ids=["equal nnz", "other nnz"])
@pytest.mark.parametrize(("format", "corrupt", "message"), ALL)
def test_corrupted_state_is_refused(format, corrupt, message, sparsity, assign):
    state = detached(make_layer(format).state_dict())
    corrupt(state)
    layer = make_layer(format, sparsity)
    before, parameters = copy.deepcopy(layer), list(layer.parameters())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, assign=assign)
    assert_equal_layers(layer, before)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True)), (
        "parameters were replaced"
    )


@formats
def test_the_error_names_the_layer(format):
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"up": make_layer(format)}))
    state = detached(model.state_dict())
    state["1.up.values"] = state["1.up.values"][:-1]
    with pytest.raises(RuntimeError, match=r"1\.up\.(pattern|values)"):
        model.load_state_dict(state)


@formats
def test_a_dense_checkpoint_is_refused(format):
    layer = make_layer(format)
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r'Missing key.*"values"(.|\n)*Unexpected key.*"weight"'):
        layer.load_state_dict(nn.Linear(70, 100, bias=False).state_dict())
    assert_equal_layers(layer, before)


@formats
def test_another_shape_is_refused(format):
    layer = make_layer(format)
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="must"):
        layer.load_state_dict(sk.SparseLinear(70, 101, sparsity=free(format, 0.7), format=format).state_dict())
    with pytest.raises(RuntimeError, match="must"):
        layer.load_state_dict(sk.SparseLinear(200, 100, sparsity=free(format, 0.7), format=format).state_dict())
    assert_equal_layers(layer, before)


@formats
def test_the_callers_dict_is_left_alone(format):
    state = make_layer(format).state_dict()
    names = list(state)
    make_layer(format, 0.9).load_state_dict(state)
    assert list(state) == names
    state["values"] = state["values"][:-1]
    with pytest.raises(RuntimeError):
        make_layer(format).load_state_dict(state)
    assert list(state) == names


def test_a_truncated_file_is_refused():
    file = io.BytesIO()
    torch.save(make_layer().state_dict(), file)
    half = io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises((RuntimeError, EOFError), match=r"\w"):
        torch.load(half, weights_only=True)
