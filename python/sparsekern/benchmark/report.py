"""Rows as text: a table of times and ratios, geometric means, and the project's goals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .results import Key, Row
from .timing import geometric_mean


def table(header: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Aligned columns; the first ``left`` to the left, the others to the right."""
    rows = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def milliseconds(row: Row | None) -> str:
    """The median, to three digits."""
    return "" if row is None else f"{row.median_ms:.3g}" if row.median_ms < 100 else f"{row.median_ms:.0f}"


def times(ratio: float | None) -> str:
    """A ratio, as ``2.00x``."""
    return "" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def percent(fraction: float | None) -> str:
    """A share, as ``90 %``, to three digits."""
    return "" if fraction is None else f"{100 * fraction:.3g} %"


def cases(rows: Sequence[Row]) -> str:
    """A table per product and dtype: a line per case and layout of x, each peer's time, the ratio to it."""
    blocks = []
    for (product, dtype), group in itertools.groupby(rows, key=lambda row: (row.product, row.dtype)):
        block = list(group)
        peers = {
            key: {row.backend: row for row in members if not row.ours} for key, members in _by_case(block)
        }
        names = list(dict.fromkeys(row.backend for row in block if not row.ours))
        header = [f"{product}, {dtype}", "batch", "sparsity", "weights", "x major", "ms", "p20", "p80"]
        header += [text for name in names for text in (name, "ratio")] + ["of peak", "of read"]
        lines = []
        for row in (row for row in block if row.ours):
            line = [
                f"{row.out_features}x{row.in_features}",
                str(row.batch),
                percent(row.sparsity),
                row.weights,
            ]
            line += [row.layout, milliseconds(row), f"{row.p20_ms:.3g}", f"{row.p80_ms:.3g}"]
            for name in names:
                peer = peers[row.case].get(name)
                line += [milliseconds(peer), times(versus(row, peer))]
            lines.append([*line, percent(row.peak_fraction), percent(row.read_fraction)])
        blocks.append(table(header, lines))
    return "\n\n".join(blocks)


def versus(row: Row, peer: Row | None) -> float | None:
    """How many times faster ``row`` is than ``peer``: the paired ratio if rows hold it, else of medians."""
    if peer is None:
        return None
    kept = {"dense": row.speedup_vs_dense, "torch.sparse": row.speedup_vs_torch_sparse}.get(peer.backend)
    return peer.median_ms / row.median_ms if kept is None else kept


def means(rows: Sequence[Row]) -> str:
    """Geometric means over the shapes, per product, sparsity and layout, against every peer."""
    peers = {(row.case, row.backend): row for row in rows if not row.ours}
    names = list(dict.fromkeys(row.backend for row in rows if not row.ours))
    groups: dict[tuple[str, str, str, float, str], list[Row]] = {}
    for row in rows:
        if row.ours:
            groups.setdefault((row.product, row.dtype, row.weights, row.sparsity, row.layout), []).append(row)
    lines = []
    for (product, dtype, weights, sparsity, layout), group in groups.items():
        line = [product, dtype, weights, layout, percent(sparsity), str(len(group))]
        for name in names:
            ratios = [versus(row, peers.get((row.case, name))) for row in group]
            line.append(times(_mean(ratios)))
        lines.append([*line, percent(_mean([row.peak_fraction for row in group]))])
    header = ["geometric mean", "dtype", "weights", "x major", "sparsity", "cases"]
    return table(header + [f"vs {name}" for name in names] + ["of peak"], lines, left=4)


@dataclass(frozen=True)
class Goal:
    """A bound on a geometric mean over our rows that ``select`` takes."""

    text: str
    bound: float
    measure: Callable[[Row, dict[str, Row]], float | None]
    select: Callable[[Row], bool]
    at_most: bool = False


def _dense(row: Row, peers: dict[str, Row]) -> float | None:
    return versus(row, peers.get("dense"))


def _torch_sparse(row: Row, peers: dict[str, Row]) -> float | None:
    return versus(row, peers.get("torch.sparse"))


