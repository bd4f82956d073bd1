"""V:N:M patterns: what is derived from them, that bad ones are refused, and the best columns of each tile."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsekern.formats import CSR, VNM


def random_mask(shape, v, m, generator=None):
    mask = torch.zeros(shape, dtype=torch.bool)
    for top, start in itertools.product(range(0, shape[0], v), range(0, shape[1], m)):
        size = min(m, shape[1] - start)
        four = torch.randperm(size, generator=generator)[:4]
        for row in range(top, min(top + v, shape[0])):
            two = torch.randperm(len(four), generator=generator)[:2]
            mask[row, start + four[two]] = True
    return mask


@st.composite
def masks(draw):
    """``(mask, v, m)``, with edges that cut tiles."""
    v, m = draw(st.sampled_from([4, 8, 64])), draw(st.integers(4, 19))
    shape = draw(st.tuples(st.integers(0, 20), st.integers(0, 50)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return random_mask(shape, v, m, generator), v, m


@given(masks())
def test_round_trips(mask_v_m):
    mask, v, m = mask_v_m
    pattern = VNM.from_mask(mask, v=v, n=2, m=m)
    out_features, in_features = mask.shape
    assert pattern.sizes() == [out_features, in_features, v, 2, m]
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.columns.shape == (-(-out_features // v), -(-in_features // m), 4)
    assert pattern.values_shape == (out_features, in_features // m * 2 + min(2, in_features % m))
    assert torch.equal(pattern.flat_index().reshape(-1), mask.reshape(-1).nonzero()[:, 0])
    again = VNM.from_state(pattern.shape, dict(pattern.state()), v=v, n=2, m=m)
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), again.tensors(), strict=True))
    values = torch.randn(pattern.values_shape)
    assert torch.equal(pattern.gather(pattern.scatter(values)), values)


@given(masks())
def test_it_is_a_csr_pattern_too(mask_v_m):
    mask, v, m = mask_v_m
    tiles = VNM.from_mask(mask, v=v, n=2, m=m).derived.tensors()
    assert all(torch.equal(a, b) for a, b in zip(tiles, CSR.from_mask(mask).derived.tensors(), strict=True))


@given(masks())
def test_selected_columns_and_packed_index(mask_v_m):
    """The column of a value is ``selected[tile, group, which]``; ``which`` is 2 bits of ``packed``."""
    mask, v, m = mask_v_m
    pattern = VNM.from_mask(mask, v=v, n=2, m=m)
    assert pattern.selected.dtype == torch.int32
    assert pattern.packed.dtype == torch.uint8
    assert pattern.packed.shape == (mask.shape[0], -(-pattern.values_shape[1] // 16) * 4)
    for row, packed in enumerate(pattern.packed.tolist()):
        number = int.from_bytes(bytes(packed), "little")
        which = [number >> 2 * k & 3 for k in range(len(packed) * 4)]
        columns = [int(pattern.selected[row // v, k // 2, which[k]]) for k in range(pattern.values_shape[1])]
        assert columns == mask[row].nonzero()[:, 0].tolist()
        assert not any(which[len(columns) :])
    for tile in pattern.selected.tolist():
        for group, four in enumerate(tile):
            size = min(m, mask.shape[1] - group * m)
            distinct = four[: min(4, size)]
            assert distinct == sorted(set(distinct))
            assert group * m <= four[0]
            assert four[-1] < group * m + size
            assert four[len(distinct) :] == distinct[-1:] * (4 - len(distinct))


def test_a_small_pattern():
    mask = torch.zeros(5, 10, dtype=torch.bool)
    mask[:4, 0] = mask[:4, 3] = True  # 2 columns used: 1 and 2 are selected as well
    mask[4, 5] = mask[4, 6] = True
    mask[:, 8:] = True
    pattern = VNM.from_mask(mask, v=4, n=2, m=8)
    assert pattern.columns.tolist() == [[[0, 1, 2, 3], [0, 1, 1, 1]], [[0, 1, 5, 6], [0, 1, 1, 1]]]
    assert pattern.index.tolist() == [[0, 3, 0, 1]] * 4 + [[2, 3, 0, 1]]
    assert pattern.selected.tolist() == [[[0, 1, 2, 3], [8, 9, 9, 9]], [[0, 1, 5, 6], [8, 9, 9, 9]]]
    assert pattern.packed.tolist() == [[0b01001100, 0, 0, 0]] * 4 + [[0b01001110, 0, 0, 0]]


def test_a_tile_that_uses_too_many_columns():
    mask = random_mask((20, 40), 8, 8)
    mask[8:16, 24:32] = False
    mask[8:14, 24:26] = True
    mask[14, 28:30] = mask[15, 30:32] = True
    message = (
        r"mask must use at most 4 columns in each 8 x 8 tile, but row tile 1, group 3 "
        r"\(rows 8 to 15, columns 24 to 31\) uses 6"
    )
    with pytest.raises(ValueError, match=message):
        VNM.from_mask(mask, v=8, n=2, m=8)


def test_a_cut_tile_that_uses_too_many_columns():
    mask = random_mask((18, 21), 8, 8)
    mask[16:, 16:] = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 1]]).bool()
    VNM.from_mask(mask, v=8, n=2, m=8)
    mask = random_mask((19, 21), 8, 8)
    mask[16:, 16:] = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 1]]).bool()
    with pytest.raises(ValueError, match=r"row tile 2, group 2 \(rows 16 to 18, columns 16 to 20\) uses 5"):
        VNM.from_mask(mask, v=8, n=2, m=8)


def test_a_row_that_does_not_hold_two():
    mask = random_mask((20, 40), 8, 8)
    mask[13, 16:24] = False
    message = r"mask must hold exactly 2 of each 8 columns, but row 13, group 2 \(columns 16 to 23\) holds 0"
    with pytest.raises(ValueError, match=message):
        VNM.from_mask(mask, v=8, n=2, m=8)


def test_the_widest_groups():
    mask = torch.zeros(4, 600, dtype=torch.bool)
    mask[:, [0, 255, 256, 511, 590, 599]] = True
    pattern = VNM.from_mask(mask, v=4, n=2, m=256)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.columns[0, 0].tolist() == [0, 1, 2, 255]
    mask[2, :256] = True
    with pytest.raises(ValueError, match=r"row 2, group 0 \(columns 0 to 255\) holds 256"):
        VNM.from_mask(mask, v=4, n=2, m=256)


@pytest.mark.parametrize(
    ("v", "n", "m"),
    [(6, 2, 8), (0, 2, 8), (-4, 2, 8), (4, 3, 8), (4, 1, 8), (4, 2, 3), (4, 2, 257), (4.0, 2, 8)],
)
def test_bad_options(v, n, m):
    message = (
        r"v must be a positive multiple of 4, n must be 2, and m an integer in \[4, 256\], "
        rf"got v = {v}, n = {n} and m = {m}"
    )
    mask = torch.ones(4, 4, dtype=torch.bool)
    for refused in (
        lambda: VNM.from_mask(mask, v=v, n=n, m=m),
        lambda: VNM.prune(mask.float(), None, v=v, n=n, m=m),
        lambda: VNM.fixed_sparsity(v=v, n=n, m=m),
        lambda: VNM((4, 4), torch.zeros(1, 1, 4), torch.zeros(4, 2), v=v, n=n, m=m),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


COLUMNS = torch.tensor([[[0, 2, 5, 7], [1, 2, 3, 4], [0, 1, 2, 2]]], dtype=torch.uint8)
INDEX = torch.tensor([[0, 3, 1, 2, 0, 2], [1, 2, 0, 1, 1, 2]], dtype=torch.uint8)  # [2, 19], 4:2:8


def changed(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = torch.tensor(value, dtype=torch.uint8)
    return tensor


@pytest.mark.parametrize(
    ("columns", "index", "message"),
    [
        (COLUMNS.int(), INDEX, r"columns must be uint8 \[1, 3, 4\], got torch.int32 \[1, 3, 4\]"),
        (
            COLUMNS[:, :2].contiguous(),
            INDEX,
            r"columns must be uint8 \[1, 3, 4\], got torch.uint8 \[1, 2, 4\]",
        ),
        (COLUMNS, INDEX.long(), r"index must be uint8 \[2, 6\], got torch.int64 \[2, 6\]"),
        (COLUMNS, INDEX[:, :5].contiguous(), r"index must be uint8 \[2, 6\], got torch.uint8 \[2, 5\]"),
        (COLUMNS, INDEX.t().contiguous().t(), r"index must be contiguous, got stride \(1, 2\)"),
        (COLUMNS, INDEX.to("meta"), r"columns and index must be on one device, got cpu and meta"),
        (
            changed(COLUMNS, (0, 0, 3), 8),
            INDEX,
            r"columns must ascend strictly in \[0, 8\) .* row tile 0, group 0 holds \[0, 2, 5, 8\]",
        ),
        (
            changed(COLUMNS, (0, 1, 0), 2),
            INDEX,
            r"columns must ascend strictly in \[0, 8\) .* row tile 0, group 1 holds \[2, 2, 3, 4\]",
        ),
        (
            changed(COLUMNS, (0, 2), [0, 1, 3, 3]),
            INDEX,
            r"columns must ascend strictly in \[0, 3\) .* row tile 0, group 2 holds \[0, 1, 3\]",
        ),
        (
            changed(COLUMNS, (0, 2), [0, 1, 2, 1]),
            INDEX,
            r"columns must repeat the last of the 3 columns that the last group selects, but row tile 0 "
            r"holds \[0, 1, 2, 1\] there",
        ),
        (
            COLUMNS,
            changed(INDEX, (1, 3), 4),
            r"index must ascend strictly in \[0, 4\) within each group, but row 1, group 1 holds \[0, 4\]",
        ),
        (
            COLUMNS,
            changed(INDEX, (0, 0), 3),
            r"index must ascend strictly in \[0, 4\) within each group, but row 0, group 0 holds \[3, 3\]",
        ),
        (
            COLUMNS,
            changed(INDEX, (1, 5), 3),
            r"index must ascend strictly in \[0, 3\) within each group, but row 1, group 2 holds \[1, 3\]",
        ),
    ],
)
def test_bad_state(columns, index, message):
    VNM((2, 19), COLUMNS, INDEX, v=4, n=2, m=8)
    with pytest.raises(ValueError, match=message):
        VNM((2, 19), columns, index, v=4, n=2, m=8)
    with pytest.raises(ValueError, match=message):
        VNM.from_state((2, 19), {"columns": columns, "index": index}, v=4, n=2, m=8)


def test_a_state_that_holds_no_tensor():
    with pytest.raises(TypeError, match=r"columns must be a torch\.Tensor, got list"):
        VNM((2, 19), COLUMNS.tolist(), INDEX, v=4, n=2, m=8)


@given(st.data())
def test_one_changed_number_is_refused_or_right(data):
    columns, index = COLUMNS.clone(), INDEX.clone()
    tensor = data.draw(st.sampled_from([columns, index])).view(-1)
    tensor[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(st.integers(0, 9))
    try:
        pattern = VNM((2, 19), columns, index, v=4, n=2, m=8)
    except ValueError:
        return
    mask = pattern.to_mask()
    assert torch.equal(VNM.from_mask(mask, v=4, n=2, m=8).to_mask(), mask)
    assert mask.sum() == pattern.nnz
