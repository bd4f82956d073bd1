"""The one tolerance of all numerical tests: how far rounding alone can move a result.

A sum ``r = Σ_k t_k`` of n products, added in any order in arithmetic with unit roundoff ``u = eps / 2``, has
an error of at most ``n·u / (1 − n·u) · Σ_k |t_k|`` (Higham, Accuracy and Stability of Numerical Algorithms,
§3.1). That is the worst case. The rounding errors of random data are as good as independent with mean zero,
and then ``n`` becomes ``λ √n`` but for a probability below ``2 exp(−λ² / 2)``, 3e-14 for λ = 8 (Higham and
Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).

The smaller of the two is at most 8·√5000 · 2⁻²⁴ · 5000 = 0.17 average terms for the longest sum in these
tests, so that a single missing term shows. What is stored in a shorter type than it was summed in (bfloat16)
is rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LAMBDA = 8.0


def rounding_bound(expected: Tensor, magnitude: Tensor, terms: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest ``|got − expected|`` that rounding explains, elementwise.

    Args:
        expected: float64, ``Σ_k t_k``.
        magnitude: float64, ``Σ_k |t_k|``.
        terms: float64, how many terms each sum has.
        dtype: of the result. It is summed in float32, or in float64 where it is float64.
    """
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    steps = torch.minimum(terms, LAMBDA * terms.sqrt())
    # The expected sum was rounded too, in float64.
    bound = (steps * unit / (1 - steps * unit) + terms * 2.0**-53) * magnitude
    if dtype.itemsize < 4:
        bound = bound + torch.finfo(dtype).eps / 2 * (expected.abs() + bound)
    return bound


class Exact:
    """What the results of a product are in float64, and how much of them may be lost to rounding.

    Args:
        product: takes float64 tensors and returns one or several. Each result must be a sum of products of
            the inputs with no minus and no other factor: then the same function of ``|inputs|`` is the sum of
            the terms' magnitudes, and of ones it is the number of terms.
        inputs: the tensors that the tested code is given.
    """

    def __init__(self, product: Callable[..., Tensor | Sequence[Tensor]], *inputs: Tensor) -> None:
        doubles = [tensor.detach().double() for tensor in inputs]
        self.expected = _tuple(product(*doubles))
        self.magnitude = _tuple(product(*(tensor.abs() for tensor in doubles)))
        self.terms = _tuple(product(*(torch.ones_like(tensor) for tensor in doubles)))
        self.dtype = inputs[0].dtype

    def check(self, got: Tensor | Sequence[Tensor], what: str = "") -> None:
        """Assert that ``got``, of the first input's dtype, is exact up to rounding. ``what``: the case."""
        results = _tuple(got)
        assert len(results) == len(self.expected)
        for i, result in enumerate(results):
            name = f"{what} result {i}" if len(results) > 1 else what
            assert result.dtype == self.dtype, f"{name}: dtype must be {self.dtype}, got {result.dtype}"
            bound = rounding_bound(self.expected[i], self.magnitude[i], self.terms[i], self.dtype)
            _assert_within(result.detach(), self.expected[i], bound, self.terms[i], name)

    def check_activated(self, activation: Callable[[Tensor], Tensor], got: Tensor, what: str = "") -> None:
        """Assert that ``got`` is ``activation(product)`` up to rounding.

        For relu, gelu and silu, whose slope is at most 1.13. Computed in float32 they are off by at most
        2⁻²¹ of their argument: ours by 2.6e-7 of it.
        """
        argument, slope = self.expected[0], 1.13
        bound = slope * rounding_bound(argument, self.magnitude[0], self.terms[0], self.dtype)
        bound = bound + 2.0**-21 * argument.abs()
        expected = activation(argument)
        if self.dtype.itemsize < 4:
            bound = bound + torch.finfo(self.dtype).eps / 2 * (expected.abs() + bound)
        assert got.dtype == self.dtype, f"{what}: dtype must be {self.dtype}, got {got.dtype}"
        _assert_within(got.detach(), expected, bound, self.terms[0], what)


def assert_product(
    got: Tensor | Sequence[Tensor],
    product: Callable[..., Tensor | Sequence[Tensor]],
    *inputs: Tensor,
    what: str = "",
) -> None:
    """Assert that ``got`` is ``product(*inputs)`` up to rounding, see :class:`Exact`."""
    Exact(product, *inputs).check(got, what)


def _tuple(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _assert_within(got: Tensor, expected: Tensor, bound: Tensor, terms: Tensor, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: shape must be {list(expected.shape)}, got {list(got.shape)}"
    error = (got.double() - expected).abs()
    wrong = ~(error <= bound)  # so written, a NaN is wrong
    if not bool(wrong.any()):
        return
    excess = torch.where(wrong, error / bound, 0.0).nan_to_num(nan=torch.inf)
    flat = int(excess.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; worst at {at}: "
        f"expected {expected[at]:.9g}, got {got[at]:.9g}, "
        f"error {error[at]:.3g} > bound {bound[at]:.3g} ({terms[at]:.0f} terms)"
    )
