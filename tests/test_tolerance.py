"""The tolerance itself: it passes what is rounded, and fails what is wrong."""

import pytest
import torch
from tolerance import Exact, assert_product


def product(x, w):
    return x @ w


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 10, 5000])
def test_passes_rounded_results(dtype, length):
    x, w = torch.randn(30, length).to(dtype), torch.randn(length, 40).to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    assert_product((x.to(wide) @ w.to(wide)).to(dtype), product, x, w)


@pytest.mark.parametrize("length", [10, 1000])
def test_fails_a_missing_term(length):
    x, w = torch.randn(30, length), torch.randn(length, 40)
    with pytest.raises(AssertionError, match=rf"elements are off; worst at \(.*{length} terms"):
        assert_product(x[:, 1:] @ w[1:], product, x, w)


def test_names_the_worst_element():
    x, w = torch.randn(3, 10), torch.randn(10, 4)
    y = x @ w
    y[1, 3] += 1
    expected = r"my case: 1 of 12 elements are off; worst at \(1, 3\): expected .* got .* error 1 > bound"
    with pytest.raises(AssertionError, match=expected):
        assert_product(y, product, x, w, what="my case")


def test_fails_nan_and_what_an_empty_sum_is_not():
    x, w = torch.randn(3, 10), torch.randn(10, 4)
    y = x @ w
    y[2, 0] = torch.nan
    with pytest.raises(AssertionError, match=r"worst at \(2, 0\).*got nan"):
        assert_product(y, product, x, w)
    with pytest.raises(AssertionError, match=r"got 1e-30.*bound 0 \(0 terms\)"):
        assert_product(torch.full((3, 4), 1e-30), product, x[:, :0], w[:0])


def test_fails_another_shape_dtype_or_number_of_results():
    x, w = torch.randn(3, 10), torch.randn(10, 4)
    exact = Exact(product, x, w)
    with pytest.raises(AssertionError, match=r"shape must be \[3, 4\], got \[4, 3\]"):
        exact.check((x @ w).t())
    with pytest.raises(AssertionError, match=r"dtype must be torch\.float32, got torch\.float64"):
        exact.check((x @ w).double())
    with pytest.raises(AssertionError):
        exact.check((x @ w, x @ w))


def test_fails_bfloat16_accumulation():
    x, w = torch.randn(3, 1000).bfloat16(), torch.randn(1000, 4).bfloat16()
    total = torch.zeros(3, 4).bfloat16()
    for k in range(1000):
        total += x[:, k, None] * w[k]
    with pytest.raises(AssertionError, match="elements are off"):
        assert_product(total, product, x, w)
