"""Rows as text: a table of times and ratios, geometric means, and how ``"auto"`` fares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .results import Key, Row
from .timing import geometric_mean, quantile

K = TypeVar("K")


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
    """A table per product and dtype: a line per case and backend of ours, each peer's time and the ratio."""
    blocks = []
    for (product, dtype), block in grouped(rows, lambda row: (row.product, row.dtype)).items():
        peers = peers_of(block)
        names = list(dict.fromkeys(row.backend for row in block if not row.ours))
        header = [f"{product}, {dtype}", "batch", "format", "sparsity", "weights", "backend", "x major"]
        header += ["ms", "p20", "p80"]
        header += [text for name in names for text in (name, "ratio")] + ["of peak", "of read"]
        lines = []
        for row in sorted((row for row in block if row.ours), key=lambda row: (_shape(row), row.weights)):
            line = [f"{row.out_features}x{row.in_features}", str(row.batch), row.format]
            line += [percent(row.sparsity), row.weights, row.backend, row.layout]
            line += [milliseconds(row), f"{row.p20_ms:.3g}", f"{row.p80_ms:.3g}"]
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


def versus_dense(row: Row, peers: dict[str, Row]) -> float | None:
    """How many times faster ``row`` is than dense torch: in its dtype or in float32, whichever is faster."""
    ratios = [versus(row, peers.get(name)) for name in ("dense", "dense float32")]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def means(rows: Sequence[Row]) -> str:
    """Geometric means over the shapes, per product, format, sparsity and layout, against every peer.

    Rows of ``"auto"`` have a table of their own, :func:`auto`: a mean over its batches says nothing.
    """
    peers = peers_of(rows)
    ours = [row for row in rows if row.ours and row.backend != "auto"]
    names = list(dict.fromkeys(row.backend for row in rows if not row.ours))
    lines = []
    for key, block in grouped(ours, lambda row: (row.product, row.dtype, row.weights, row.layout)).items():
        for (spec, sparsity), group in grouped(block, lambda row: (row.format, row.sparsity)).items():
            line = [*key, spec, percent(sparsity), str(len(group))]
            for name in names:
                line.append(times(mean([versus(row, peers[row.case].get(name)) for row in group])))
            lines.append([*line, percent(mean([row.peak_fraction for row in group]))])
    header = ["geometric mean", "dtype", "weights", "x major", "format", "sparsity", "cases"]
    return table(header + [f"vs {name}" for name in names] + ["of peak"], lines, left=5) if lines else ""


def auto(rows: Sequence[Row], slowest: int = 10) -> str:
    """How ``"auto"`` fares against dense torch of the same dtype: the worst cases, and where they are.

    Args:
        rows: of a run; others than ``"auto"``'s are passed over.
        slowest: so many of the slowest cases are listed.
    """
    ours = sorted(
        (row for row in rows if row.backend == "auto" and row.speedup_vs_dense),
        key=lambda row: row.speedup_vs_dense or 0.0,
    )
    if not ours:
        return ""
    lines = []
    groups = grouped(ours, lambda row: (row.product, row.dtype, row.layout))
    for key, group in groups.items():
        ratios = [row.speedup_vs_dense or 0.0 for row in group]
        figures = [times(quantile(ratios, q)) for q in (0.0, 0.05, 0.5)]
        lines.append([*key, _where(group[0]), str(len(group)), *figures])
    header = ["auto vs dense", "dtype", "x major", "worst at", "cases", "worst", "5th percentile", "median"]
    summary = table(header, lines, left=4)
    places = [
        [row.product, row.dtype, _where(row), milliseconds(row), times(row.speedup_vs_dense)]
        for row in ours[:slowest]
    ]
    return f"{summary}\n\n{table(['slowest of auto', 'dtype', 'where', 'ms', 'vs dense'], places, left=3)}"


def noise(rows: Sequence[Row]) -> str:
    """How quiet the machine was: in how many rows the middle 60 % of the readings lie within 20 %."""
    quiet = sum(row.p80_ms <= 1.2 * row.p20_ms for row in rows)
    return f"p80 is within 1.2x p20 in {quiet} of {len(rows)} rows; where few are, the machine was busy"


def grouped(rows: Iterable[Row], key: Callable[[Row], K]) -> dict[K, list[Row]]:
    """The rows by their key, in the order in which keys appear."""
    groups: dict[K, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def peers_of(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """Per case, the row of each contender that is not ours."""
    return {
        case: {row.backend: row for row in group if not row.ours}
        for case, group in grouped(rows, lambda row: row.case).items()
    }


def mean(ratios: Sequence[float | None]) -> float | None:
    """The geometric mean of those that are known; None where none is."""
    # An empty pattern has no multiply-adds: its share of the peak is 0.
    known = [ratio for ratio in ratios if ratio]
    return geometric_mean(known) if known else None


def _shape(row: Row) -> tuple[int, int, int]:
    return row.out_features, row.in_features, row.batch


def _where(row: Row) -> str:
    size = f"{row.out_features}x{row.in_features}, batch {row.batch}"
    return f"{row.format} {percent(row.sparsity)}, {size}"
