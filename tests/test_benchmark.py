"""The benchmark: fair timing, honest results, a results file that stays whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsekern.benchmark import (
    OURS,
    PEERS,
    SUITES,
    Case,
    Contender,
    Facts,
    Row,
    append,
    last_run,
    plot,
    race,
    read,
    report,
    run_case,
    speedup,
    timing,
)
from sparsekern.benchmark.cases import PRODUCTS
from sparsekern.benchmark.roofline import Roofline, cache_bytes
from torch import Tensor, nn


class Flat(Roofline):
    """A machine of known peaks, so that no test waits for the real one's."""

    def __init__(self) -> None:
        self.source = "fma"

    def gflops(self) -> float:
        return 100.0

    def read_gbs(self) -> float:
        return 10.0


def rows_of(case: Case, contenders: tuple[Contender, ...] = (*OURS, *PEERS)) -> list[Row]:
    return run_case(case, contenders, Facts.now(), Flat(), rounds=2, min_seconds=1e-5)


class Clock:
    """A clock that calls move on: no test depends on how busy this machine is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.speed = 1.0
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def takes(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds * self.speed

        return call


def test_race_takes_turns_and_rotates_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    order: list[str] = []
    calls = {name: lambda name=name: (order.append(name), clock.takes(1.0)()) for name in "abc"}
    rounds: list[int] = []
    times = race(calls, rounds=3, min_seconds=1.0, before_round=lambda: rounds.append(len(order)))
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}
    assert len(rounds) == 3
    assert "".join(order[rounds[0] :]) == "aabbccbbccaaccaabb"  # one untimed and one timed call a turn


def test_race_measures_ratios_while_the_clock_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"slow": clock.takes(4e-3), "fast": clock.takes(1e-3)}

    def drift() -> None:
        clock.speed *= 1.5

    times = race(calls, rounds=5, min_seconds=0.1, before_round=drift)
    assert times["fast"] == pytest.approx([1e-3 * 1.5**i for i in range(1, 6)])
    assert speedup(times["slow"], times["fast"]) == pytest.approx(4.0)


def test_a_reading_lasts_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        clock.now += 1e-6

    starts: list[int] = []
    race({"quick": call}, rounds=2, min_seconds=0.01, before_round=lambda: starts.append(calls))
    assert 10_000 <= starts[1] - starts[0] - 1 <= 15_000


def test_race_refuses_no_rounds() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        race({}, rounds=0)


def test_statistics() -> None:
    assert (
        speedup([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0
    )  # pairs 2, 3, 1; the ratio of medians would be 1
    assert timing.quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert timing.quantile([7.0], 0.2) == 7.0
    assert timing.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="readings must not be empty"):
        timing.quantile([], 0.5)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("size", [(24, 40, 16), (16, 16, 16), (5, 7, 1)])
def test_every_contender_computes_every_product(product: str, size: tuple[int, int, int]) -> None:
    rows = rows_of(Case(*size, 0.6, product))
    assert [(row.backend, row.layout) for row in rows[2:]] == [
        ("dense", "batch"),
        ("torch.sparse", "feature"),
    ]
    assert [row.layout for row in rows[:2]] == ["batch", "feature"]
    assert all(row.ours for row in rows[:2])
    for row in rows:
        assert row.product == product
        assert row.density == round(0.4 * size[0] * size[1]) / (size[0] * size[1])
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.speedup_vs_dense is not None
        assert row.speedup_vs_torch_sparse is not None
    assert rows[2].speedup_vs_dense == 1.0
    assert rows[3].speedup_vs_torch_sparse == 1.0


def test_shares_of_the_roofline() -> None:
    case = Case(20, 30, 8, 0.5, "forward_backward")
    ours, dense = (rows_of(case)[i] for i in (0, 2))
    flop = 2 * 300 * 8 * 3
    # The median of the shares is a share of some reading between the slowest and the fastest.
    for row, work in ((ours, flop), (dense, 2 * flop)):
        low, high = (work / (1e-3 * ms) / 100e9 for ms in (2 * row.p80_ms, row.p20_ms / 2))
        assert low <= row.peak_fraction <= high
    weight_bytes = 4 * 300 + 4 * 300 + 4 * 21  # values, col_idx, row_ptr
    assert ours.read_fraction == pytest.approx(weight_bytes / (1e-3 * ours.median_ms) / 10e9)
    assert dense.read_fraction == pytest.approx(4 * 600 / (1e-3 * dense.median_ms) / 10e9)


def test_bfloat16_sits_out_torch_sparse() -> None:
    rows = rows_of(Case(24, 40, 16, 0.6, "forward_backward", torch.bfloat16))
    assert [row.backend for row in rows[2:]] == ["dense"]
    assert {row.dtype for row in rows} == {"bfloat16"}
    assert rows[0].speedup_vs_torch_sparse is None


def test_cold_weights_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            used.add(self.weight.data_ptr())
            return super().forward(x)

    class Watcher(Contender):
        backend = "watched"

        def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
            copy = Watched(linear.in_features, linear.out_features)
            copy.load_state_dict(linear.state_dict())
            return copy

    monkeypatch.setattr("sparsekern.benchmark.run.cache_bytes", lambda: 4096)
    rows = rows_of(Case(32, 32, 2, 0.5, "forward", cold=True), (*PEERS, Watcher()))
    assert {row.weights for row in rows} == {"cold"}
    assert len(used) == 1 + 4 * 4096 // (32 * 32 * 4)


@pytest.mark.parametrize(
    ("product", "needed"),
    [
        ("backward_input", (True, False, False)),
        ("backward_weight", (False, True, False)),
        ("forward_backward", (True, True, True)),
    ],
)
def test_only_the_gradients_of_the_product_are_computed(product: str, needed: tuple[bool, ...]) -> None:
    seen = set()

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.t() + bias

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            seen.add(ctx.needs_input_grad)
            x, weight = ctx.saved_tensors
            return grads[0] @ weight, grads[0].t() @ x, grads[0].sum(0)

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = Function.apply(x, self.weight, self.bias)
            return y

    class Watcher(Contender):
        backend = "watched"

        def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
            layer = Layer(linear.in_features, linear.out_features)
            layer.load_state_dict(linear.state_dict())
            return layer

    rows_of(Case(8, 8, 4, 0.5, product), (*PEERS, Watcher()))
    assert seen == {needed}


def test_a_wrong_answer_has_no_speed() -> None:
    class Wrong(Contender):
        backend = "wrong"

        def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
            other = nn.Linear(linear.in_features, linear.out_features)
            with torch.no_grad():
                other.weight.copy_(1.001 * linear.weight)
            return other

    with pytest.raises(RuntimeError, match=r"wrong batch must equal dense within .*, got a difference of"):
        rows_of(Case(8, 8, 4, 0.5), (*PEERS, Wrong()))


def test_the_suites_hold_the_figures_shapes() -> None:
    layers = list(SUITES["layers"].cases())
    assert len(layers) == 4 * 7 * 4
    assert Case(4096, 1024, 256, 0.9, "forward_backward") in layers
    replaced = list(SUITES["layers"].cases(shapes=[(3, 4, 5)], sparsities=[0.1], products=["forward"]))
    assert replaced == [Case(3, 4, 5, 0.1, "forward")]
    assert {case.cold for case in SUITES["decode"].cases()} == {False, True}


def test_the_real_roofline() -> None:
    roofline = Roofline(1)
    assert roofline.gflops() > 1.0
    assert roofline.read_gbs() > 0.1
    assert cache_bytes() >= 1 << 18


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


def made_up(sparsity: float, backend: str, layout: str, ratio: float, **changes: object) -> Row:
    """A row as a run would leave it, with a chosen speed-up over dense, to test report and picture."""
    fields = {
        "run": "2026-01-01T00:00:00Z",
        "commit": "0",
        "machine": "CPU, 2 cores",
        "device": "avx2",
        "threads": 2,
        "torch": "2",
        "format": "csr",
        "product": "forward_backward",
        "out_features": 1024,
        "in_features": 1024,
        "batch": 1024,
        "sparsity": sparsity,
        "density": 1 - sparsity,
        "dtype": "float32",
        "weights": "warm",
        "backend": backend,
        "layout": layout,
        "median_ms": 12 / ratio,
        "p20_ms": 12 / ratio,
        "p80_ms": 12 / ratio,
        "speedup_vs_dense": ratio,
        "speedup_vs_torch_sparse": None,
        "peak_gflops": 200.0,
        "peak_source": "fma",
        "peak_fraction": 0.5,
        "read_gbs": 30.0,
        "read_fraction": 0.1,
    }
    return Row(**{**fields, **changes})  # type: ignore[arg-type]


def made_up_run() -> list[Row]:
    return [
        made_up(sparsity, backend, layout, ratio * factor, batch=batch)
        for batch, factor in ((512, 0.5), (1024, 2.0))
        for sparsity, ratio in ((0.5, 0.5), (0.8, 4.0), (0.9, 5.0))
        for backend, layout, ratio in (("native", "batch", ratio), ("dense", "batch", 1 / factor))
    ]


def test_tables_and_means() -> None:
    rows = made_up_run()
    table = report.cases(rows)
    assert " ".join(table.splitlines()[0].split()) == (
        "forward_backward, float32 batch sparsity weights x major ms p20 p80 dense ratio of peak of read"
    )
    assert len(table.splitlines()) == 2 + 6
    assert "8.00x" in table
    means = report.means(rows).splitlines()
    assert [line.split()[4:7:2] + line.split()[7:8] for line in means[2:]] == [
        ["50", "2", "0.50x"],
        ["80", "2", "4.00x"],
        ["90", "2", "5.00x"],
    ]


def test_goals_say_met_and_not_met() -> None:
    lines = {line.split("  ")[0]: line for line in report.goals(made_up_run()).splitlines()}
    assert lines["forward+backward vs dense, 80 %"].endswith("4.00x  >= 3.00x      met")
    assert lines["forward+backward vs dense, 90 %"].endswith("5.00x  >= 6.00x  not met")
    assert report.goals([made_up(0.42, "native", "batch", 1.0)]) == ""


def test_an_empty_pattern_has_a_mean() -> None:
    rows = rows_of(Case(4, 4, 2, 0.99))
    assert rows[0].density == 0.0
    assert "forward" in report.means(rows)


def test_break_even_and_lines() -> None:
    (key, line), *others = plot.lines(made_up_run(), "forward_backward", "float32").items()
    assert key == ("ours", "batch")
    assert not others
    assert [(round(d, 6), round(mean, 6), low, high) for d, mean, low, high in line] == [
        (0.5, 0.5, 0.25, 1.0),
        (0.2, 4.0, 2.0, 8.0),
        (0.1, 5.0, 2.5, 10.0),
    ]
    at = plot.break_even(line)
    assert at is not None
    assert at == pytest.approx(1 - 0.5 * 0.4 ** (1 / 3))  # a third of the way, on both logarithmic axes
    assert plot.break_even(line[1:]) is None


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.plot(made_up_run(), tmp_path / "new" / "run.png")
    assert (tmp_path / "new" / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a picture needs layer-sized cases"):
        plot.plot([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
