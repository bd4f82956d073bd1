"""One mask update: against the reference, on dense masks, and streamed on sparse storage."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsekern import CSR
from sparsekern.training import drop_grow
from sparsekern.training.updater import CHUNKS, drop_grow_sparse, top_positions

RIGL = json.loads((Path(__file__).parent / "reference" / "rigl_step.json").read_text())["cases"]

cases = st.tuples(
    st.integers(1, 70),  # out
    st.integers(1, 50),  # in
    st.floats(0.0, 1.0),  # density
    st.floats(0.0, 1.0),  # fraction
    st.sampled_from([2, 5, 10**9]),  # distinct scores: few of them make ties
    st.integers(0, 2**31),  # seed
)


def random_case(out, inp, density, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(out, inp, generator=generator) < density
    scores = [torch.randint(levels, (out, inp), generator=generator).float() for _ in range(2)]
    return mask, scores[0], scores[1]


def plain_drop_grow(mask, drop, grow, fraction):
    """The rule in words: sort by (score, index), drop the last, grow the first."""
    active = mask.flatten().nonzero().flatten().tolist()
    count = int(len(active) * fraction)
    drop, grow = drop.flatten().tolist(), grow.flatten().tolist()
    kept = sorted(active, key=lambda i: (-drop[i], i))[: len(active) - count]
    inactive = sorted(set(range(mask.numel())) - set(kept), key=lambda i: (-grow[i], i))
    new = torch.zeros(mask.numel(), dtype=torch.bool)
    new[kept + inactive[:count]] = True
    return new.view(mask.shape)


def sparse_drop_grow(mask, drop, grow, fraction):
    pattern = CSR.from_mask(mask)
    move = drop_grow_sparse(
        pattern, pattern.gather(drop), lambda rows: grow[rows].clone(), int(pattern.nnz * fraction)
    )
    return pattern, move


@pytest.mark.parametrize("case", RIGL, ids=lambda c: f"{c['out']}x{c['inp']}")
def test_agrees_with_rigl_torch(case):
    shape = (case["out"], case["inp"])
    weight, gradient, expected = (
        torch.tensor(case[k]).view(shape) for k in ("weight", "dense_grad", "new_weight")
    )
    mask, new_mask = (torch.tensor(case[k], dtype=torch.bool).view(shape) for k in ("mask", "new_mask"))
    ours = drop_grow(mask, weight.abs(), gradient.abs(), case["drop_fraction"])
    assert torch.equal(ours, new_mask)
    pattern, move = sparse_drop_grow(mask, weight.abs(), gradient.abs(), case["drop_fraction"])
    assert torch.equal(move.pattern.to_mask(), new_mask)
    torch.testing.assert_close(move.pattern.scatter(move(pattern.gather(weight))), expected * new_mask)


@given(cases)
@settings(deadline=None)
def test_dense_and_sparse_follow_the_rule(case):
    out, inp, density, fraction, levels, seed = case
    mask, drop, grow = random_case(out, inp, density, levels, seed)
    new = drop_grow(mask, drop, grow, fraction)
    assert torch.equal(new, plain_drop_grow(mask, drop, grow, fraction))
    pattern, move = sparse_drop_grow(mask, drop, grow, fraction)
    assert torch.equal(move.pattern.to_mask(), new)
    # Survivors keep their value, the others start at the fill.
    values = torch.arange(1.0, pattern.nnz + 1)
    expected = torch.where(mask & new, pattern.scatter(values), -1.0 * new)
    assert torch.equal(move.pattern.scatter(move(values, -1.0)), expected)
    assert move.churn == pytest.approx(int((new & ~mask).sum()) / max(pattern.nnz, 1))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.29, 1.0])
def test_moves_exactly_int_of_nnz_times_fraction(fraction):
    mask = torch.zeros(10, 100, dtype=torch.bool)
    mask.view(-1)[:100] = True
    grow = torch.linspace(0, 1, 1000).view(10, 100)  # the active positions are the worst to grow
    new = drop_grow(mask, torch.rand(10, 100), grow, fraction)
    assert int(new.sum()) == 100
    assert int((new & ~mask).sum()) == int(100 * fraction)


def test_just_dropped_weights_may_grow_again():
    mask = torch.tensor([[True, True, False, False]])
    grow = torch.tensor([[9.0, 0.0, 1.0, 2.0]])
    assert drop_grow(mask, torch.tensor([[1.0, 2.0, 0.0, 0.0]]), grow, 0.5).tolist() == mask.tolist()


def test_infinite_scores_have_their_place():
    mask = torch.tensor([[True, False, False, False]])
    grow = torch.tensor([[0.0, -math.inf, math.inf, 1.0]])
    assert drop_grow(mask, torch.ones(1, 4), grow, 1.0).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("rows_ascend", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (16, 16), (33, 7), (257, 129)])
def test_top_positions_whatever_the_order_of_rows(shape, rows_ascend):
    # Ascending rows are the worst case: all that was kept so far is replaced again and again.
    scores = torch.rand(shape)
    if rows_ascend:
        scores += torch.arange(shape[0])[:, None]
    excluded = (torch.rand(shape) < 0.1).flatten().nonzero().flatten()
    count = math.ceil(0.2 * (scores.numel() - excluded.numel()))
    eligible = scores.flatten().clone()
    eligible[excluded] = -1.0
    found = top_positions(lambda rows: scores[rows].clone(), shape, excluded, count)
    assert torch.equal(found, eligible.topk(count).indices.sort().values)


def test_top_positions_recovers_from_a_guess_that_is_too_high():
    # Every 16th row, from which the floor is guessed, holds all the large scores.
    scores = torch.zeros(320, 40)
    scores[::CHUNKS] = 1.0 + torch.rand(320 // CHUNKS, 40)
    scores[5] = 0.5
    count = scores[::CHUNKS].numel() + 17
    found = top_positions(
        lambda rows: scores[rows].clone(), (320, 40), torch.empty(0, dtype=torch.long), count
    )
    expected = torch.cat([(scores.flatten() >= 1).nonzero().flatten(), torch.arange(200, 217)]).sort().values
    assert torch.equal(found, expected)


def test_gradients_that_are_zero_almost_everywhere():
    scores = torch.zeros(64, 32)
    scores[7, 9] = 1.0
    excluded = torch.tensor([0, 2])
    found = top_positions(lambda rows: scores[rows].clone(), (64, 32), excluded, 5)
    assert found.tolist() == [1, 3, 4, 5, 7 * 32 + 9]


def test_nan_scores_are_refused():
    mask = torch.ones(4, 4, dtype=torch.bool).triu()
    nan = torch.full((4, 4), float("nan"))
    with pytest.raises(ValueError, match="scores must not hold NaN"):
        drop_grow(mask, nan, torch.rand(4, 4), 0.5)
    with pytest.raises(ValueError, match="scores must not hold NaN"):
        drop_grow(mask, torch.rand(4, 4), nan, 0.5)
    with pytest.raises(
        ValueError, match="grow scores must be numbers at 5 inactive positions or more, got 0"
    ):
        sparse_drop_grow(mask, torch.rand(4, 4), nan, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(3, 4)}, "mask must be a dense bool tensor"),
        ({"drop_score": torch.ones(4, 3)}, r"drop_score must have the mask's shape \[3, 4\], got \[4, 3\]"),
        ({"grow_score": torch.ones(12)}, r"grow_score must have the mask's shape \[3, 4\], got \[12\]"),
        ({"fraction": 1.1}, r"fraction must be in \[0, 1\], got 1.1"),
        ({"fraction": float("nan")}, r"fraction must be in \[0, 1\], got nan"),
    ],
)
def test_bad_input(arguments, message):
    good = {"mask": torch.ones(3, 4) > 0, "drop_score": torch.ones(3, 4), "grow_score": torch.ones(3, 4)}
    with pytest.raises(ValueError, match=message):
        drop_grow(**good | {"fraction": 0.3} | arguments)
