"""Timing calls side by side: what is compared was measured in the same seconds, at the same clock speed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

Seconds = Callable[[Callable[[], object], int], float]


def race(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 11,
    min_seconds: float = 0.01,
    before_round: Callable[[], None] | None = None,
    seconds: Seconds | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each of ``calls``, one reading per round: A B C, B C A, C A B, ...

    A turn is one untimed call, which brings the contender's data back into the caches and wakes its threads,
    then as many timed ones in a row as fill ``min_seconds``. The first place rotates, so that nobody always
    leads. The clock drifts between rounds (3.6 to 4.0 GHz on the 2-core machine this was tuned on), less
    within one, so compare the readings of a round with each other: see :func:`speedup`.

    Args:
        calls: the contenders by name.
        rounds: readings per contender; at least 1.
        min_seconds: the least time of a reading, far above the timer's resolution.
        before_round: called before each round, e.g. to measure the machine's peak in the same seconds.
        seconds: takes a call and how often to make it, and returns the time of one (default: by the clock).
    """
    seconds = seconds or _seconds
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(calls)
    repeats = {name: _calibrate(call, min_seconds, seconds) for name, call in calls.items()}
    readings: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            if before_round is not None:
                before_round()
            start = turn % len(names) if names else 0
            for name in names[start:] + names[:start]:
                calls[name]()
                readings[name].append(seconds(calls[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return readings


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster ``fast`` is: the median of the ratios of paired readings."""
    return quantile([a / b for a, b in zip(slow, fast, strict=True)], 0.5)


def quantile(readings: Sequence[float], q: float) -> float:
    """The ``q`` quantile, 0 to 1, interpolated linearly between neighbours."""
    if not readings:
        raise ValueError("readings must not be empty")
    ordered = sorted(readings)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios: 2x and 0.5x make 1x."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def _calibrate(call: Callable[[], object], min_seconds: float, seconds: Seconds) -> int:
    """How many calls take ``min_seconds``. Warms up on the way: page faults, threads, lazy initialization."""
    call()
    repeats = 1
    while (total := repeats * seconds(call, repeats)) < min_seconds:
        # Aim 20 % above, by at most 10x a step: the first calls are slower than those to come.
        wanted = 1.2 * min_seconds / max(total, 1e-9)
        repeats = math.ceil(repeats * min(max(wanted, 1.5), 10.0))
    return repeats


def _seconds(call: Callable[[], object], repeats: int) -> float:
    times = range(repeats)
    start = perf_counter()
    for _ in times:
        call()
    return (perf_counter() - start) / repeats
