"""The roofline: what every case reaches of what the cores can compute and memory can deliver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..formats import parse_format
from .cases import Case
from .plot_speedup import layers
from .results import Row
from .timing import quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

C = TypeVar("C", Case, Row)

_GREY = "#5f6368"

# Okabe and Ito's colours, by the format's stem.
_COLOURS = {
    "csr": ("CSR", "#d55e00"),
    "bsr": ("BSR", "#0072b2"),
    "nm": ("N:M", "#009e73"),
    "vnm": ("V:N:M", "#cc79a7"),
    "dense": ("dense torch", "#9e9e9e"),
}
_MARKERS = {
    "forward": ("forward", "o"),
    "backward_input": ("backward, input", "s"),
    "backward_weight": ("backward, weight", "^"),
    "forward_backward": ("forward + backward", "D"),
    "decode float32": ("decode, float32", "v"),
    "decode bfloat16": ("decode, bfloat16", "P"),
}


def shown(cases: Iterable[C]) -> list[C]:
    """The cases or rows that have a place: layers, warm if any are, and up to 8 rows of x with cold weights.

    A weight that stays in the cache is not bound by memory.
    """
    known: list[C] = [case for case in cases if case.product in _MARKERS]
    decode: list[C] = [case for case in known if case.batch <= 8 and case.weights == "cold"]
    return layers(known) + decode


def point(row: Row) -> tuple[float, float]:
    """``(FLOP per byte, share of the FMA peak)``.

    The bytes are those that any kernel must move once per product: the weight with its indices, x (or the
    gradient) and y.
    """
    products = 3 if row.product == "forward_backward" else 1
    density = row.density if row.ours else 1.0
    flop = 2.0 * products * density * row.out_features * row.in_features * row.batch
    weight = row.read_fraction * row.read_gbs * 1e6 * row.median_ms
    element = getattr(torch, row.dtype).itemsize
    activations = row.batch * (row.in_features + row.out_features) * element
    return flop / (products * (weight + activations)), row.peak_fraction


def draw(rows: Sequence[Row]) -> Figure:
    """The picture: arithmetic intensity against speed, both logarithmic, under the two measured ceilings.

    Batch-major rows of the native kernels, and dense torch in grey, once per shape.
    """
    from matplotlib import pyplot

    fitting = shown(rows)
    peaks = {
        source: quantile([row.peak_gflops for row in fitting if row.peak_source == source], 0.5)
        for source in {row.peak_source for row in fitting}
    }
    peak = peaks[fitting[0].peak_source]
    bandwidth = quantile([row.read_gbs for row in fitting], 0.5)
    figure, axes = pyplot.subplots(figsize=(9.6, 6.4), dpi=150, layout="constrained")
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = _points(fitting, {source: other / peak for source, other in peaks.items()})
    for (stem, kind), places in points.items():
        x, shares = zip(*places, strict=True)
        axes.scatter(
            x,
            [peak * share for share in shares],
            s=42,
            marker=_MARKERS[kind][1],
            color=_COLOURS[stem][1],
            edgecolors="white",
            linewidths=0.6,
            alpha=0.85,
            zorder=2 if stem == "dense" else 3,
        )
    gpu = fitting[0].peak_source == "matmul"
    names = ("dense product", "memory copy") if gpu else ("float32 FMA peak", "memory read")
    _ceilings(axes, peak, bandwidth, names, [place for places in points.values() for place in places])
    _legends(axes, {stem for stem, _ in points}, {kind for _, kind in points})
    first = fitting[0]
    figure.suptitle(
        "Roofline: useful arithmetic against the bytes it needs\n"
        f"{first.machine}, {first.device}, {first.threads} threads, torch {first.torch}",
        fontsize=11,
    )
    return figure


def _points(
    rows: Sequence[Row], scale: Mapping[str, float]
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """What :func:`point` says, by colour and marker; shares of a peak times its ``scale``."""
    points: dict[tuple[str, str], dict[object, tuple[float, float]]] = {}
    for row in rows:
        if row.layout != "batch" or row.backend not in ("native", "reference", "dense"):
            continue
        dense = row.backend == "dense"
        stem = "dense" if dense else parse_format(row.format).kind.format
        kind = row.product if row.batch > 8 else f"decode {row.dtype}"
        # Dense torch ran beside every format and sparsity: once is enough.
        what = ("", 0.0) if dense else (row.format, row.sparsity)
        shape = (row.out_features, row.in_features, row.batch, row.dtype)
        intensity, share = point(row)
        place = (intensity, share * scale[row.peak_source])
        points.setdefault((stem, kind), {}).setdefault((shape, what), place)
    return {key: list(places.values()) for key, places in points.items()}


def _ceilings(
    axes: Axes,
    peak: float,
    bandwidth: float,
    names: tuple[str, str],
    places: Sequence[tuple[float, float]],
) -> None:
    """The two lines that no kernel passes, with their names, and axes to fit them and the points."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ridge = peak / bandwidth
    left = min(0.5 * ridge, *(0.6 * x for x, _ in places))
    right = max(2.0 * ridge, *(1.6 * x for x, _ in places))
    bottom = min(0.5, *(0.6 * share for _, share in places), left / ridge)
    axes.plot([left, ridge, right], [bandwidth * left, peak, peak], color=_GREY, linewidth=1.4, zorder=1)
    axes.plot(
        [0.75 * ridge, right],
        [0.75 * peak] * 2,
        color="#bdbdbd",
        linewidth=1,
        linestyle=(0, (4, 3)),
        zorder=1,
    )
    axes.set_xlim(left, right)
    axes.set_ylim(bottom * peak, 1.45 * peak)
    notes = (
        (f"{peak:.0f} GFLOP/s: {names[0]}", right, peak, (-4, 4), "right", 0),
        ("75 %", 0.75 * ridge, 0.75 * peak, (-6, -3), "right", 0),
        (f"{bandwidth:.0f} GB/s: {names[1]}", 1.2 * left, 1.2 * left * bandwidth, (0, 12), "left", 45),
    )
    for text, x, y, offset, side, angle in notes:
        axes.annotate(
            text,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            rotation=angle,
            rotation_mode="anchor",
            transform_rotates_text=bool(angle),
            color=_GREY,
            fontsize=9,
        )
    axes.set_xlabel("FLOP per byte of weight, indices, x and y")
    axes.set_ylabel("GFLOP/s on nonzeros")
    shares = axes.secondary_yaxis("right", functions=(_times(100 / peak), _times(peak / 100)))
    shares.set_ylabel(f"% of the {names[0].removeprefix('float32 ')}")
    for axis in (axes.xaxis, axes.yaxis, shares.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(which="major", color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: factor * value


def _legends(axes: Axes, stems: set[str], kinds: set[str]) -> None:
    """Colours say the format, markers what is computed."""
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

    for corner, entries in (
        (0.72, [(name, colour, "o") for stem, (name, colour) in _COLOURS.items() if stem in stems]),
        (1.0, [(name, _GREY, marker) for kind, (name, marker) in _MARKERS.items() if kind in kinds]),
    ):
        handles = [
            Line2D(
                [],
                [],
                color=colour,
                marker=marker,
                linestyle="",
                markersize=7,
                markeredgecolor="white",
            )
            for _, colour, marker in entries
        ]
        axes.add_artist(
            Legend(
                axes,
                handles,
                [name for name, _, _ in entries],
                loc="lower right",
                bbox_to_anchor=(corner, 0.0),
                fontsize=9,
                frameon=False,
            )
        )
