"""The benchmark: the pictures of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_rows import made_up, made_up_run, rows_of
from sparsekern.benchmark import Case, plot, plot_speedup
from sparsekern.benchmark import plot_roofline as roofline_picture


def test_break_even_and_lines() -> None:
    (name, line), *others = plot_speedup.lines(made_up_run(), "csr", "forward_backward", "float32").items()
    assert name == "sparsekern, batch-major x"
    assert not others
    assert [(round(d, 6), round(mean, 6), low, high) for d, mean, low, high in line] == [
        (0.5, 0.5, 0.25, 1.0),
        (0.2, 4.0, 2.0, 8.0),
        (0.1, 5.0, 2.5, 10.0),
    ]
    at = plot_speedup.break_even(line)
    assert at is not None
    assert at == pytest.approx(1 - 0.5 * 0.4 ** (1 / 3))  # a third of the way, on both logarithmic axes
    assert plot_speedup.break_even(line[1:]) is None


def test_lines_of_the_other_families() -> None:
    rows = [
        made_up(sparsity, "native", "batch", 2.0, format=spec)
        for spec, sparsity in (
            ("csr", 0.5),
            ("bsr64", 0.5),
            ("bsr16", 0.9),
            ("2:4", 0.5),
            ("2:8", 0.75),
            ("64:2:8", 0.75),
        )
    ]
    rows += [made_up(0.9, "auto", "batch", 2.0, format="bsr32"), made_up(0.9, "dense", "batch", 1.0)]
    drawn = {f: plot_speedup.lines(rows, f, "forward_backward", "float32") for f in plot_speedup.FAMILIES}
    assert {family: list(lines) for family, lines in drawn.items()} == {
        "csr": ["sparsekern, batch-major x"],
        "bsr": ["bsr16", "bsr64", "csr"],
        "nm": ["2:M", "64:2:M", "csr"],
    }
    assert [point[0] for point in drawn["nm"]["2:M"]] == [0.5, 0.25]


def test_a_point_of_the_roofline() -> None:
    row = rows_of(Case(20, 30, 8, 0.5, "forward_backward"))[0]
    intensity, share = roofline_picture.point(row)
    assert share == row.peak_fraction
    weight = 4 * 300 + 2 * 300 + 4 * 21
    assert intensity == pytest.approx(2 * 300 * 8 / (weight + 4 * 8 * (20 + 30)))


def test_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = made_up_run()
    assert plot.plot(rows, tmp_path / "new" / "run.png") == [tmp_path / "new" / "run.png"]
    assert (tmp_path / "new" / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a picture needs layer-sized cases"):
        plot.plot([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    formats = (("bsr16", 0.5), ("bsr16", 0.9), ("2:4", 0.5), ("64:2:8", 0.75))
    rows += [made_up(s, "native", "batch", 2.0, format=spec) for spec, s in formats]
    cold = {"batch": 1, "weights": "cold", "product": "forward", "dtype": "bfloat16"}
    rows += [made_up(0.9, backend, "batch", 2.0, **cold) for backend in ("native", "dense", "dense float32")]
    with pytest.raises(ValueError, match=r"many\.png must be a folder: .* csr, bsr, nm"):
        plot.plot(rows, tmp_path / "many.png")
    names = ["csr.png", "bsr.png", "nm.png", "roofline.png"]
    assert plot.plot(rows, tmp_path / "all") == [tmp_path / "all" / name for name in names]
    assert all((tmp_path / "all" / name).read_bytes().startswith(b"\x89PNG") for name in names)
