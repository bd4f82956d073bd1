"""Speed-up over dense against sparsity: a picture per family of formats, with a panel per product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..formats import parse_format
from .cases import Case
from .results import Row
from .timing import geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

C = TypeVar("C", Case, Row)

Line = list[tuple[float, float, float, float]]
"""``(density, geometric mean, lowest, highest)`` of the speed-ups over the shapes, by falling density."""

FAMILIES = {"csr": ("csr",), "bsr": ("bsr",), "nm": ("nm", "vnm")}
"""Pictures, and the stems of the formats in each."""

_TITLES = {"csr": "CSR", "bsr": "Block-sparse (BSR)", "nm": "N:M and V:N:M"}
_PEERS = {
    "csr": {"torch.sparse": "torch.sparse CSR", "sparseprop": "SparseProp"},
    "bsr": {"triton bsr": "torch's BSR in Triton"},
    "nm": {"cusparselt": "cuSPARSELt"},
}
_REFERENCE = "csr"
"""The line of every other family's picture that shows what its structure buys."""

# Okabe and Ito's colours, told apart by everyone. Ours are the warm ones.
_STYLES = {
    "sparsekern, feature-major x": ("#d55e00", "o-"),
    "sparsekern, batch-major x": ("#e69f00", "s-"),
    "torch.sparse CSR": ("#0072b2", "^--"),
    "SparseProp": ("#009e73", "D--"),
    _REFERENCE: ("#5f6368", ".:"),
}
_OTHERS = (("#e69f00", "s-"), ("#d55e00", "o-"), ("#cc79a7", "D-"), ("#0072b2", "^-"), ("#009e73", "v-"))
_PRODUCTS = {
    "forward": "forward",
    "backward_input": "backward, input",
    "backward_weight": "backward, weight",
    "forward_backward": "forward + backward of a layer",
}


def shown(cases: Iterable[C], family: str) -> list[C]:
    """The layer-sized cases or rows of a family."""
    return [
        case
        for case in layers(cases)
        if case.product in _PRODUCTS and parse_format(case.format).kind.format in FAMILIES[family]
    ]


def layers(cases: Iterable[C]) -> list[C]:
    """Those with layer-sized batches: with warm weights, or where there are none, as on GPUs, cold ones."""
    large = [case for case in cases if case.batch > 8]
    warm = [case for case in large if case.weights == "warm"]
    return warm or large


def label(row: Row, family: str) -> str | None:
    """The line of the family's picture that ``row`` belongs to, or None."""
    stem = parse_format(row.format).kind.format
    if family == "csr":
        if stem != "csr" or row.backend in ("auto", "dense"):
            return None
        return f"sparsekern, {row.layout}-major x" if row.ours else _PEERS[family].get(row.backend)
    if row.backend in _PEERS[family]:
        return _PEERS[family][row.backend]
    if not row.ours or row.backend == "auto" or row.layout != "batch":
        return None
    if stem not in FAMILIES[family]:
        return _REFERENCE if stem == _REFERENCE else None
    return row.format if stem == "bsr" else row.format.rpartition(":")[0] + ":M"


def lines(rows: Sequence[Row], family: str, product: str, dtype: str) -> dict[str, Line]:
    """The lines of one panel by label."""
    ratios: dict[str, dict[float, list[float]]] = {}
    for row in layers(rows):
        fits = (row.product, row.dtype) == (product, dtype)
        name = label(row, family) if fits and row.speedup_vs_dense else None
        if name is not None:
            ratios.setdefault(name, {}).setdefault(1 - row.sparsity, []).append(row.speedup_vs_dense or 0.0)
    return {
        name: [(d, geometric_mean(r), min(r), max(r)) for d, r in sorted(found.items(), reverse=True)]
        for name, found in sorted(ratios.items(), key=lambda item: _order(item[0]))
    }


def break_even(line: Line) -> float | None:
    """The sparsity at which ``line`` last rises through 1, interpolated as drawn; None where it does not."""
    for (d0, s0, _, _), (d1, s1, _, _) in reversed(list(itertools.pairwise(line))):
        if s0 < 1 <= s1:
            share = math.log(s0) / (math.log(s0) - math.log(s1))
            return 1 - math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
    return None