def _sparseprop(row: Row, peers: dict[str, Row]) -> float | None:
    return versus(row, peers.get("sparseprop"))


def _slowdown(row: Row, peers: dict[str, Row]) -> float | None:
    ratio = _dense(row, peers)
    return None if ratio is None else 1 / ratio


def _layers(product: str, *sparsities: float) -> Callable[[Row], bool]:
    return lambda row: row.batch > 8 and row.product == product and row.sparsity in sparsities


def _tiny(product: str) -> Callable[[Row], bool]:
    return lambda row: (
        row.product == product and (row.out_features, row.in_features, row.batch) == (64, 64, 1)
    )


GOALS = (
    Goal("forward vs torch.sparse, 80-95 %", 3.0, _torch_sparse, _layers("forward", 0.8, 0.9, 0.95)),
    Goal(
        "forward, share of the FMA peak, 80-90 %",
        0.6,
        lambda row, _: row.peak_fraction,
        _layers("forward", 0.8, 0.9),
    ),
    *(
        Goal(f"forward+backward vs dense, {100 * s:g} %", bound, _dense, _layers("forward_backward", s))
        for s, bound in ((0.8, 3.0), (0.9, 6.0), (0.95, 9.0), (0.98, 14.0))
    ),
    Goal(
        "forward+backward vs SparseProp, 80-98 %",
        2.0,
        _sparseprop,
        _layers("forward_backward", 0.8, 0.9, 0.95, 0.98),
    ),
    Goal("forward+backward vs dense, 60 %: break-even", 1.0, _dense, _layers("forward_backward", 0.6)),
    Goal(
        "batch 1-8, 4096x4096, 90 %, vs dense",
        5.0,
        _dense,
        lambda row: row.batch <= 8 and row.out_features == row.in_features == 4096 and row.sparsity == 0.9,
    ),
    *(
        Goal(
            f"{product}, 64x64, batch 1: time over nn.Linear's", 3.0, _slowdown, _tiny(product), at_most=True
        )
        for product in ("forward", "forward_autograd")
    ),
)
"""Float32 on a CPU, over the shapes measured; the suites' shapes are the ones the bounds were set for."""


def goals(rows: Sequence[Row]) -> str:
    """What was reached of :data:`GOALS`, per layout of x and per weights; "" where the rows touch none."""
    peers = {key: {row.backend: row for row in members if not row.ours} for key, members in _by_case(rows)}
    lines = []
    for goal in GOALS:
        found: dict[tuple[str, str], list[float | None]] = {}
        for row in rows:
            if row.ours and row.dtype == "float32" and goal.select(row):
                found.setdefault((row.layout, row.weights), []).append(goal.measure(row, peers[row.case]))
        for (layout, weights), measured in found.items():
            reached = _mean(measured)
            if reached is None:
                continue
            met = reached <= goal.bound if goal.at_most else reached >= goal.bound
            show = percent if goal.bound < 1 else times
            bound = f"{'<=' if goal.at_most else '>='} {show(goal.bound)}"
            lines.append([goal.text, layout, weights, show(reached), bound, "met" if met else "not met"])
    return (
        table(["goal (geometric mean)", "x major", "weights", "reached", "goal", ""], lines, left=3)
        if lines
        else ""
    )


def noise(rows: Sequence[Row]) -> str:
    """How quiet the machine was: in how many rows the middle 60 % of the readings lie within 20 %."""
    quiet = sum(row.p80_ms <= 1.2 * row.p20_ms for row in rows)
    return f"p80 is within 1.2x p20 in {quiet} of {len(rows)} rows; where few are, the machine was busy"


def _by_case(rows: Sequence[Row]) -> Iterable[tuple[Key, list[Row]]]:
    grouped: dict[Key, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.case, []).append(row)
    return grouped.items()


def _mean(ratios: Sequence[float | None]) -> float | None:
    known = [
        ratio for ratio in ratios if ratio
    ]  # an empty pattern has no multiply-adds: its share of the peak is 0
    return geometric_mean(known) if known else None
