"""The package's tolerance, :mod:`sparsekern.tolerance`, as assertions that say what is off and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from sparsekern import tolerance
from sparsekern.tolerance import as_tuple
from torch import Tensor


class Exact(tolerance.Exact):
    """With assertions."""

    def check(self, got: Tensor | Sequence[Tensor], what: str = "") -> None:
        """Assert that ``got``, of the first input's dtype, is exact up to rounding. ``what``: the case."""
        try:
            errors = self.errors(got)
        except ValueError as error:
            raise AssertionError(f"{what}: {error}") from None
        results = as_tuple(got)
        for i, (result, units) in enumerate(zip(results, errors, strict=True)):
            wrong = units > 1
            if not bool(wrong.any()):
                continue
            name = f"{what} result {i}" if len(results) > 1 else what
            at = tuple(int(k) for k in torch.unravel_index(units.argmax(), units.shape))
            expected, bound, terms = self.expected[i][at], self.bounds[i][at], self.terms[i][at]
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off; worst at {at}: "
                f"expected {expected:.9g}, got {result[at]:.9g}, "
                f"error {(result[at].double() - expected).abs():.3g} > bound {bound:.3g} ({terms:.0f} terms)"
            )

    def check_activated(self, activation: Callable[[Tensor], Tensor], got: Tensor, what: str = "") -> None:
        """Assert that ``got`` is ``activation(product)`` up to rounding."""
        self.activated(activation).check(got, what)


def assert_product(
    got: Tensor | Sequence[Tensor],
    product: Callable[..., Tensor | Sequence[Tensor]],
    *inputs: Tensor,
    what: str = "",
) -> None:
    """Assert that ``got`` is ``product(*inputs)`` up to rounding, see :class:`Exact`."""
    Exact(product, *inputs).check(got, what)
