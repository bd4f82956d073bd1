"""Masks that are N:M along rows and columns: they are that, and none keeps more."""

import itertools

import pytest
import sparsekern as sk
import torch
from sparsekern.formats import NM, parse_format, transposable


def check_transposable(mask, n, m):
    tiles = mask.view(mask.shape[0] // m, m, mask.shape[1] // m, m)
    assert (tiles.sum(1) == n).all()
    assert (tiles.sum(3) == n).all()


def score_kinds(*shape):
    yield torch.rand(shape)
    yield torch.distributions.StudentT(2.0).sample(shape)
    yield torch.randint(0, 3, shape).float()
    yield torch.zeros(shape)
    yield torch.rand(shape) * 10.0 ** torch.randint(-30, 30, shape[:1] + (1,) * (len(shape) - 1))
    yield torch.rand(shape) + 1000.0


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_transposable_against_brute_force(n, m):
    rows = [[i in kept for i in range(m)] for kept in itertools.combinations(range(m), n)]
    masks = torch.tensor(list(itertools.product(rows, repeat=m)))
    masks = masks[(masks.sum(1) == n).all(1)].double()
    assert (n, m) != (2, 4) or len(masks) == 90
    for scores in score_kinds(7 * m, 5 * m):
        mask = NM.prune_transposable(scores, n=n, m=m)
        check_transposable(mask, n, m)
        tiles = scores.double().view(7, m, 5, m).transpose(1, 2)
        kept = (tiles * mask.view(7, m, 5, m).transpose(1, 2)).sum((2, 3))
        best = torch.einsum("abij,kij->abk", tiles, masks).amax(2)
        assert (kept >= best - 1e-4 * tiles.abs().amax((2, 3))).all()


def best_cycle(scores, mask):
    """``[tiles]``: how much masks ``[tiles, m, m]`` can gain where ones move round a cycle of rows.

    From row i to row k, a one moves in the column where that gains most. A mask is the best of those with its
    row and column sums if and only if no cycle of such moves gains. Here each must gain 1e-5 of the largest
    score to count.
    """
    leave = torch.where(mask, -scores, -torch.inf)
    enter = torch.where(mask, -torch.inf, scores)
    gain = (leave[:, :, None] + enter[:, None]).amax(3) - 1e-5 * scores.abs().amax((1, 2), keepdim=True)
    gain.diagonal(dim1=1, dim2=2).fill_(0)
    for k in range(gain.shape[1]):
        gain = torch.maximum(gain, gain[:, :, k, None] + gain[:, None, k])
    return gain.diagonal(dim1=1, dim2=2).amax(1)


@pytest.mark.parametrize(("n", "m"), [(3, 5), (2, 8), (4, 8), (7, 8), (1, 8), (8, 16), (4, 16)])
def test_transposable_is_optimal(n, m):
    for scores in score_kinds(10 * m, 10 * m):
        mask = NM.prune_transposable(scores, n=n, m=m)
        check_transposable(mask, n, m)
        tiles = scores.double().view(10, m, 10, m).transpose(1, 2).reshape(-1, m, m)
        chosen = mask.view(10, m, 10, m).transpose(1, 2).reshape(-1, m, m)
        assert (best_cycle(tiles, chosen) <= 0).all()


def test_the_flow_finds_the_best_of_the_90(monkeypatch):
    scores = torch.rand(40, 40)
    expected = NM.prune_transposable(scores, n=2, m=4)
    monkeypatch.setattr(transposable, "_best_of_all", transposable._best)
    assert torch.equal(NM.prune_transposable(scores, n=2, m=4), expected)


def test_transposable_ties():
    assert (
        NM.prune_transposable(torch.zeros(4, 4), n=2, m=4).int().tolist()
        == [
            *([0, 0, 1, 1], [0, 0, 1, 1]),
            *([1, 1, 0, 0], [1, 1, 0, 0]),
        ][::-1]
    )


def test_transposable_in_chunks(monkeypatch):
    scores = torch.rand(40, 40)
    expected = NM.prune_transposable(scores, n=4, m=8)
    monkeypatch.setattr("sparsekern.formats.transposable.chunk", lambda device: 50)
    assert torch.equal(NM.prune_transposable(scores, n=4, m=8), expected)


@pytest.mark.parametrize("shape", [(0, 0), (0, 8), (8, 0)])
def test_transposable_of_nothing(shape):
    assert NM.prune_transposable(torch.rand(shape), n=4, m=8).shape == shape


@pytest.mark.parametrize("shape", [(8, 10), (10, 8), (1, 4)])
def test_transposable_sizes(shape):
    message = r"scores must have sizes that are multiples of m = 4 for a transposable mask, got shape \["
    with pytest.raises(ValueError, match=message):
        NM.prune_transposable(torch.rand(shape), n=2, m=4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_transposable_scores_are_finite(bad):
    scores = torch.rand(8, 8)
    scores[2, 3] = bad
    with pytest.raises(ValueError, match=r"scores must (not hold NaN|be finite), got .* at flat index 19"):
        NM.prune_transposable(scores, n=2, m=4)


@pytest.mark.parametrize("spec", ["1:2", "2:4", "4:8", "8:16"])
def test_public_names_make_transposable_masks(spec):
    linear = torch.nn.Linear(48, 32)
    format = parse_format(spec)
    mask = sk.prune(linear.weight, format=spec, transposable=True)
    assert torch.equal(mask, NM.prune_transposable(linear.weight.detach().abs(), **format.options))
    assert torch.equal(format.from_mask(mask).to_mask(), mask)
    assert torch.equal(format.from_mask(mask.t()).to_mask(), mask.t())
    assert not torch.equal(mask, sk.prune(linear.weight, format=spec))
    layer = sk.SparseLinear.from_dense(linear, format=spec, transposable=True)
    assert torch.equal(layer.mask, mask)
    model = sk.sparsify(torch.nn.Sequential(linear), format=spec, transposable=True)
    assert torch.equal(model[0].mask, mask)


@pytest.mark.parametrize("spec", ["csr", "bsr4", "64:2:8"])
def test_other_formats_have_no_transposable_masks(spec):
    sparsity = 0.5 if parse_format(spec).fixed_sparsity is None else None
    message = f"format must be 'N:M' where transposable, got '{spec}'"
    with pytest.raises(ValueError, match=message):
        sk.prune(torch.randn(64, 64), sparsity, spec, transposable=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ValueError, match=f"layer '0': {message}"):
        sk.sparsify(model, sparsity=sparsity, format=spec, transposable=True)


def test_impossible_transposable_requests():
    linear = torch.nn.Linear(6, 8)
    sizes = r"multiples of m = 4 for a transposable mask, got shape \[8, 6\]"
    with pytest.raises(ValueError, match=sizes):
        sk.prune(linear.weight, format="2:4", transposable=True)
    model = torch.nn.Sequential(linear)
    with pytest.raises(ValueError, match=f"layer '0': .*{sizes}"):
        sk.sparsify(model, format="2:4", transposable=True)
    assert model[0] is linear
    with pytest.raises(ValueError, match=r"sparsity must be 0.5 or None, .* '2:4' .*, got 0.9"):
        sk.prune(torch.randn(8, 8), 0.9, "2:4", transposable=True)
    mask = sk.prune(linear.weight, format="2:4")
    with pytest.raises(ValueError, match="transposable must be False where mask is given"):
        sk.SparseLinear.from_dense(linear, mask=mask, format="2:4", transposable=True)


@pytest.mark.parametrize(("n", "m"), [(4, 16), (8, 16)])
def test_paths_do_not_run_in_circles(n, m):
    """Scores that differ by little more than rounding: with inexact sums, some paths crossed themselves."""
    scores = -(torch.rand(40 * m, 20 * m) ** 8)
    check_transposable(NM.prune_transposable(scores, n=n, m=m), n, m)
    scores = torch.rand(10 * m, 10 * m) + 1000.0
    check_transposable(NM.prune_transposable(scores, n=n, m=m), n, m)
