"""A corrupted ``state_dict`` is refused: the error names what is wrong, and the layer stays as it was."""

import copy
import io

import pytest
import sparsekern as sk
import torch
from cases import MASKS, free
from layers import assert_equal_layers, detached, make_layer
from sparsekern.formats import parse_format
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
        r"col_idx must be in \[0, 70\), got values from \d+ to 70",
    ),
    "column negative": (
        corrupted("col_idx", put(5, -1)),
        r"col_idx must be in \[0, 70\), got values from -1 to",
    ),
    "column huge": (
        corrupted("col_idx", put(0, 2**31 - 1)),
        r"col_idx must be in .* got values from \d+ to 2147483647",
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
        "row_ptr must run from 0 to nnz = 2099, got 0 to 2100",
    ),
    "columns int64": (
        corrupted("col_idx", torch.Tensor.long),
        r"col_idx must be int32 \[nnz\], got torch.int64 \[2100\]",
    ),
    "columns float": (
        corrupted("col_idx", torch.Tensor.float),
        r"col_idx must be int32 \[nnz\], got torch.float32",
    ),
    "columns 2-D": (
        corrupted("col_idx", lambda t: t[None]),
        r"col_idx must be int32 \[nnz\], got torch.int32 \[1, 2100\]",
    ),
    "columns empty": (
        corrupted("col_idx", lambda t: t[:0]),
        "row_ptr must run from 0 to nnz = 0, got 0 to 2100",
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
        "row_ptr must run from 0 to nnz = 2100, got 1 to 2100",
    ),
    "rows end late": (
        corrupted("row_ptr", put(-1, 2101)),
        "row_ptr must run from 0 to nnz = 2100, got 0 to 2101",
    ),
    "rows truncated": (
        corrupted("row_ptr", lambda t: t[:-1]),
        r"row_ptr must be int32 \[101\], got torch.int32 \[100\]",
    ),
    "rows int64": (
        corrupted("row_ptr", torch.Tensor.long),
        r"row_ptr must be int32 \[101\], got torch.int64 \[101\]",
    ),
    "rows missing": (removed("row_ptr"), r'Missing key.*"row_ptr"'),
    "columns missing": (removed("col_idx"), r'Missing key.*"col_idx"'),
}
BSR_CORRUPTIONS = {  # of blocks of 16 x 8, of which W [100, 70] has 7 x 9
    "block column too large": (
        corrupted("block_col_idx", put(5, 9)),
        r"block_col_idx must be in \[0, 9\), got values from \d to 9",
    ),
    "block column negative": (
        corrupted("block_col_idx", put(5, -1)),
        r"block_col_idx must be in \[0, 9\), got values from -1 to",
    ),
    "block columns unsorted": (
        corrupted("block_col_idx", lambda t: t.flip(0)),
        "block_col_idx must ascend strictly within each row",
    ),
    "block columns repeated": (
        corrupted("block_col_idx", torch.zeros_like),
        "block_col_idx must ascend strictly within each row",
    ),
    "block columns truncated": (
        corrupted("block_col_idx", lambda t: t[:-1]),
        "block_row_ptr must run from 0 to blocks = 18, got 0 to 19",
    ),
    "block columns int64": (
        corrupted("block_col_idx", torch.Tensor.long),
        r"block_col_idx must be int32 \[blocks\], got torch.int64 \[19\]",
    ),
    "block columns 2-D": (
        corrupted("block_col_idx", lambda t: t[None]),
        r"block_col_idx must be int32 \[blocks\], got torch.int32 \[1, 19\]",
    ),
    "block rows overflow": (
        corrupted("block_row_ptr", lambda t: put(2, -2 * 10**9)(put(1, 2 * 10**9)(t))),
        "block_row_ptr must not decrease",
    ),
    "block rows decrease": (
        corrupted("block_row_ptr", put(3, 10**6)),
        "block_row_ptr must not decrease, got a decrease after row 3",
    ),
    "block rows start late": (
        corrupted("block_row_ptr", put(0, 1)),
        "block_row_ptr must run from 0 to blocks = 19, got 1 to 19",
    ),
    "block rows end late": (
        corrupted("block_row_ptr", put(-1, 20)),
        "block_row_ptr must run from 0 to blocks = 19, got 0 to 20",
    ),
    "block rows of elements": (
        corrupted("block_row_ptr", lambda t: t.repeat_interleave(16)),
        r"block_row_ptr must be int32 \[8\], got torch.int32 \[128\]",
    ),
    "block rows int64": (
        corrupted("block_row_ptr", torch.Tensor.long),
        r"block_row_ptr must be int32 \[8\], got torch.int64 \[8\]",
    ),
    "blocks transposed": (
        corrupted("values", lambda t: t.transpose(1, 2)),
        r"values must have shape \[19, 16, 8\], got \[19, 8, 16\]",
    ),
    "block rows missing": (removed("block_row_ptr"), r'Missing key.*"block_row_ptr"'),
    "block columns missing": (removed("block_col_idx"), r'Missing key.*"block_col_idx"'),
}
NM_CORRUPTIONS = {
    "position too large": (
        corrupted("index", put((7, 1), 4)),
        r"index must ascend strictly in \[0, 4\) within each group, but row 7, group 0 holds \[\d, 4\]",
    ),
    "position huge": (
        corrupted("index", put((7, 3), 255)),
        r"index must ascend strictly in \[0, 4\) .*, but row 7, group 1 holds \[\d, 255\]",
    ),
    "position beyond the edge": (
        corrupted("index", put((99, -1), 2)),
        r"index must ascend strictly in \[0, 2\) .*, but row 99, group 17 holds \[0, 2\]",
    ),
    "positions unsorted": (
        corrupted("index", lambda t: t.flip(1)),
        r"index must ascend strictly in .*, but row 0, group 0 holds \[1, 0\]",
    ),
    "positions repeated": (
        corrupted("index", torch.zeros_like),
        r"index must ascend strictly in .*, but row 0, group 0 holds \[0, 0\]",
    ),
    "rows truncated": (
        corrupted("index", lambda t: t[:-1]),
        r"index must be uint8 \[100, 36\], got torch.uint8 \[99, 36\]",
    ),
    "columns truncated": (
        corrupted("index", lambda t: t[:, :-1]),
        r"index must be uint8 \[100, 36\], got torch.uint8 \[100, 35\]",
    ),
    "positions flat": (
        corrupted("index", lambda t: t.view(-1)),
        r"index must be uint8 \[100, 36\], got torch.uint8 \[3600\]",
    ),
    "positions int64": (
        corrupted("index", torch.Tensor.long),
        r"index must be uint8 \[100, 36\], got torch.int64 \[100, 36\]",
    ),
    "positions bool": (
        corrupted("index", torch.Tensor.bool),
        r"index must be uint8 \[100, 36\], got torch.bool \[100, 36\]",
    ),
    "positions missing": (removed("index"), r'Missing key.*"index"'),
}
VNM_CORRUPTIONS = {
    "column too large": (
        corrupted("columns", put((1, 3, 3), 8)),
        r"columns must ascend strictly in \[0, 8\) .*, but row tile 1, group 3 holds \[.*, 8\]",
    ),
    "column beyond the edge": (
        corrupted("columns", put((1, 8, 3), 6)),
        r"columns must ascend strictly in \[0, 6\) .*, but row tile 1, group 8 holds \[.*, 6\]",
    ),
    "columns unsorted": (
        corrupted("columns", lambda t: t.flip(2)),
        "columns must ascend strictly in .*, but row tile 0, group 0 holds",
    ),
    "columns repeated": (
        corrupted("columns", torch.zeros_like),
        r"columns must ascend strictly in .*, but row tile 0, group 0 holds \[0, 0, 0, 0\]",
    ),
    "columns truncated": (
        corrupted("columns", lambda t: t[:-1]),
        r"columns must be uint8 \[2, 9, 4\], got torch.uint8 \[1, 9, 4\]",
    ),
    "columns too few": (
        corrupted("columns", lambda t: t[..., :2]),
        r"columns must be uint8 \[2, 9, 4\], got torch.uint8 \[2, 9, 2\]",
    ),
    "columns int32": (
        corrupted("columns", torch.Tensor.int),
        r"columns must be uint8 \[2, 9, 4\], got torch.int32 \[2, 9, 4\]",
    ),
    "position too large": (
        corrupted("index", put((7, 1), 4)),
        r"index must ascend strictly in \[0, 4\) within each group, but row 7, group 0 holds \[\d, 4\]",
    ),
    "positions unsorted": (
        corrupted("index", lambda t: t.flip(1)),
        "index must ascend strictly in .*, but row 0, group 0 holds",
    ),
    "positions repeated": (
        corrupted("index", torch.zeros_like),
        r"index must ascend strictly in .*, but row 0, group 0 holds \[0, 0\]",
    ),
    "rows truncated": (
        corrupted("index", lambda t: t[:-1]),
        r"index must be uint8 \[100, 18\], got torch.uint8 \[99, 18\]",
    ),
    "positions int64": (
        corrupted("index", torch.Tensor.long),
        r"index must be uint8 \[100, 18\], got torch.int64 \[100, 18\]",
    ),
    "columns missing": (removed("columns"), r'Missing key.*"columns"'),
    "positions missing": (removed("index"), r'Missing key.*"index"'),
}
CORRUPTIONS = {
    "values truncated": (
        corrupted("values", lambda t: t[:-1]),
        r"values must have shape \[\d+[\d, ]*\], got \[\d+[\d, ]*\]",
    ),
    "values of more dimensions": (
        corrupted("values", lambda t: t[None]),
        r"values must have shape \[\d+[\d, ]*\], got \[1, \d+[\d, ]*\]",
    ),
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
    "shape of another W": (
        corrupted("shape", put(0, 99)),
        r"shape must be \[100, 70\], got \[99, 70\]",
    ),
    "shape transposed": (
        corrupted("shape", lambda t: t.flip(0)),
        r"shape must be \[100, 70\], got \[70, 100\]",
    ),
    "shape int32": (
        corrupted("shape", torch.Tensor.int),
        r"shape must be int64 \[2\], got torch.int32 \[2\]",
    ),
    "shape of more sizes": (
        corrupted("shape", lambda t: t.repeat(2)),
        r"shape must be int64 \[2\], got torch.int64 \[4\]",
    ),
    "shape a tuple": (
        lambda s: s.update(shape=(100, 70)),
        r"shape must be a dense torch.Tensor, got tuple",
    ),
    "shape missing": (removed("shape"), r'Missing key.*"shape"'),
}
INDEX_CORRUPTIONS = {
    "csr": CSR_CORRUPTIONS,
    "bsr16x8": BSR_CORRUPTIONS,
    "2:4": NM_CORRUPTIONS,
    "64:2:8": VNM_CORRUPTIONS,
}
ALL = [
    pytest.param(format, sparsity, *case, id=f"{format} {name}, {nnz} nnz")
    for format in MASKS
    for name, case in {**INDEX_CORRUPTIONS.get(format, {}), **CORRUPTIONS}.items()
    for nnz, sparsity in (("equal", 0.7), ("other", 0.5))
    if nnz == "equal" or free(format, sparsity) is not None
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("format", "sparsity", "corrupt", "message"), ALL)
def test_corrupted_state_is_refused(format, sparsity, corrupt, message, assign):
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


