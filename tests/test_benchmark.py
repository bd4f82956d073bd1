"""The benchmark: fair timing, honest results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmark_rows import rows_of
from sparsekern.benchmark import PEERS, SUITES, Case, Contender, race, report, speedup, timing
from sparsekern.benchmark.cases import PRODUCTS
from sparsekern.benchmark.contenders import line_up
from sparsekern.benchmark.roofline import Roofline, cache_bytes
from torch import Tensor, nn


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
    for row, work in ((ours, flop), (dense, 2 * flop)):
        third = (row.p80_ms - row.p20_ms) / 3  # of what lies between the two readings
        readings = row.p20_ms - third, row.p80_ms + third
        shares = [work / (1e-3 * ms) / 100e9 for ms in readings]
        assert row.peak_fraction == pytest.approx(sum(shares) / 2)
    weight_bytes = 4 * 300 + 2 * 300 + 4 * 21  # values, 16-bit columns, row_ptr
    assert ours.read_fraction == pytest.approx(weight_bytes / (1e-3 * ours.median_ms) / 10e9)
    assert dense.read_fraction == pytest.approx(4 * 600 / (1e-3 * dense.median_ms) / 10e9)


@pytest.mark.parametrize(
    ("spec", "sparsity", "index_bytes"),
    [
        ("bsr4", 0.5, 4 * (64 // 4 + 1) + 4 * 64),  # block_row_ptr and block_col_idx
        ("2:4", 0.5, 64 * (16 * 2 // 8)),  # 2 bits per value
        ("16:2:8", 0.75, 4 * (64 // 16) * (32 // 8) * 4 + 64 * 4),  # columns, and 2 bits, in words of 4 bytes
    ],
)
def test_bytes_of_the_other_formats(spec: str, sparsity: float, index_bytes: int) -> None:
    row = rows_of(Case(64, 32, 8, sparsity, format=spec))[0]
    weight_bytes = 4 * (1 - sparsity) * 64 * 32 + index_bytes
    assert row.read_fraction == pytest.approx(weight_bytes / (1e-3 * row.median_ms) / 10e9)


@pytest.mark.parametrize("product", ["forward", "backward_input", "backward_weight", "forward_backward"])
@pytest.mark.parametrize("spec", ["bsr16", "bsr4x8", "2:4", "2:8", "32:2:8"])
@pytest.mark.parametrize("suite", ["layers", "auto"])
def test_every_format_computes_every_product(suite: str, spec: str, product: str) -> None:
    """Ragged shapes included: blocks that reach past the edge hold padding."""
    lists = {"shapes": [(70, 52, 24)], "formats": [spec], "sparsities": [0.5], "products": [product]}
    (case,) = SUITES[suite].cases(**lists, dtypes=[torch.float32])  # type: ignore[arg-type]
    rows = rows_of(case, line_up(SUITES[suite], case))
    ours = {"layers": ["native", "native"], "auto": ["auto"]}[suite]
    backends = [row.backend for row in rows]
    assert backends in ([*ours, "dense"], ["reference", "reference", "dense"])
    assert {row.format for row in rows} == {spec}


def watcher(see: Callable[[Tensor], None]) -> Contender:
    """A dense layer that shows its weight at each forward pass."""

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            see(self.weight)
            return super().forward(x)

    class Watcher(Contender):
        backend = "watched"

        def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
            copy = Watched(linear.in_features, linear.out_features)
            copy.load_state_dict(linear.state_dict())
            return copy

    return Watcher()


def test_each_training_step_meets_a_new_weight() -> None:
    """So a dense copy made for one step does not serve the next."""
    versions: set[int] = set()
    watched = watcher(lambda weight: versions.add(weight._version))
    for product, many in (("forward", False), ("forward_backward", True)):
        versions.clear()
        rows_of(Case(16, 16, 2, 0.5, product), (*PEERS, watched))
        assert (len(versions) > 2) == many


def test_bfloat16_is_measured_beside_dense_in_both_dtypes() -> None:
    case = Case(32, 48, 1, 0.5, "forward", torch.bfloat16, format="2:4")
    rows = rows_of(case, line_up(SUITES["decode"], case))
    assert [row.backend for row in rows][1:] == ["dense", "dense float32"]
    wide = rows[2]
    assert wide.read_fraction == pytest.approx(4 * 32 * 48 / (1e-3 * wide.median_ms) / 10e9)
    peers = report.peers_of(rows)[rows[0].case]
    ratios = [report.versus(rows[0], peer) for peer in peers.values()]
    assert report.versus_dense(rows[0], peers) == min(ratio for ratio in ratios if ratio is not None)


def test_bfloat16_sits_out_torch_sparse() -> None:
    rows = rows_of(Case(24, 40, 16, 0.6, "forward_backward", torch.bfloat16))
    assert [row.backend for row in rows[2:]] == ["dense"]
    assert {row.dtype for row in rows} == {"bfloat16"}
    assert rows[0].speedup_vs_torch_sparse is None


def test_cold_weights_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()

    watched = watcher(lambda weight: used.add(weight.data_ptr()))
    monkeypatch.setattr("sparsekern.benchmark.run.cache_bytes", lambda: 4096)
    rows = rows_of(Case(32, 32, 2, 0.5, "forward", cold=True), (*PEERS, watched))
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


def test_the_real_roofline() -> None:
    roofline = Roofline(1)
    for dtype in (torch.float32, torch.bfloat16):
        assert roofline.gflops(roofline.source(dtype)) > 1.0
    assert roofline.read_gbs() > 0.1
    assert cache_bytes() >= 1 << 18
