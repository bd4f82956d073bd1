"""N:M patterns: what is derived from them, that bad ones are refused, and the best masks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsekern.formats import CSR, NM


def uint8(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


def random_mask(shape, n, m, generator=None):
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, start in itertools.product(range(shape[0]), range(0, shape[1], m)):
        size = min(m, shape[1] - start)
        mask[row, start + torch.randperm(size, generator=generator)[: min(n, size)]] = True
    return mask


@st.composite
def masks(draw):
    """``(mask, n, m)``, with rows that cut groups short."""
    m = draw(st.integers(1, 16))
    n = draw(st.integers(1, m))
    shape = draw(st.tuples(st.integers(0, 6), st.integers(0, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return random_mask(shape, n, m, generator), n, m


@given(masks())
def test_round_trips(mask_n_m):
    mask, n, m = mask_n_m
    pattern = NM.from_mask(mask, n=n, m=m)
    assert pattern.sizes() == [*mask.shape, n, m]
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.values_shape == (mask.shape[0], mask.shape[1] // m * n + min(n, mask.shape[1] % m))
    assert torch.equal(pattern.flat_index().reshape(-1), mask.reshape(-1).nonzero()[:, 0])
    again = NM.from_state(pattern.shape, dict(pattern.state()), n=n, m=m)
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), again.tensors(), strict=True))
    values = torch.randn(pattern.values_shape)
    assert torch.equal(pattern.gather(pattern.scatter(values)), values)


@given(masks())
def test_it_is_a_csr_pattern_too(mask_n_m):
    mask, n, m = mask_n_m
    tiles = NM.from_mask(mask, n=n, m=m).derived.tensors()
    assert all(torch.equal(a, b) for a, b in zip(tiles, CSR.from_mask(mask).derived.tensors(), strict=True))


def unpack(packed, bits, count):
    """The first ``count`` positions of each row."""
    rows = []
    for row in packed.tolist():
        number = int.from_bytes(bytes(row), "little")
        rows.append([number >> bits * i & (2**bits - 1) for i in range(len(row) * 8 // bits)])
    return [row[:count] for row in rows], [row[count:] for row in rows]


@given(masks())
def test_packed_positions(mask_n_m):
    mask, n, m = mask_n_m
    pattern = NM.from_mask(mask, n=n, m=m)
    bits, count = (2 if m <= 4 else 4), pattern.values_shape[1]
    assert pattern.packed.dtype == torch.uint8
    assert pattern.packed.is_contiguous()
    assert pattern.packed.shape == (mask.shape[0], -(-count * bits // 32) * 4)
    positions, padding = unpack(pattern.packed, bits, count)
    assert positions == pattern.index.tolist()
    assert not any(map(any, padding))


def test_index_of_a_small_pattern():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0]]).bool()
    with pytest.raises(ValueError, match="mask must hold exactly 2 of each 3 columns, but row 0, group 2 "):
        NM.from_mask(mask, n=2, m=4)
    mask[:, 10] = True
    pattern = NM.from_mask(mask, n=2, m=4)
    assert pattern.index.tolist() == [[1, 2, 0, 3, 1, 2], [0, 1, 2, 3, 0, 2]]
    assert pattern.packed.tolist() == [[0b11001001, 0b1001, 0, 0], [0b11100100, 0b1000, 0, 0]]
    assert pattern.derived.columns.tolist() == [1, 2, 4, 7, 9, 10, 0, 1, 6, 7, 8, 10]


@pytest.mark.parametrize("found", [0, 1, 3, 4])
def test_a_mask_that_is_not_n_of_m(found):
    mask = random_mask((50, 22), 2, 4)
    mask[17, 12:16] = torch.arange(4) < found
    message = (
        rf"mask must hold exactly 2 of each 4 columns, but row 17, group 3 \(columns 12 to 15\) holds {found}"
    )
    with pytest.raises(ValueError, match=message):
        NM.from_mask(mask, n=2, m=4)


def test_a_last_group_that_is_wrong():
    mask = random_mask((5, 21), 2, 4)
    mask[3, 20] = False
    message = r"mask must hold exactly 1 of each 1 columns, but row 3, group 5 \(columns 20 to 20\) holds 0"
    with pytest.raises(ValueError, match=message):
        NM.from_mask(mask, n=2, m=4)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (0, 4), (-1, 4), (2, 17), (2.0, 4), ("2", "4"), (None, 4)])
def test_bad_n_and_m(n, m):
    message = r"n and m must be integers with 1 <= n <= m <= 16, got n = .* and m = "
    mask = torch.ones(4, 4, dtype=torch.bool)
    for refused in (
        lambda: NM.from_mask(mask, n=n, m=m),
        lambda: NM.prune(mask.float(), None, n=n, m=m),
        lambda: NM.prune_transposable(mask.float(), n=n, m=m),
        lambda: NM.fixed_sparsity(n=n, m=m),
        lambda: NM((4, 4), uint8([0, 1]), n=n, m=m),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


GOOD = uint8([1, 2, 0, 3, 0, 1], [0, 1, 2, 3, 0, 2])  # [2, 11], 2:4


def changed(row, column, value):
    index = GOOD.clone()
    index[row, column] = value
    return index


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (GOOD.int(), r"index must be uint8 \[2, 6\], got torch.int32 \[2, 6\]"),
        (GOOD[:1], r"index must be uint8 \[2, 6\], got torch.uint8 \[1, 6\]"),
        (GOOD[:, :4].contiguous(), r"index must be uint8 \[2, 6\], got torch.uint8 \[2, 4\]"),
        (GOOD.reshape(-1), r"index must be uint8 \[2, 6\], got torch.uint8 \[12\]"),
        (GOOD.t().contiguous().t(), r"index must be contiguous, got stride \(1, 2\)"),
        (
            changed(1, 3, 4),
            r"index must ascend strictly in \[0, 4\) within each group, but row 1, group 1 holds \[2, 4\]",
        ),
        (
            changed(1, 3, 2),
            r"index must ascend strictly in \[0, 4\) within each group, but row 1, group 1 holds \[2, 2\]",
        ),
        (
            changed(0, 0, 3),
            r"index must ascend strictly in \[0, 4\) within each group, but row 0, group 0 holds \[3, 2\]",
        ),
        (changed(0, 1, 255), r"index must ascend strictly in \[0, 4\) .* row 0, group 0 holds \[1, 255\]"),
        (
            changed(1, 5, 3),
            r"index must ascend strictly in \[0, 3\) within each group, but row 1, group 2 holds \[0, 3\]",
        ),
        (
            changed(1, 4, 2),
            r"index must ascend strictly in \[0, 3\) within each group, but row 1, group 2 holds \[2, 2\]",
        ),
    ],
)
def test_bad_index(index, message):
    with pytest.raises(ValueError, match=message):
        NM((2, 11), index, n=2, m=4)
    with pytest.raises(ValueError, match=message):
        NM.from_state((2, 11), {"index": index}, n=2, m=4)


def test_only_a_short_group():
    assert NM((1, 3), uint8([0, 2]), n=2, m=4).to_mask().tolist() == [[True, False, True]]
    message = r"index must ascend strictly in \[0, 3\) within each group, but row 0, group 0 holds \[1, 3\]"
    with pytest.raises(ValueError, match=message):
        NM((1, 3), uint8([1, 3]), n=2, m=4)


def test_an_index_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"index must be a torch\.Tensor, got NoneType"):
        NM((2, 11), None, n=2, m=4)


def test_too_many_nonzeros():
    message = r"a pattern must have at most 2147483647 nonzeros, got 2147483648 for shape \(65536, 65536\)"
    with pytest.raises(ValueError, match=message):
        NM((2**16, 2**16), torch.empty(2**16, 2**15, dtype=torch.uint8, device="meta"), n=2, m=4)


@given(st.integers(1, 3), st.integers(0, 11), st.data())
def test_anything_is_refused_or_right(out_features, in_features, data):
    width = in_features // 4 * 2 + min(2, in_features % 4)
    numbers = st.one_of(st.integers(0, 4), st.integers(0, 255))
    index = data.draw(st.lists(numbers, min_size=out_features * width, max_size=out_features * width))
    index = torch.tensor(index, dtype=torch.uint8).view(out_features, width)
    try:
        pattern = NM((out_features, in_features), index, n=2, m=4)
    except ValueError:
        return
    again = NM.from_mask(pattern.to_mask(), n=2, m=4)
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), again.tensors(), strict=True))


# --- pruning ---


def largest(scores, n, m):
    """The mask of the N largest of each group by sorting, ties to the lower column."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, start in itertools.product(range(scores.shape[0]), range(0, scores.shape[1], m)):
        columns = range(start, min(start + m, scores.shape[1]))
        mask[row, sorted(columns, key=lambda c: (-float(scores[row, c]), c))[:n]] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (2, 4), (4, 4), (3, 5), (2, 8), (4, 8), (8, 16)])
@pytest.mark.parametrize("ties", [False, True])
def test_pruning_against_sorting(n, m, ties):
    scores = torch.randint(-2, 3, (23, 45)).float() if ties else torch.randn(23, 45)
    assert torch.equal(NM.prune(scores, None, n=n, m=m), largest(scores, n, m))


def test_infinite_scores():
    scores = torch.tensor([[-torch.inf, -torch.inf, 1.0, -torch.inf, torch.inf, 0.0, -torch.inf]])
    assert NM.prune(scores, None, n=2, m=4).int().tolist() == [[1, 0, 1, 0, 1, 1, 0]]
    scores = torch.full((1, 3), -torch.inf)
    assert NM.prune(scores, None, n=2, m=4).int().tolist() == [[1, 1, 0]]


def test_pruning_in_chunks(monkeypatch):
    scores = torch.randn(40, 30)
    expected = NM.prune(scores, None, n=2, m=4)
    monkeypatch.setattr("sparsekern.formats.groups.chunk", lambda device: 50)
    assert torch.equal(NM.prune(scores, None, n=2, m=4), expected)