@pytest.mark.parametrize("shape", [(150, 100), (70, 50), (70, 150)], ids=str)
@formats
def test_another_shape_is_refused(format, shape):
    layer = make_layer(format)
    before = copy.deepcopy(layer)
    other = sk.SparseLinear(*shape, sparsity=free(format, 0.5), format=format)
    with pytest.raises(RuntimeError, match="must"):
        layer.load_state_dict(other.state_dict())
    assert_equal_layers(layer, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("number", [1.0, float("nan")])
@pytest.mark.parametrize("format", [f for f in MASKS if f.startswith("bsr")])
def test_values_past_the_edge_are_refused(format, number, assign):
    """Where W [97, 66] ends, so that blocks of every size reach past it."""
    layer = sk.SparseLinear(66, 97, sparsity=0.0, format=format)
    before, state = layer.values.detach().clone(), detached(layer.state_dict())
    padding = layer.pattern.flat_index() == 66 * 97
    padded = int(padding.sum())
    state["values"][padding] = number
    message = rf"values must be 0 past the edge of W \[97, 66\], got others in {padded} places"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer.values, before)
    state["values"][padding] = -0.0
    layer.load_state_dict(state, assign=assign)


@pytest.mark.parametrize(
    ("format", "source", "target"),
    [
        ("bsr4", (67, 98), (66, 97)),
        ("csr", (64, 30), (100, 30)),
        ("2:4", (62, 30), (64, 30)),
        ("64:2:8", (62, 64), (63, 64)),
    ],
)
def test_a_shape_that_the_index_fits_is_refused(format, source, target):
    """As nn.Linear refuses it: only the shape tells."""
    layer = sk.SparseLinear(*target, False, sparsity=free(format, 0.5), format=format)
    other = sk.SparseLinear(*source, False, sparsity=free(format, 0.5), format=format)
    state = other.state_dict()
    index = {name: state[name] for name in other.pattern.state_names}
    parse_format(format).from_state(target[::-1], index)
    before = layer.to_dense().weight
    message = rf"shape must be \[{target[1]}, {target[0]}\], got \[{source[1]}, {source[0]}\]"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=strict)
    assert torch.equal(layer.to_dense().weight, before)


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
    with pytest.raises((RuntimeError, EOFError, ValueError), match=r"\w"):  # torch's own
        torch.load(half, weights_only=True)
