"""CSR patterns: what is derived from them, and that bad ones are refused whatever is wrong with them."""

import copy
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sparsekern import CSR
from sparsekern.formats.csr import Transposed, row_index, tile_width


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@st.composite
def patterns(draw, largest=(300, 3000)):
    """A few positions, which may share rows, columns and tiles, in a matrix of several tiles."""
    shape = tuple(draw(st.integers(0, side)) for side in largest)
    size = shape[0] * shape[1]
    positions = draw(st.sets(st.integers(0, size - 1), max_size=60)) if size else set()
    return CSR.from_flat_index(shape, torch.tensor(sorted(positions), dtype=torch.int64))


def check_tiles(tile_ptr, row_ptr, cols, n_cols):
    """What csr.h says of tile_ptr."""
    tiles, rows = tile_ptr.shape[0] - 1, tile_ptr.shape[1]
    assert tile_ptr.dtype == torch.int32
    assert tile_ptr.is_contiguous()
    assert rows == row_ptr.numel() - 1
    width = 128
    while -(-n_cols // width) > tiles:
        width *= 2
    assert max(1, -(-n_cols // width)) == tiles
    assert torch.equal(tile_ptr[0], row_ptr[:-1])
    assert torch.equal(tile_ptr[-1], row_ptr[1:])
    for t in range(tiles):
        for r in range(rows):
            entries = cols[tile_ptr[t, r] : tile_ptr[t + 1, r]]
            assert tile_ptr[t, r] <= tile_ptr[t + 1, r]
            assert ((entries >= t * width) & (entries < (t + 1) * width)).all()


@given(patterns())
def test_tiles_cut_rows_and_columns(pattern):
    transposed = CSR.from_mask(pattern.to_mask().t())
    tiles, others = pattern.derived, transposed.derived
    check_tiles(tiles.tile_ptr, pattern.row_ptr, pattern.col_idx, pattern.shape[1])
    check_tiles(tiles.t_tile_ptr, transposed.row_ptr, transposed.col_idx, pattern.shape[0])
    assert torch.equal(others.tile_ptr, tiles.t_tile_ptr)
    assert torch.equal(others.t_tile_ptr, tiles.tile_ptr)


@pytest.mark.parametrize(("in_features", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_columns_are_as_short_as_they_can_be(in_features, dtype):
    flat = torch.tensor([0, in_features - 1, in_features, 2 * in_features - 1])
    pattern = CSR.from_flat_index((2, in_features), flat)
    assert pattern.derived.columns.dtype == dtype
    assert pattern.derived.columns.tolist() == pattern.col_idx.tolist() == [0, in_features - 1] * 2


@given(patterns())
def test_columns_are_those_of_the_index(pattern):
    assert torch.equal(pattern.derived.columns.int(), pattern.col_idx)


@given(patterns())
def test_slots_of_the_transposed_entries(pattern):
    """Sorted by column tile, row tile, column and row."""
    width, t_width = tile_width(*pattern.shape, pattern.nnz), tile_width(*pattern.shape[::-1], pattern.nnz)
    rows = row_index(pattern.row_ptr, pattern.nnz)
    entries = zip(rows.tolist(), pattern.col_idx.tolist(), strict=True)
    keys = [(column // width, row // t_width, column, row) for row, column in entries]
    order = sorted(range(pattern.nnz), key=keys.__getitem__)
    assert pattern.derived.t_slot.dtype == torch.int32
    assert pattern.derived.t_slot[order].tolist() == list(range(pattern.nnz))


@given(patterns())
def test_the_transposed_index_of_gpus(pattern):
    index = Transposed.build(pattern.shape, pattern.row_ptr, pattern.col_idx)
    transposed = CSR.from_mask(pattern.to_mask().t())
    assert torch.equal(index.t_row_ptr, transposed.row_ptr)
    assert torch.equal(index.t_col_idx, transposed.col_idx)
    position = torch.arange(pattern.shape[0] * pattern.shape[1]).view(pattern.shape)
    slots = index.t_slot.long()
    assert torch.equal(pattern.gather(position)[slots], transposed.gather(position.t()))
    assert {tensor.dtype for tensor in index.tensors()} == {torch.int32}


def test_what_a_device_needs_is_derived_when_a_pattern_comes_to_it():
    pattern = CSR.from_mask(torch.rand(30, 20) < 0.3)
    stranger = copy.copy(pattern)
    stranger.derived = Transposed.build(pattern.shape, pattern.row_ptr, pattern.col_idx)
    for arrived in (stranger.to("cpu"), pickle.loads(pickle.dumps(stranger)), copy.deepcopy(stranger)):
        found, built = arrived.derived.tensors(), pattern.derived.tensors()
        assert all(torch.equal(a, b) for a, b in zip(found, built, strict=True))
    assert isinstance(stranger.to("meta").derived, Transposed), "there is nothing to derive from"


@given(patterns())
def test_tiles_without_the_native_kernels(pattern):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekern.formats.csr.has_kernel", lambda *_: False)
        other = CSR(pattern.shape, pattern.row_ptr, pattern.col_idx)
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), other.tensors(), strict=True))


@given(patterns())
def test_all_constructors_agree(pattern):
    same = [
        CSR.from_mask(pattern.to_mask()),
        CSR.from_flat_index(pattern.shape, pattern.flat_index()),
        CSR.from_state(pattern.shape, dict(pattern.state())),
    ]
    for other in same:
        assert other.shape == pattern.shape
        assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), other.tensors(), strict=True))


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0, 1))
def test_tile_width(rows, cols, density):
    nnz = int(rows * cols * density)
    width = tile_width(rows, cols, nnz)
    assert width in [2**k for k in range(7, 17)]
    assert width >= 1024 or nnz * width >= 8 * rows * cols
    assert width == 2**16 or nnz * width >= rows * cols, "tile_ptr is not O(nnz)"
    assert width == 128 or nnz * width / 2 < (8 if width <= 1024 else 1) * rows * cols


