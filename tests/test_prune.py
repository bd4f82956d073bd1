"""What holds for pruning onto every format."""

import pytest
import sparsekern as sk
import torch
from sparsekern.formats import parse_format, prune
from test_formats import SPECS, random_mask, shapes, specs

free = pytest.mark.parametrize("spec", [spec for spec in SPECS if ":" not in spec])
fixed = pytest.mark.parametrize("spec", [spec for spec in SPECS if ":" in spec])


@shapes
@specs
def test_pruned_masks_fit_the_format(spec, shape):
    format = parse_format(spec)
    mask = random_mask(format, shape)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert torch.equal(format.from_mask(mask).to_mask(), mask)


@specs
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_score_dtypes(spec, dtype):
    format = parse_format(spec)
    scores = torch.randint(0, 50, (66, 35))  # exact in all of them, and so are their sums in float32
    sparsity = 0.6 if format.fixed_sparsity is None else None
    expected = format.prune(scores.float(), sparsity)
    assert torch.equal(format.prune(scores.to(dtype), sparsity), expected)


@specs
def test_scores_of_any_layout(spec):
    format = parse_format(spec)
    scores = torch.rand(66, 35)
    sparsity = 0.6 if format.fixed_sparsity is None else None
    assert torch.equal(format.prune(scores.t().contiguous().t(), sparsity), format.prune(scores, sparsity))


@specs
def test_pruning_is_by_magnitude_and_leaves_no_graph(spec):
    sparsity = 0.6 if parse_format(spec).fixed_sparsity is None else None
    weight = torch.randn(66, 35, requires_grad=True)
    mask = prune(weight, sparsity, spec)
    assert torch.equal(mask, parse_format(spec).prune(weight.detach().abs(), sparsity))
    assert torch.equal(mask, sk.prune(-weight, sparsity, spec))
    assert not mask.requires_grad


@specs
def test_scores_below_zero(spec):
    """What is added to all scores changes no mask that holds the same number of them; groups always do."""
    format = parse_format(spec)
    scores = torch.randint(0, 50, (64, 32)).float()  # blocks of equal size
    sparsity = 0.6 if format.fixed_sparsity is None else None
    assert torch.equal(format.prune(scores - 100, sparsity), format.prune(scores, sparsity))


@specs
@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan"), float("inf")])
def test_sparsity_outside_the_range(spec, sparsity):
    with pytest.raises(ValueError, match=rf"sparsity must be in \[0, 1\), got {sparsity}"):
        prune(torch.randn(66, 35), sparsity, spec)


@free
def test_sparsity_is_needed(spec):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got None"):
        prune(torch.randn(66, 35), format=spec)


@fixed
def test_sparsity_is_fixed(spec):
    weight = torch.randn(66, 35)
    sparsity = parse_format(spec).fixed_sparsity
    expected = prune(weight, None, spec)
    assert torch.equal(prune(weight, sparsity, spec), expected)
    assert torch.equal(prune(weight, sparsity + 5e-7, spec), expected)
    wrong = 0.9 if sparsity < 0.8 else 0.1
    with pytest.raises(
        ValueError, match=rf"sparsity must be {sparsity:.6g} or None, .* '{spec}' .*, got {wrong}"
    ):
        prune(weight, wrong, spec)


@specs
@pytest.mark.parametrize("at", [(0, 0), (65, 34)])
def test_nan_scores(spec, at):
    weight = torch.randn(66, 35)
    weight[at] = torch.nan
    sparsity = 0.6 if parse_format(spec).fixed_sparsity is None else None
    message = f"scores must not hold NaN, got one at flat index {at[0] * 35 + at[1]}"
    with pytest.raises(ValueError, match=message):
        prune(weight, sparsity, spec)


@pytest.mark.parametrize("spec", ["bsr4", "64:2:8", "4:2:16"])
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_infinite_scores_have_no_sums(spec, infinity):
    scores = torch.randn(66, 35)
    scores[3, 5] = infinity
    sparsity = 0.6 if parse_format(spec).fixed_sparsity is None else None
    with pytest.raises(ValueError, match=f"scores must be finite, got {infinity} at flat index 110"):
        parse_format(spec).prune(scores, sparsity)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "csr"])
def test_scores_are_a_matrix(spec):
    with pytest.raises(ValueError, match=r"scores must be a matrix \[out, in\], got shape \[3, 4, 5\]"):
        parse_format(spec).prune(torch.rand(3, 4, 5), 0.5)


def test_unknown_format():
    with pytest.raises(ValueError, match=r"format must be .*, got '5:4'"):
        prune(torch.randn(4, 4), 0.5, "5:4")
