"""BSR patterns: what is derived from them, that bad ones are refused, and the best blocks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsekern.formats import BSR
from sparsekern.formats.bsr import SIDES


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def expand(blocks, block, shape):
    """The mask ``[out, in]`` of a mask of blocks."""
    return blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


@st.composite
def masks(draw):
    """``(mask, block)``, with edges that cut blocks."""
    block = draw(st.tuples(*[st.sampled_from(SIDES[:4])] * 2))
    shape = draw(st.tuples(*[st.integers(0, 80)] * 2))
    grid = [-(-size // side) for size, side in zip(shape, block, strict=True)]
    seed = draw(st.integers(0, 2**31))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    blocks = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density
    return expand(blocks, block, shape), block


@given(masks())
def test_round_trips(mask_and_block):
    mask, block = mask_and_block
    pattern = BSR.from_mask(mask, block=block)
    assert pattern.block == block
    assert pattern.sizes() == [*mask.shape, *block]
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.nnz == int(mask.sum())
    assert pattern.values_shape == (pattern.block_col_idx.numel(), *block)
    again = BSR.from_state(pattern.shape, dict(pattern.state()), block=block)
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), again.tensors(), strict=True))
    values = torch.randn(pattern.values_shape)
    inside = pattern.flat_index() < mask.numel()
    assert torch.equal(pattern.gather(pattern.scatter(values)), values * inside)


@given(masks())
def test_transposed_blocks(mask_and_block):
    mask, block = mask_and_block
    pattern = BSR.from_mask(mask, block=block)
    transposed = BSR.from_mask(mask.t(), block=block[::-1])
    assert torch.equal(pattern.t_block_ptr, transposed.block_row_ptr)
    assert torch.equal(pattern.t_block_row, transposed.block_col_idx)
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in pattern.tensors())
    which = pattern.t_block.long()
    columns = torch.repeat_interleave(
        torch.arange(pattern.t_block_ptr.numel() - 1), pattern.t_block_ptr.diff()
    )
    assert torch.equal(pattern.block_col_idx[which].long(), columns)
    assert torch.equal(transposed.t_block[which].long(), torch.arange(which.numel()))


def test_flat_index_of_a_ragged_pattern():
    pattern = BSR((5, 6), int32(0, 1, 2), int32(0, 1), block=(4, 4))
    assert pattern.nnz == 4 * 4 + 1 * 2
    index = pattern.flat_index()
    assert index[0].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [12, 13, 14, 15], [18, 19, 20, 21]]
    assert index[1].tolist() == [[28, 29, 30, 30]] + [[30] * 4] * 3
    assert pattern.gather(torch.ones(5, 6)).sum() == 18


def test_offsets_past_2_31():
    shape, block = (70_000, 70_003), (128, 64)
    rows, columns = -(-shape[0] // 128), -(-shape[1] // 64)
    ptr = torch.zeros(rows + 1, dtype=torch.int32)
    ptr[-1] = 1
    pattern = BSR(shape, ptr, int32(columns - 1), block=block)
    height, width = shape[0] - (rows - 1) * 128, shape[1] - (columns - 1) * 64
    assert pattern.nnz == height * width
    index = pattern.flat_index()
    first = (rows - 1) * 128 * shape[1] + (columns - 1) * 64
    assert first > 2**31
    assert index[0, 0, 0] == first
    assert index[0, height - 1, width - 1] == shape[0] * shape[1] - 1
    assert (index[0, height:] == shape[0] * shape[1]).all()
    assert (index[0, :, width:] == shape[0] * shape[1]).all()


def test_a_mask_that_is_not_constant_within_blocks():
    mask = expand(torch.rand(5, 7) < 0.5, (32, 32), (150, 200))
    mask[96:128, 160:192] = False
    mask[100, 165:182] = True
    message = r"mask must be constant within each 32 x 32 block, but block \(3, 5\) holds 17 of 1024"
    with pytest.raises(ValueError, match=message):
        BSR.from_mask(mask, block=(32, 32))
    mask[96:128, 160:192] = True
    BSR.from_mask(mask, block=(32, 32))
    mask[128:, 192:] = True
    mask[149, 199] = False
    message = r"mask must be constant within each 32 x 32 block, but block \(4, 6\) holds 175 of 176"
    with pytest.raises(ValueError, match=message):
        BSR.from_mask(mask, block=(32, 32))


@given(masks(), st.data())
def test_one_flipped_element_is_found(mask_and_block, data):
    mask, block = mask_and_block
    if not mask.numel():
        return
    at = tuple(data.draw(st.integers(0, size - 1)) for size in mask.shape)
    block_at = tuple(position // side for position, side in zip(at, block, strict=True))
    part = mask[tuple(slice(i * side, (i + 1) * side) for i, side in zip(block_at, block, strict=True))]
    alone = part.numel() == 1
    mask[at] = ~mask[at]
    if alone:  # the edge cuts the block down to this element
        assert torch.equal(BSR.from_mask(mask, block=block).to_mask(), mask)
        return
    message = rf"block \({block_at[0]}, {block_at[1]}\) holds {int(part.sum())} of {part.numel()}"
    with pytest.raises(ValueError, match=message):
        BSR.from_mask(mask, block=block)


@pytest.mark.parametrize("block", [(7, 4), (4, 256), (4,), (4, 4, 4), 32, None, (0, 4), (-4, 4), "44"])
def test_bad_block(block):
    message = r"block must be \(height, width\) with sides from \(4, 8, 16, 32, 64, 128\), got "
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        BSR.from_mask(mask, block=block)
    with pytest.raises(ValueError, match=message):
        BSR.prune(mask.float(), 0.5, block=block)
    with pytest.raises(ValueError, match=message):
        BSR((4, 4), int32(0, 1), int32(0), block=block)


GOOD = (int32(0, 2, 2, 5), int32(0, 3, 1, 2, 4))  # [11, 18] in 4 x 4 blocks


@pytest.mark.parametrize(
    ("ptr", "idx", "message"),
    [
        (GOOD[0].long(), GOOD[1], r"block_row_ptr must be int32 \[4\], got torch.int64 \[4\]"),
        (GOOD[0], GOOD[1].long(), r"block_col_idx must be int32 \[blocks\], got torch.int64 \[5\]"),
        (GOOD[0][:-1], GOOD[1], r"block_row_ptr must be int32 \[4\], got torch.int32 \[3\]"),
        (GOOD[0], GOOD[1][None], r"block_col_idx must be int32 \[blocks\], got torch.int32 \[1, 5\]"),
        (GOOD[0], GOOD[1].repeat_interleave(2)[::2], r"block_col_idx must be contiguous, got stride \(2,\)"),
        (GOOD[0], GOOD[1][:-1], r"block_row_ptr must run from 0 to blocks = 4, got 0 to 5"),
        (int32(1, 2, 2, 5), GOOD[1], r"block_row_ptr must run from 0 to blocks = 5, got 1 to 5"),
        (int32(0, 3, 2, 5), GOOD[1], r"block_row_ptr must not decrease, got a decrease after row 1"),
        (GOOD[0], int32(0, 3, 1, 2, 5), r"block_col_idx must be in \[0, 5\), got values from 0 to 5"),
        (GOOD[0], int32(-1, 3, 1, 2, 4), r"block_col_idx must be in \[0, 5\), got values from -1 to 4"),
        (GOOD[0], int32(3, 0, 1, 2, 4), r"block_col_idx must ascend strictly within each row, but entry 1 "),
        (GOOD[0], int32(0, 3, 1, 1, 4), r"block_col_idx must ascend strictly within each row, but entry 3 "),
        (
            GOOD[0].to("meta"),
            GOOD[1],
            r"block_row_ptr and block_col_idx must be on one device, got meta and cpu",
        ),
    ],
)
def test_bad_index(ptr, idx, message):
    with pytest.raises(ValueError, match=message):
        BSR((11, 18), ptr, idx, block=(4, 4))
    with pytest.raises(ValueError, match=message):
        BSR.from_state((11, 18), {"block_row_ptr": ptr, "block_col_idx": idx}, block=(4, 4))


def test_an_index_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"block_row_ptr must be a torch\.Tensor, got list"):
        BSR((11, 18), [0, 2, 2, 5], GOOD[1], block=(4, 4))


@pytest.mark.parametrize("shape", [(-1, 5), (3, -5), (2**31, 1), (1, 2**31)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match=r"shape must be two sizes in \[0, 2147483647\], got"):
        BSR(shape, *GOOD, block=(4, 4))


INT32 = st.one_of(st.integers(-2, 6), st.integers(-(2**31), 2**31 - 1))


@given(st.lists(INT32, min_size=4, max_size=4), st.lists(INT32, max_size=6))
def test_anything_is_refused_or_right(ptr, idx):
    try:
        pattern = BSR((11, 18), int32(*ptr), int32(*idx), block=(4, 4))
    except ValueError:
        return
    again = BSR.from_mask(pattern.to_mask(), block=(4, 4))
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), again.tensors(), strict=True))


@pytest.mark.parametrize(("shape", "block"), [((8, 16), (4, 8)), ((9, 10), (4, 4)), ((3, 30), (8, 8))])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9])
def test_pruning_against_brute_force(shape, block, sparsity):
    scores = torch.randn(shape, dtype=torch.float64)
    grid = [-(-size // side) for size, side in zip(shape, block, strict=True)]
    count = round(grid[0] * grid[1] * (1 - sparsity))
    best = max(
        float(scores[expand(_blocks(grid, kept), block, shape)].sum())
        for kept in itertools.combinations(range(grid[0] * grid[1]), count)
    )
    mask = BSR.prune(scores, sparsity, block=block)
    pattern = BSR.from_mask(mask, block=block)
    assert pattern.block_col_idx.numel() == count
    assert float(scores[mask].sum()) == pytest.approx(best, rel=1e-12, abs=1e-12)


def _blocks(grid, kept):
    blocks = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    blocks[list(kept)] = True
    return blocks.view(*grid)


def test_sums_that_overflow():
    scores = torch.full((256, 256), 3e38)
    scores[:, 1::2] = -3e38
    scores[128:, 128:] = 3e38
    mask = BSR.prune(scores, 0.5, block=(128, 128))
    assert mask[:128, :128].all()  # of the others, which all sum to 0, the first
    assert mask[128:, 128:].all()
    assert mask.sum() == 2 * 128 * 128


def test_ties_go_to_the_lower_block():
    mask = BSR.prune(torch.ones(8, 12), 0.5, block=(4, 4))
    assert mask[:4].all()
    assert not mask[4:].any()


@pytest.mark.parametrize("shape", [(0, 0), (0, 9), (40, 0), (70, 45), (200, 333)], ids=str)
def test_the_longest_rows_come_first(shape):
    """For kernels that take them in this order; those of equal length as they stand."""
    pattern = BSR.from_mask(BSR.prune(torch.rand(shape), 0.6, (8, 16)), (8, 16))
    *tensors, order, t_order = pattern.gpu_tensors()
    assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in pattern.tensors()]
    for found, ptr in ((order, pattern.block_row_ptr), (t_order, pattern.t_block_ptr)):
        lengths = ptr.diff().tolist()
        assert found.dtype == torch.int32
        assert found.tolist() == sorted(range(len(lengths)), key=[-length for length in lengths].__getitem__)
    assert pattern.to("meta").gpu_operands[0][-1].is_meta
