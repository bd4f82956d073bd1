"""The picture of a run: speed-up over dense against sparsity, one panel per product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .cases import Case
from .results import Row
from .timing import geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

C = TypeVar("C", Case, Row)

Line = list[tuple[float, float, float, float]]
"""``(density, geometric mean, lowest, highest)`` of the speed-ups over the shapes, by falling density."""

# Okabe and Ito's colours, told apart by everyone. Ours are the warm ones.
_STYLES = {
    ("ours", "feature"): ("sparsekern, feature-major x", "#d55e00", "o-"),
    ("ours", "batch"): ("sparsekern, batch-major x", "#e69f00", "s-"),
    ("torch.sparse", "feature"): ("torch.sparse CSR", "#0072b2", "^--"),
    ("sparseprop", "batch"): ("SparseProp", "#009e73", "D--"),
}
_PRODUCTS = {
    "forward": "forward",
    "backward_input": "backward, input",
    "backward_weight": "backward, weight",
    "forward_backward": "forward + backward of a layer",
}


def require() -> None:
    """Raise ``RuntimeError`` unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RuntimeError("plotting needs matplotlib: pip install 'sparsekern[bench]'") from None


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the layer-sized cases of one run into ``path``, a PNG, SVG or PDF.

    A line is the geometric mean over the shapes, its band the lowest to the highest of them. Both axes are
    logarithmic, so that the straight grey line is a kernel that pays for nonzeros only, at dense speed each.

    Raises:
        ValueError: such cases are there at fewer than two sparsities.
        RuntimeError: matplotlib is not installed.
    """
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = shown(row for row in rows if row.speedup_vs_dense)
    dtypes = sorted({row.dtype for row in rows}, reverse=True)
    panels = [(product, dtype) for dtype in dtypes for product in _PRODUCTS if lines(rows, product, dtype)]
    columns = min(2, len(panels))
    figure, grid = pyplot.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(5.6 * columns, 0.9 + 4.0 * -(-len(panels) // columns)),
        dpi=150,
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axes, (product, dtype) in zip(grid.flat, panels, strict=False):
        _panel(axes, lines(rows, product, dtype))
        axes.set_title(
            _PRODUCTS[product] + (f", {dtype}" if len(dtypes) > 1 else ""), loc="left", fontsize=11
        )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    _axes(grid[0, 0], sorted({row.sparsity for row in rows}))
    for axes in grid[-1]:
        axes.set_xlabel("sparsity, %")
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up over dense")
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    first = rows[0]
    shapes = len({(row.out_features, row.in_features, row.batch) for row in rows})
    figure.suptitle(
        f"{first.format.upper()} against dense torch: mean and range over {shapes} shape{'s' * (shapes != 1)}"
        f"\n{first.machine}, {first.device}, {first.threads} threads, torch {first.torch}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def shown(cases: Iterable[C]) -> list[C]:
    """The cases or rows that the picture has a place for. Raises ``ValueError`` without two sparsities."""
    fitting = [c for c in cases if c.batch > 8 and c.weights == "warm" and c.product in _PRODUCTS]
    sparsities = sorted({c.sparsity for c in fitting})
    if len(sparsities) < 2:
        raise ValueError(
            "a picture needs layer-sized cases (batch above 8, warm) at two sparsities or more, "
            f"got {sparsities or 'none'}"
        )
    return fitting


def lines(rows: Sequence[Row], product: str, dtype: str) -> dict[tuple[str, str], Line]:
    """The lines of one panel by (contender, layout), in the order of the legend."""
    found: dict[tuple[str, str], Line] = {}
    for who, layout in _STYLES:
        ratios: dict[float, list[float]] = {}
        for row in rows:
            name = "ours" if row.ours else row.backend
            if (name, row.layout, row.product, row.dtype) == (
                who,
                layout,
                product,
                dtype,
            ) and row.speedup_vs_dense:
                ratios.setdefault(1 - row.sparsity, []).append(row.speedup_vs_dense)
        if ratios:
            found[who, layout] = [
                (d, geometric_mean(r), min(r), max(r)) for d, r in sorted(ratios.items(), reverse=True)
            ]
    return found


def break_even(line: Line) -> float | None:
    """The sparsity at which ``line`` last rises through 1, interpolated as drawn; None where it does not."""
    for (d0, s0, _, _), (d1, s1, _, _) in reversed(list(itertools.pairwise(line))):
        if s0 < 1 <= s1:
            share = math.log(s0) / (math.log(s0) - math.log(s1))
            return 1 - math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
    return None


def _panel(axes: Axes, drawn: dict[tuple[str, str], Line]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    densities = [point[0] for line in drawn.values() for point in line]
    ends = [max(densities), min(densities)]
    axes.plot(ends, [1 / d for d in ends], color="#bdbdbd", linewidth=1, label="1 / density", zorder=1)
    axes.axhline(
        1, color="#5f6368", linewidth=1.2, linestyle=(0, (4, 3)), label="break-even with dense", zorder=1
    )
    notes = [("break-even at", "#5f6368")]
    for key, line in drawn.items():
        label, colour, style = _STYLES[key]
        density, mean, low, high = zip(*line, strict=True)
        axes.fill_between(density, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(
            density,
            mean,
            style,
            color=colour,
            label=label,
            linewidth=1.8,
            markersize=5,
            markeredgecolor="white",
        )
        at = break_even(line)
        if at is not None:
            axes.plot([1 - at], [1], "|", color=colour, markersize=12, markeredgewidth=2, zorder=4)
            notes.append((f"{100 * at:.0f} %", colour))
        elif line[0][1] >= 1:
            notes.append((f"< {100 * (1 - line[0][0]):.3g} %", colour))
        else:
            notes.append((f"> {100 * (1 - line[-1][0]):.3g} %", colour))
    for i, (text, colour) in enumerate(notes):
        axes.annotate(
            text,
            (0, 1),
            xytext=(8, -14 - 12 * i),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            fontsize=8.5,
        )
    axes.grid(which="major", color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _axes(axes: Axes, sparsities: Sequence[float]) -> None:
    """Name the shared axes' ticks: the sparsities measured, and 1, 2, 5 times powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xlim(1.08 * (1 - sparsities[0]), (1 - sparsities[-1]) / 1.08)
    axes.xaxis.set_major_locator(FixedLocator([1 - s for s in sparsities]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{100 * (1 - density):.3g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
