"""Numbers that change over a run: drop fractions, sparsities, temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# The share of the way from `first` to `last` that is still ahead, at u in [0, 1] of the way through.
_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1.0 - u,
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
    "cubic": lambda u: (1.0 - u) ** 3,
}


@dataclass(frozen=True)
class Schedule:
    """``last + (first − last) · curve(u)`` where u goes from 0 at ``begin`` to 1 at ``end``, and stays there.

    Args:
        curve: ``"linear"`` (1 − u), ``"cosine"`` ((1 + cos πu) / 2) or ``"cubic"`` ((1 − u)³).
        first: the value up to ``begin``.
        last: the value from ``end`` on.
        begin, end: an int is a step, a float is a fraction of ``total_steps``.

    Raises:
        ValueError: an unknown curve, a negative point in time, a fraction above 1.

    >>> Schedule("cosine", 0.3, 0.0, end=0.75)(step=375, total_steps=1000)
    0.15
    """

    curve: str
    first: float
    last: float
    begin: int | float = 0.0
    end: int | float = 1.0

    def __post_init__(self) -> None:
        if self.curve not in _CURVES:
            raise ValueError(f"curve must be one of {sorted(_CURVES)}, got {self.curve!r}")
        check_point("begin", self.begin)
        check_point("end", self.end)

    def __call__(self, step: int, total_steps: int) -> float:
        """The value at ``step`` of ``total_steps``."""
        begin, end = steps(self.begin, total_steps), steps(self.end, total_steps)
        if step >= end:
            return self.last
        if step <= begin:
            return self.first
        return self.last + (self.first - self.last) * _CURVES[self.curve]((step - begin) / (end - begin))


def check_point(name: str, point: int | float) -> None:
    """Raise unless ``point`` is a step or a fraction. The int 1, which few mean as a step, is refused."""
    number = isinstance(point, (int, float))
    if not number or not (0.0 <= point <= 1.0 if isinstance(point, float) else point == 0 or point > 1):
        raise ValueError(
            f"{name} must be a fraction of all steps (a float in [0.0, 1.0]) or a step (an int, 0 or above 1)"
            f", got {point!r}"
        )


def steps(point: int | float, total_steps: int) -> float:
    """A point in time in steps: an int is one already, a float is a fraction of ``total_steps``."""
    return point * total_steps if isinstance(point, float) else point


def constant(value: float) -> Schedule:
    """``value`` at every step."""
    return Schedule("linear", value, value)


def linear(first: float, last: float = 0.0, *, begin: int | float = 0.0, end: int | float = 1.0) -> Schedule:
    """From ``first`` to ``last`` on a straight line."""
    return Schedule("linear", first, last, begin, end)


def cosine(first: float, last: float = 0.0, *, begin: int | float = 0.0, end: int | float = 1.0) -> Schedule:
    """From ``first`` to ``last`` on half a cosine: flat at both ends (the drop fraction of RigL)."""
    return Schedule("cosine", first, last, begin, end)


def cubic(first: float, last: float, *, begin: int | float = 0.0, end: int | float = 1.0) -> Schedule:
    """From ``first`` to ``last``, fast at first: gradual magnitude pruning (Zhu and Gupta 2017, eq. 1)."""
    return Schedule("cubic", first, last, begin, end)