def draw(rows: Sequence[Row], family: str) -> Figure:
    """The picture of a family.

    A line is the geometric mean over the shapes, its band the lowest to the highest of them. Both axes are
    logarithmic, so that the straight grey line is a kernel that pays for nonzeros only, at dense speed each.
    """
    from matplotlib import pyplot

    fitting = shown(rows, family)
    dtypes = sorted({row.dtype for row in fitting}, reverse=True)
    panels = {
        (product, dtype): drawn
        for dtype in dtypes
        for product in _PRODUCTS
        if (drawn := lines(rows, family, product, dtype)).keys() - {_REFERENCE}
    }
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
    names = sorted({name for drawn in panels.values() for name in drawn}, key=_order)
    others = iter(itertools.cycle(_OTHERS))
    styles = {name: _STYLES.get(name) or next(others) for name in names}
    sparsities = sorted({row.sparsity for row in fitting})
    for axes, ((product, dtype), drawn) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, drawn, styles, sparsities)
        axes.set_title(
            _PRODUCTS[product] + (f", {dtype}" if len(dtypes) > 1 else ""), loc="left", fontsize=11
        )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    # N:M and V:N:M fix their sparsity, so a tick can name its formats.
    formats = {s: sorted({row.format for row in fitting if row.sparsity == s}, key=len) for s in sparsities}
    _axes(grid[0, 0], {s: ", ".join(names) if family == "nm" else "" for s, names in formats.items()})
    for axes in grid[-1]:
        axes.set_xlabel("sparsity, %")
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up over dense")
    handles = {
        name: handle
        for axes in grid.flat
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    first = fitting[0]
    shapes = len({(row.out_features, row.in_features, row.batch) for row in fitting})
    layout = "" if family == "csr" else ", batch-major x"
    figure.suptitle(
        f"{_TITLES[family]} against dense torch{layout}: mean and range over {shapes} shapes"
        f"\n{first.machine}, {first.device}, {first.threads} threads, torch {first.torch}",
        fontsize=11,
    )
    return figure


def _order(name: str) -> tuple[int, int, str]:
    """Of lines in panels and legend: those with a style of their own as listed, blocks by size, csr last."""
    if name == _REFERENCE:
        return len(_STYLES), 0, name
    side = name.removeprefix("bsr").partition("x")[0].partition(":")[0]
    return list(_STYLES).index(name) if name in _STYLES else 0, int(side) if side.isdecimal() else 0, name


def _panel(
    axes: Axes, drawn: dict[str, Line], styles: dict[str, tuple[str, str]], sparsities: Sequence[float]
) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = [1 - sparsities[0], 1 - sparsities[-1]]
    axes.plot(ends, [1 / d for d in ends], color="#bdbdbd", linewidth=1, label="1 / density", zorder=1)
    axes.axhline(
        1, color="#5f6368", linewidth=1.2, linestyle=(0, (4, 3)), label="break-even with dense", zorder=1
    )
    notes = [("break-even at", "#5f6368")]
    for name, line in drawn.items():
        colour, style = styles[name]
        reference = name == _REFERENCE
        if reference:  # as far as the family goes, and on to the edge of the panel
            inside = [point for point in line if point[0] >= 0.999 * ends[1]]
            line = line[: len(inside) + 1]
        density, mean, low, high = zip(*line, strict=True)
        if not reference:
            axes.fill_between(density, low, high, color=colour, alpha=0.13, linewidth=0)
            notes.append((_break_even_note(line), colour))
        axes.plot(
            density,
            mean,
            style,
            color=colour,
            label="csr, for comparison" if reference else name,
            linewidth=1.2 if reference else 1.8,
            markersize=5,
            markeredgecolor=colour if reference else "white",
        )
        at = break_even(line)
        if at is not None:
            axes.plot([1 - at], [1], "|", color=colour, markersize=12, markeredgewidth=2, zorder=4)
    for i, (text, colour) in enumerate(notes):
        axes.annotate(
            text,
            (0, 1),
            xytext=(8, -14 - 12 * i),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.grid(which="major", color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _break_even_note(line: Line) -> str:
    at = break_even(line)
    if at is not None:
        return f"{100 * at:.0f} %"
    if line[0][1] >= 1:
        return f"< {100 * (1 - line[0][0]):.3g} %"
    return f"> {100 * (1 - line[-1][0]):.3g} %"


def _axes(axes: Axes, sparsities: Mapping[float, str]) -> None:
    """Name the shared axes' ticks: sparsities, with a text below, and 1, 2, 5 times powers of ten."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xlim(1.08 * (1 - min(sparsities)), (1 - max(sparsities)) / 1.08)
    axes.xaxis.set_major_locator(FixedLocator([1 - s for s in sparsities]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FixedFormatter([f"{100 * s:.3g}\n{text}".rstrip() for s, text in sparsities.items()])
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
