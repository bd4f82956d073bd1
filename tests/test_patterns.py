"""What patterns of every format can do: masks, gather and scatter, moving, pruning."""

import copy
import pickle

import pytest
import sparsekern as sk
import torch
from cases import DENSITIES, LARGE_SHAPES, MASKS, MEDIUM_SHAPES, SMALL_SHAPES, free, random_pattern
from hypothesis import given
from hypothesis import strategies as st
from sparsekern.formats import parse_format

SHAPES = (*SMALL_SHAPES, *MEDIUM_SHAPES, LARGE_SHAPES[1])

formats = pytest.mark.parametrize("format", MASKS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("format", "density"), [(f, d) for f in MASKS for d in DENSITIES if d == 1.0 or free(f, d) is not None]
)
def test_round_trips(format, shape, density):
    mask = MASKS[format](*shape, density)
    pattern = parse_format(format).from_mask(mask)
    assert pattern.shape == shape
    assert pattern.nnz == int(mask.sum())
    assert pattern.density == pytest.approx(mask.double().mean().item())
    assert torch.equal(pattern.to_mask(), mask)
    dense = torch.randn(shape)
    values = pattern.gather(dense)
    assert values.shape == pattern.values_shape
    assert torch.equal(pattern.scatter(values), dense * mask)
    assert torch.equal(pattern.gather(pattern.scatter(values)), values)
    index = pattern.flat_index()
    inside = index < dense.numel()  # the rest is padding
    assert torch.equal(dense.view(-1)[index[inside]], values[inside])
    assert not values[~inside].any()
    again = parse_format(format).from_state(shape, dict(pattern.state()))
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), again.tensors(), strict=True))


@formats
def test_gather_takes_any_strides(format):
    pattern = random_pattern(format, (100, 70), 0.3)
    dense = torch.randn(70, 100).t()
    assert torch.equal(pattern.gather(dense), pattern.gather(dense.contiguous()))


@formats
def test_gather_and_scatter_are_differentiable(format):
    pattern = random_pattern(format, (6, 5), 0.5)
    dense = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(pattern.values_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pattern.gather, dense)
    assert torch.autograd.gradcheck(pattern.scatter, values)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), lambda p: p.to("cpu")]
)
@formats
def test_copies_are_equal(format, copied):
    pattern = random_pattern(format, (100, 70), 0.3)
    assert pattern.operands is pattern.operands  # a copy must not remember the original's
    other = copied(pattern)
    assert type(other) is type(pattern)
    assert other.shape == pattern.shape
    assert all(torch.equal(a, b) for a, b in zip(pattern.tensors(), other.tensors(), strict=True))
    assert all(a is b for a, b in zip(other.operands[0], other.tensors(), strict=True))
    assert other.operands[1] == pattern.sizes()


@formats
def test_moves_to_another_device(format):
    pattern = random_pattern(format, (100, 70), 0.3)
    assert pattern.operands[0][0].device.type == "cpu"
    moved = pattern.to("meta")
    assert moved.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in moved.operands[0])
    assert pattern.device.type == "cpu"
    assert moved.values_shape == pattern.values_shape
    assert "device=meta" in repr(moved)


@formats
def test_says_what_it_is(format):
    pattern = random_pattern(format, (100, 70), 0.3)
    assert f"shape=(100, 70), nnz={pattern.nnz}, density=" in repr(pattern)
    assert pattern.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in pattern.tensors())


@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    sparsity=st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
@formats
def test_prune_keeps_the_largest(format, rows, columns, sparsity, data):
    # Few distinct scores, so that most are ties.
    flat = data.draw(st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(flat, dtype=torch.float32).view(rows, columns)
    sparsity = free(format, sparsity)
    mask = sk.prune(weight, sparsity, format)
    assert torch.equal(parse_format(format).from_mask(mask).to_mask(), mask)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert torch.equal(mask, sk.prune(weight.clone(), sparsity, format))
    if format == "csr":
        count = round(rows * columns * (1 - sparsity))
        order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[:count]
        assert mask.view(-1).nonzero().squeeze(1).tolist() == sorted(order)


@formats
def test_the_smallest_integer_has_the_largest_magnitude(format):
    """-128 is an int8, and 128 is not."""
    weight = torch.randint(-127, 128, (32, 70), dtype=torch.int8)
    weight[::4, 3::5] = -128
    sparsity = free(format, 0.9)
    assert torch.equal(sk.prune(weight, sparsity, format), sk.prune(weight.double(), sparsity, format))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64], ids=str)
@formats
def test_prune_takes_any_dtype_and_strides(format, dtype):
    weight = torch.randint(-9, 10, (70, 100)).to(dtype).t()
    sparsity = free(format, 0.7)
    expected = sk.prune(weight.double().contiguous(), sparsity, format)
    assert torch.equal(sk.prune(weight, sparsity, format), expected)
