"""The pictures of a run: speed-up over dense for each family of formats, and the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from . import plot_roofline, plot_speedup
from .cases import Case
from .results import Row

C = TypeVar("C", Case, Row)

_FILES = (".png", ".svg", ".pdf")


def require() -> None:
    """Raise ``RuntimeError`` unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RuntimeError("plotting needs matplotlib: pip install 'sparsekern[bench]'") from None


def pictures(cases: Iterable[C], path: Path) -> list[str]:
    """The names of the pictures that ``path`` gets: families of formats, and ``"roofline"`` in a folder.

    Raises:
        ValueError: there is nothing to draw, or ``path`` is a file and several families could be drawn.
    """
    cases = list(cases)
    sparsities = {
        family: sorted({case.sparsity for case in plot_speedup.shown(cases, family)})
        for family in plot_speedup.FAMILIES
    }
    families = [family for family, found in sparsities.items() if len(found) > 1]
    file = path.suffix in _FILES
    if len(families) > 1 and file:
        raise ValueError(f"{path} must be a folder: these cases fill the pictures {', '.join(families)}")
    roofline = ["roofline"] if not file and plot_roofline.shown(cases) else []
    if not (families or roofline):
        got = sorted({sparsity for found in sparsities.values() for sparsity in found})
        raise ValueError(
            "a picture needs layer-sized cases (batch above 8, warm) at two sparsities or more, "
            f"got {got or 'none'}"
        )
    return families + roofline


def plot(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draw ``rows``, of one machine, into ``path``. Returns the files.

    Args:
        rows: of a run.
        path: a PNG, SVG or PDF for a picture of one family of formats, see :mod:`.plot_speedup`; or a folder
            for one per family and the roofline, see :mod:`.plot_roofline`.

    Raises:
        ValueError: as :func:`pictures` does.
        RuntimeError: matplotlib is not installed.
    """
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.speedup_vs_dense]
    names = pictures(rows, path)
    files = [path if path.suffix in _FILES else path / f"{name}.png" for name in names]
    for name, file in zip(names, files, strict=True):
        figure = plot_roofline.draw(rows) if name == "roofline" else plot_speedup.draw(rows, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        pyplot.close(figure)
    return files
