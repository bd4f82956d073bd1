"""Random patterns: every one as likely, exact in number, made without memory of the dense size."""

import math

import pytest
import sparsekern as sk
import torch
from cases import ALL_FORMATS, free
from sparsekern.formats import parse_format
from sparsekern.formats.sampling import sample, sample_groups
from test_training_memory import Allocations


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_uniform(counts, draws):
    """χ² of equally likely outcomes is within 6 standard deviations, and 20 for its long tail."""
    expected = draws / counts.numel()
    assert counts.sum() == draws
    chi2 = float((counts - expected).square().sum() / expected)
    freedom = counts.numel() - 1
    assert abs(chi2 - freedom) <= 6 * math.sqrt(2 * freedom) + 20


SIZES = [
    *[(0, 0), (1, 0), (1, 1), (7, 7), (9, 1), (20, 9), (20, 11)],
    *[(1000, 3), (10**5, 6000), (10**5, 99_999), (2**40, 50)],
]


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_a_sample_is_distinct_ascending_and_reproducible(size, count):
    found = sample(size, count, seeded(1))
    assert found.dtype == torch.int64
    assert found.shape == (count,)
    assert (found.diff() > 0).all()
    assert count == 0 or (found[0] >= 0 and found[-1] < size)
    assert torch.equal(sample(size, count, seeded(1)), found)
    if 0 < count < size > 100:
        assert not torch.equal(sample(size, count, seeded(2)), found)


@pytest.mark.parametrize(("size", "count"), [(6, 2), (6, 4), (6, 3), (40, 2), (100, 1)])
def test_every_sample_is_as_likely(size, count):
    seen, sets = {}, math.comb(size, count)
    draws = 20 * sets
    for _ in range(draws):
        found = tuple(sample(size, count, None).tolist())
        seen[found] = seen.get(found, 0) + 1
    counts = [*seen.values(), *[0] * (sets - len(seen))]
    assert_uniform(torch.tensor(counts, dtype=torch.float64), draws)


def test_the_first_positions_are_no_likelier():
    """15 · 2²⁴ goes 17.07 times into 2³²: of 32 bits, its first 15th would be drawn 6 % too often."""
    found = torch.cat([sample(15 * 2**24, 200_000, None) for _ in range(2)])
    assert_uniform(torch.bincount(found >> 24, minlength=15).double(), found.numel())


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 5), (4, 4), (5, 8), (2, 256)])
def test_every_group_is_as_likely(n, m):
    sets = math.comb(m, n)
    positions = sample_groups(50, sets * m, n, m, None)
    assert positions.dtype == torch.uint8
    assert positions.shape == (50, sets * n)
    groups = positions.view(-1, n).long()
    assert (groups.diff(dim=1) > 0).all()
    assert groups.max() < m
    code = torch.zeros(len(groups), dtype=torch.int64)
    for column in groups.unbind(1):
        code = code * m + column
    counts = code.unique(return_counts=True)[1].double()
    missed = counts.new_zeros(sets - counts.numel())
    assert_uniform(torch.cat([counts, missed]), len(groups))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (130, 67), (66, 259)], ids=str)
@pytest.mark.parametrize("format", ALL_FORMATS)
def test_random_patterns_keep_as_much_as_pruning(format, shape):
    kind, sparsity = parse_format(format), free(format, 0.4)
    pattern = kind.random(shape, sparsity, seeded(3))
    pruned = kind.from_mask(kind.prune(torch.rand(shape), sparsity))
    assert (pattern.spec, pattern.shape) == (kind.spec, shape)
    assert pattern.values_shape == pruned.values_shape
    assert torch.equal(kind.from_mask(pattern.to_mask()).to_mask(), pattern.to_mask())
    again = kind.random(shape, sparsity, seeded(3))
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), again.tensors(), strict=True))


@pytest.mark.parametrize("format", ["csr", "bsr4", "bsr32", "1:16", "64:2:256", "4:2:64"])
def test_a_layer_is_made_without_memory_of_the_dense_size(format):
    """A few int64 numbers for each value at a time. The dense weight has 400 bytes for each at 99 %."""
    with Allocations() as allocations:
        layer = sk.SparseLinear(4096, 4096, sparsity=free(format, 0.99), format=format)
    nnz = layer.pattern.nnz
    assert allocations.largest <= 16 * nnz
    assert allocations.peak <= 64 * nnz
