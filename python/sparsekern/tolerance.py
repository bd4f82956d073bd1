"""The one tolerance of everything that is checked: how far rounding alone can move a result.

A sum ``r = Σ_k t_k`` of n products, added in any order in arithmetic with unit roundoff ``u = eps / 2``, has
an error of at most ``n·u / (1 − n·u) · Σ_k |t_k|`` (Higham, Accuracy and Stability of Numerical Algorithms,
§3.1). That is the worst case. The rounding errors of random data are as good as independent with mean zero,
and then ``n`` becomes ``λ √n`` but for a probability below ``2 exp(−λ² / 2)``, 3e-14 for λ = 8 (Higham and
Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).

The smaller of the two is at most 8·√5000 · 2⁻²⁴ · 5000 = 0.17 average terms for sums of 5000, the longest
that are checked, so that a single missing term shows. What is stored in a shorter type than it was summed in
(bfloat16, float16) is rounded once more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

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
    return _stored(expected, bound, dtype)


def _stored(expected: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """``bound`` after a result that was summed in float32 is rounded to ``dtype``."""
    if dtype.itemsize >= 4:
        return bound
    kind = torch.finfo(dtype)
    # Below kind.tiny (6e-5 in float16) numbers are kind.tiny · kind.eps apart. Sums of nothing are exact.
    rounding = kind.eps / 2 * (expected.abs() + bound).clamp(min=kind.tiny)
    return torch.where((expected == 0) & (bound == 0), bound, bound + rounding)


class Exact:
    """What the results of a product are in float64, and how much of them may be lost to rounding.

    Args:
        product: takes float64 tensors and returns one or several. Each result must be a sum of products of
            the inputs with no minus and no other factor: then the same function of ``|inputs|`` is the sum of
            the terms' magnitudes, and of ones it is the number of terms.
        inputs: the tensors that the checked code is given.

    Attributes:
        expected, bounds, terms: float64, one of each per result: its exact numbers, how far rounding may move
            them, and of how many terms they are sums.
        dtype: what the results must be of, the first input's.
    """

    def __init__(self, product: Callable[..., Tensor | Sequence[Tensor]], *inputs: Tensor) -> None:
        doubles = [tensor.detach().double() for tensor in inputs]
        self.dtype = inputs[0].dtype
        self.expected = as_tuple(product(*doubles))
        magnitude = as_tuple(product(*(tensor.abs() for tensor in doubles)))
        self.terms = as_tuple(product(*(torch.ones_like(tensor) for tensor in doubles)))
        sums = zip(self.expected, magnitude, self.terms, strict=True)
        self.bounds = tuple(rounding_bound(*of_one, self.dtype) for of_one in sums)

    def activated(self, activation: Callable[[Tensor], Tensor]) -> Self:
        """Of ``activation(product)``, computed in one go: relu, gelu and silu, whose slope is at most 1.13.

        Computed in float32 they are off by at most 2⁻²¹ of their argument: ours by 2.6e-7 of it.
        """
        other = copy.copy(self)
        other.expected = tuple(activation(argument) for argument in self.expected)
        other.bounds = tuple(
            _stored(result, 1.13 * bound + 2.0**-21 * argument.abs(), self.dtype)
            for argument, result, bound in zip(self.expected, other.expected, self.bounds, strict=True)
        )
        return other

    def errors(self, got: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """``|got − expected|`` of each result in units of its bound: right up to 1, infinite where NaN.

        Raises:
            ValueError: another number of results, a wrong shape or dtype.
        """
        results = as_tuple(got)
        if len(results) != len(self.expected):
            raise ValueError(f"got must be {len(self.expected)} results, got {len(results)}")
        errors = []
        for result, expected, bound in zip(results, self.expected, self.bounds, strict=True):
            if result.dtype != self.dtype:
                raise ValueError(f"dtype must be {self.dtype}, got {result.dtype}")
            if result.shape != expected.shape:
                raise ValueError(f"shape must be {list(expected.shape)}, got {list(result.shape)}")
            error = (result.detach().to(expected.device).double() - expected).abs()
            errors.append(torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=torch.inf))
        return errors

    def worst(self, got: Tensor | Sequence[Tensor]) -> float:
        """The largest of :meth:`errors`; 0 where there are no numbers."""
        return max((float(error.max()) for error in self.errors(got) if error.numel()), default=0.0)


def as_tuple(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One or several results as several."""
    return (value,) if isinstance(value, Tensor) else tuple(value)
