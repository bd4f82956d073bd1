"""N:M: N values in each group of M columns. The kernels are in :mod:`groups`."""

from __future__ import annotations

from torch import Tensor

from . import groups_launch
from .common import on_device
from .groups_launch import Groups


@on_device
def linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: list[Tensor],
    sizes: list[int],
    *,
    activation: int = 0,
) -> Tensor:
    """``y = σ(x Wᵀ + b)``."""
    return groups_launch.linear(_groups(pattern, sizes), x, values, bias, activation)


@on_device
def linear_backward_input(grad: Tensor, values: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
    """``dx = g W``."""
    return groups_launch.backward_input(_groups(pattern, sizes), grad, values)


@on_device
def linear_backward_weight(grad: Tensor, x: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
    """``dW = gᵀ x``, where W has values."""
    return groups_launch.backward_weight(_groups(pattern, sizes), grad, x)


def _groups(pattern: list[Tensor], sizes: list[int]) -> Groups:
    index, packed, *_ = pattern
    rows, columns, n, m = map(int, sizes)
    return Groups(rows, columns, n, m, rows, index, packed)