def check_refused_or_right(shape, row_ptr, col_idx):
    try:
        pattern = CSR(shape, row_ptr, col_idx)
    except ValueError:
        return
    again = CSR.from_mask(pattern.to_mask())
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), again.tensors(), strict=True))


INT32 = st.one_of(st.integers(-2, 8), st.integers(-(2**31), 2**31 - 1))


@given(st.integers(0, 4), st.integers(0, 6), st.lists(INT32, max_size=7), st.lists(INT32, max_size=6))
@example(3, 5, [0, 2 * 10**9, -2 * 10**9, 4], [0, 1, 2, 3])  # differences of neighbours overflow int32
@example(2, 5, [0, -(2**31), 1], [0])
def test_anything_is_refused_or_right(out_features, in_features, row_ptr, col_idx):
    check_refused_or_right((out_features, in_features), int32(*row_ptr), int32(*col_idx))


GOOD = (int32(0, 2, 2, 5), int32(0, 3, 1, 2, 4))  # [3, 5]


@given(st.data())
def test_one_changed_number_is_refused_or_right(data):
    row_ptr, col_idx = (tensor.clone() for tensor in GOOD)
    tensor = data.draw(st.sampled_from([row_ptr, col_idx]))
    tensor[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(INT32)
    check_refused_or_right((3, 5), row_ptr, col_idx)


@pytest.mark.parametrize(
    ("row_ptr", "col_idx", "message"),
    [
        (GOOD[0].long(), GOOD[1], r"row_ptr must be int32 \[4\], got torch.int64 \[4\]"),
        (GOOD[0], GOOD[1].long(), r"col_idx must be int32 \[nnz\], got torch.int64 \[5\]"),
        (GOOD[0].float().requires_grad_(), GOOD[1], r"row_ptr must be int32 \[4\], got torch.float32 \[4\]"),
        (
            GOOD[0],
            GOOD[1].double().requires_grad_(),
            r"col_idx must be int32 \[nnz\], got torch.float64 \[5\]",
        ),
        (GOOD[0][None], GOOD[1], r"row_ptr must be int32 \[4\], got torch.int32 \[1, 4\]"),
        (GOOD[0], GOOD[1][:, None], r"col_idx must be int32 \[nnz\], got torch.int32 \[5, 1\]"),
        (int32(0, 9, 2, 9, 2, 9, 5, 9)[::2], GOOD[1], r"row_ptr must be contiguous, got stride \(2,\)"),
        (GOOD[0], GOOD[1].repeat_interleave(2)[::2], r"col_idx must be contiguous, got stride \(2,\)"),
        (GOOD[0][:-1], GOOD[1], r"row_ptr must be int32 \[4\], got torch.int32 \[3\]"),
        (GOOD[0], GOOD[1][:-1], r"row_ptr must run from 0 to nnz = 4, got 0 to 5"),
        (int32(1, 2, 2, 5), GOOD[1], r"row_ptr must run from 0 to nnz = 5, got 1 to 5"),
        (int32(0, 3, 2, 5), GOOD[1], r"row_ptr must not decrease, got a decrease after row 1"),
        (GOOD[0], int32(0, 3, 1, 2, 5), r"col_idx must be in \[0, 5\), got values from 0 to 5"),
        (GOOD[0], int32(-1, 3, 1, 2, 4), r"col_idx must be in \[0, 5\), got values from -1 to 4"),
        (
            GOOD[0],
            int32(3, 0, 1, 2, 4),
            r"col_idx must ascend strictly within each row, but entry 1 does not",
        ),
        (
            GOOD[0],
            int32(0, 3, 1, 1, 4),
            r"col_idx must ascend strictly within each row, but entry 3 does not",
        ),
        (GOOD[0].to("meta"), GOOD[1], r"row_ptr and col_idx must be on one device, got meta and cpu"),
    ],
)
def test_bad_index(row_ptr, col_idx, message):
    with pytest.raises(ValueError, match=message):
        CSR((3, 5), row_ptr, col_idx)
    with pytest.raises(ValueError, match=message):
        CSR.from_state((3, 5), {"row_ptr": row_ptr, "col_idx": col_idx})


@pytest.mark.parametrize("bad", [[0, 2, 2, 5], None])
def test_an_index_that_is_no_tensor(bad):
    with pytest.raises(TypeError, match=r"row_ptr must be a torch\.Tensor, got (list|NoneType)"):
        CSR((3, 5), bad, GOOD[1])


@pytest.mark.parametrize("shape", [(-1, 5), (3, -5), (2**31, 1), (1, 2**31)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match=r"shape must be two sizes in \[0, 2147483647\], got"):
        CSR(shape, *GOOD)


@pytest.mark.parametrize("flat", [[3, 1], [7, 1], [2, 2], [-1, 4], [0, 15], [15], [0.0, 1.0], [[0, 1]]])
def test_bad_flat_index(flat):
    with pytest.raises(ValueError, match="flat_index must"):
        CSR.from_flat_index((3, 5), torch.tensor(flat))


def test_later_changes_of_the_mask_do_not_matter():
    mask = torch.rand(20, 30) < 0.3
    pattern = CSR.from_mask(mask)
    before = mask.clone()
    mask.logical_not_()
    assert torch.equal(pattern.to_mask(), before)
