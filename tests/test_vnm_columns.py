"""Pruning to V:N:M: the best columns of each tile."""

import itertools

import pytest
import torch
from sparsekern.formats import VNM
from sparsekern.formats.vnm_columns import best_columns


def best_sum(scores, m):
    """``[groups]``: the most that a row tile ``scores [v, groups * m]`` can keep, by trying all sets of 4."""
    tiles = scores.view(scores.shape[0], -1, m)
    kept = [
        tiles[:, :, list(four)].topk(2, 2).values.sum((0, 2)) for four in itertools.combinations(range(m), 4)
    ]
    return torch.stack(kept).amax(0)


@pytest.mark.parametrize(("v", "m"), [(4, 4), (4, 5), (8, 6), (4, 7), (64, 8), (32, 5)])
def test_pruning_is_exact_up_to_m_8(v, m):
    for scores in (
        torch.randn(2 * v, 6 * m),
        torch.randint(-1, 2, (2 * v, 6 * m)).float(),
        torch.zeros(2 * v, 6 * m),
    ):
        mask = VNM.prune(scores, None, v=v, n=2, m=m)
        VNM.from_mask(mask, v=v, n=2, m=m)
        for rows in (slice(0, v), slice(v, 2 * v)):
            kept = (scores * mask)[rows].view(v, -1, m).sum((0, 2))
            torch.testing.assert_close(kept, best_sum(scores[rows], m), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("v", "m"), [(128, 16), (4, 16), (16, 12), (8, 9)])
def test_pruning_beyond_m_8_is_nearly_exact(v, m):
    groups = 10 + 5120 // (v * m)
    for scores in (
        torch.randn(v, groups * m).abs(),
        torch.distributions.StudentT(2.0).sample((v, groups * m)).abs(),
    ):
        mask = VNM.prune(scores, None, v=v, n=2, m=m)
        VNM.from_mask(mask, v=v, n=2, m=m)
        kept = (scores * mask).view(v, -1, m).sum((0, 2))
        share = kept / best_sum(scores, m)
        assert share.mean() > 0.998
        assert share.min() > 0.93
        assert share.max() < 1 + 1e-5


def test_no_swap_of_columns_gains():
    scores = torch.randn(16, 20 * 16).abs()
    chosen = best_columns(scores, 16, 16).view(-1, 16)
    tiles = scores.view(16, -1, 16)
    for group, four in enumerate(chosen):
        kept = tiles[:, group, four].topk(2, 1).values.sum()
        for out, new in itertools.product(four.nonzero()[:, 0], (~four).nonzero()[:, 0]):
            other = four.clone()
            other[out], other[new] = False, True
            assert tiles[:, group, other].topk(2, 1).values.sum() <= kept * (1 + 2e-5)


@pytest.mark.parametrize("m", [8, 16])
@pytest.mark.parametrize("shape", [(3, 7), (70, 3), (70, 19), (64, 33), (5, 2), (5, 1), (130, 40)])
def test_ragged_tiles(shape, m):
    """An edge changes nothing but what it cuts off: as if padded with rows and columns worth nothing."""
    scores = torch.rand(shape) + 0.1
    mask = VNM.prune(scores, None, v=64, n=2, m=m)
    pattern = VNM.from_mask(mask, v=64, n=2, m=m)
    assert pattern.nnz == shape[0] * (shape[1] // m * 2 + min(2, shape[1] % m))
    padded = torch.zeros(-(-shape[0] // 64) * 64, -(-shape[1] // m) * m)
    padded[: shape[0], : shape[1]] = scores
    assert torch.equal(VNM.prune(padded, None, v=64, n=2, m=m)[: shape[0], : shape[1]], mask)


@pytest.mark.parametrize("m", [4, 8, 16])
def test_ties_go_to_the_lower_column(m):
    mask = VNM.prune(torch.ones(8, 2 * m), None, v=4, n=2, m=m)
    assert torch.equal(mask, (torch.arange(2 * m) % m < 2).expand(8, -1))
    pattern = VNM.from_mask(mask, v=4, n=2, m=m)
    assert (pattern.columns == torch.arange(4)).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("m", [8, 16])
def test_scores_of_any_size(scale, m):
    scores = torch.randn(32, 64)
    expected = VNM.prune(scores, None, v=16, n=2, m=m)
    assert torch.equal(
        VNM.prune(scores * 2.0 ** round(torch.tensor(scale).log2().item()), None, v=16, n=2, m=m), expected
    )


@pytest.mark.parametrize("m", [8, 16])
def test_pruning_in_chunks(monkeypatch, m):
    scores = torch.randn(40, 50)
    expected = VNM.prune(scores, None, v=8, n=2, m=m)
    monkeypatch.setattr("sparsekern.formats.vnm_columns.chunk", lambda device: 50)
    assert torch.equal(VNM.prune(scores, None, v=8, n=2, m=m), expected)


@pytest.mark.parametrize("m", [64, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_each_row_keeps_the_best_2_of_the_4(m, dtype):
    """Ties go to the lower column; a last group of 3 columns takes them all."""
    scores = torch.randint(0, 9, (70, 2 * m + 3)).to(dtype)
    mask = VNM.prune(scores, None, v=64, n=2, m=m)
    selected = best_columns(scores.double(), 64, m).repeat_interleave(64, 0)[:70, : scores.shape[1]]
    ranked = torch.where(selected, scores.double(), -torch.inf)
    for first in range(0, scores.shape[1], m):
        group = ranked[:, first : first + m]
        two = group.sort(dim=1, descending=True, stable=True).indices[:, :2]
        expected = torch.zeros_like(group, dtype=torch.bool).scatter_(1, two, True)
        assert torch.equal(mask[:, first : first + m], expected)


def test_tiles_higher_than_the_weight():
    scores = torch.randn(5, 40)
    mask = VNM.prune(scores, None, v=8, n=2, m=16)
    assert torch.equal(VNM.prune(scores, None, v=2**31 - 4, n=2, m=16), mask)
