"""The benchmark: a results file that stays whole, tables and goals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from benchmark_rows import made_up, made_up_run, rows_of
from sparsekern.benchmark import PEERS, Case, append, goals, last_run, read, report


def test_results_round_trip_and_append(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    rows = rows_of(Case(8, 8, 4, 0.5), PEERS)
    first, second = rows, [dataclasses.replace(row, run="9999-01-01T00:00:00Z") for row in rows]
    append(path, first)
    before = path.read_bytes()
    append(path, second)
    assert path.read_bytes().startswith(before)
    back = read(path)
    assert len(back) == 4
    assert back[0].median_ms == pytest.approx(first[0].median_ms, rel=1e-5)
    assert back[0].case == first[0].case
    assert last_run(back) == back[2:]
    append(tmp_path / "again.csv", back)
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", ["", "a,b,c\n1,2,3\n"])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"other.csv must be a results file with the columns run,commit,.*; got"
    ):
        read(path)
    if text:
        with pytest.raises(ValueError, match="must be a results file"):
            append(path, [])
        assert path.read_text() == text


@pytest.mark.parametrize(("whole", "broken"), [(",warm,", ",warm"), (",8,", ",x,"), (",8,", ",,")])
def test_a_broken_row_is_named(tmp_path: Path, whole: str, broken: str) -> None:
    path = tmp_path / "results.csv"
    append(path, rows_of(Case(8, 8, 4, 0.5), PEERS))
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace(whole, broken)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"results.csv, line 3: must hold 27 fields of a row"):
        read(path)


def test_tables_and_means() -> None:
    rows = made_up_run()
    table = report.cases(rows)
    assert " ".join(table.splitlines()[0].split()) == (
        "forward_backward, float32 batch format sparsity weights backend x major ms p20 p80 dense ratio "
        "of peak of read"
    )
    assert len(table.splitlines()) == 2 + 6
    assert "8.00x" in table
    means = report.means(rows).splitlines()
    assert [line.split()[5:8:2] + line.split()[8:9] for line in means[2:]] == [
        ["50", "2", "0.50x"],
        ["80", "2", "4.00x"],
        ["90", "2", "5.00x"],
    ]


def test_goals_say_met_and_not_met() -> None:
    lines = {line.split("  ")[0]: line for line in goals.goals(made_up_run()).splitlines()}
    assert lines["forward+backward vs dense, 80 %"].endswith("4.00x  >= 3.00x      met")
    assert lines["forward+backward vs dense, 90 %"].endswith("5.00x  >= 6.00x  not met")
    assert goals.goals([made_up(0.42, "native", "batch", 1.0)]) == ""


def test_goals_are_held_per_format() -> None:
    rows = [
        made_up(0.9, backend, "batch", ratio if backend == "native" else 1.0, format=spec)
        for spec, ratio in (("bsr16", 8.0), ("bsr32", 6.0))
        for backend in ("native", "dense")
    ]
    lines = goals.goals(rows).splitlines()[2:]
    assert [("bsr16" in line, line.endswith("  not met")) for line in lines] == [(True, False), (False, True)]


def test_bfloat16_goals_are_held_against_the_faster_dense() -> None:
    decode = {
        "batch": 1,
        "out_features": 4096,
        "in_features": 4096,
        "product": "forward",
        "dtype": "bfloat16",
    }
    rows = [
        made_up(0.9, backend, "batch", ratio, **decode)
        for backend, ratio in (("native", 8.0), ("dense", 1.0), ("dense float32", 4.0))
    ]
    (line,) = goals.goals(rows).splitlines()[2:]
    assert "2.00x  >= 4.00x  not met" in line


def test_the_worst_case_of_auto() -> None:
    rows = [
        made_up(0.5, backend, "batch", ratio if backend == "auto" else 1.0, batch=batch, format=spec)
        for batch, ratio, spec in ((1, 0.9, "csr"), (16, 1.0, "2:4"), (64, 5.0, "csr"))
        for backend in ("auto", "dense")
    ]
    assert goals.goals(rows).splitlines()[2].split()[-5:] == ["0.90x", ">=", "0.95x", "not", "met"]
    lines = report.auto(rows).splitlines()
    assert "csr 50 %, 1024x1024, batch 1 " in lines[2]
    assert lines[2].split()[-4:] == ["3", "0.90x", "0.91x", "1.00x"]
    assert [line.split()[-1] for line in lines[-3:]] == ["0.90x", "1.00x", "5.00x"]
    assert report.means(rows) == report.auto(made_up_run()) == ""


def test_an_empty_pattern_has_a_mean() -> None:
    rows = rows_of(Case(4, 4, 2, 0.99))
    assert rows[0].density == 0.0
    assert "forward" in report.means(rows)
