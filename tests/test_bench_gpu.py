"""``bench/gpu.py``, as far as it goes without a GPU: its rehearsal, and what it does when things fail."""

from __future__ import annotations

import contextlib
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_rows import made_up
from sparsekern import _library
from sparsekern.benchmark import Case, Facts, append, goals, plot, read
from sparsekern.benchmark import gpu as measuring
from sparsekern.benchmark.contenders import Contender, Dense, Sparsekern
from sparsekern.benchmark.gpu import Measured, Settings, measure
from sparsekern.benchmark.gpu_limits import limit
from sparsekern.isolation import Failure

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # where the children of a run look too
gpu: Any = importlib.import_module("gpu")
gpu_cases: Any = importlib.import_module("gpu_cases")
gpu_peers: Any = importlib.import_module("gpu_peers")

BF16 = torch.bfloat16
CASE = Case(64, 32, 8, 0.5, "forward_backward", torch.float32, True, "2:4")
SETTINGS = Settings("cpu", Facts.now(), rounds=1, min_seconds=1e-5)


def test_the_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rehearsed.csv"
    arguments = [
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--min-time",
        "0.01",
        "--timeout",
        "500",
        "--minutes",
        "90",
    ]
    status = gpu.main([*arguments, "--output", str(output), "--plot", str(tmp_path / "pictures")])
    out = capsys.readouterr().out
    assert status == 0, out
    assert out.count("REHEARSAL on the CPU") == 2
    if _library.LOAD_ERROR is None:
        assert "check: 126 of 126 calls are right" in out
    for peer in ("triton bsr batch", "cusparselt batch", "torch.sparse feature"):
        assert f": {peer}: " in out
    assert "WRONG" not in out
    rows = read(output)
    assert {row.device for row in rows} == {gpu.REHEARSED}
    assert {row.backend for row in rows} >= {"auto", "dense"}
    assert {row.case[1:] for row in rows} == {
        (c.product, c.out_features, c.in_features, c.batch, c.sparsity, str(c.dtype)[6:], "cold", c.format)
        for section in gpu_cases.REHEARSAL
        for c in section.cases
    }
    pytest.importorskip("matplotlib")
    assert (tmp_path / "pictures" / "roofline.png").exists()


def test_rehearsed_rows_never_join_measured_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured, rehearsed = tmp_path / "gpu.csv", tmp_path / "rehearsed.csv"
    append(measured, [made_up(0.5, "native", "batch", 2.0, device="NVIDIA H200")])
    append(rehearsed, [made_up(0.5, "native", "batch", 2.0, device=gpu.REHEARSED)])
    before = measured.read_text()
    assert gpu.main(["--device", "cpu", "--output", str(measured)]) == 1
    assert "must hold no rows of NVIDIA H200 beside those of rehearsal, no GPU" in capsys.readouterr().err
    assert measured.read_text() == before
    assert gpu.refused(rehearsed, "NVIDIA H200") is not None
    assert gpu.refused(measured, "NVIDIA H100") is None
    assert gpu.refused(rehearsed, gpu.REHEARSED) is None
    assert gpu.refused(tmp_path / "new.csv", gpu.REHEARSED) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "--device cpu rehearses the run without one" in capsys.readouterr().err


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sections_end_when_their_time_is_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    time, asked = Time(), []

    def worker(task: Any, case: Case, contenders: Any, settings: Any) -> Measured:
        asked.append(case)
        time.now += 3.0
        return Measured(rows=[made_up(0.5, "native", "batch", 2.0)])

    budget = gpu.Budget(20.0, time)
    assert budget.part(0.5).left() == 10.0
    section, found = gpu_cases.SECTIONS[0], gpu.Outcome()
    gpu.run_section(section, worker, SETTINGS, budget.part(0.5), tmp_path / "rows.csv", found)
    assert asked == list(section.cases[:4])
    assert len(found.rows) == len(read(tmp_path / "rows.csv")) == 4
    assert found.lines == [
        f"goals: out of time, {len(section.cases) - 4} of {len(section.cases)} cases not run"
    ]
    assert budget.left() == 8.0
    gpu.run_section(section, worker, SETTINGS, gpu.Budget(0.0, time), None, found)
    assert len(asked) == 4


def test_who_ends_the_process_is_left_out() -> None:
    contenders = [Sparsekern("batch"), Dense(), *gpu_peers.PEERS]
    asked = []

    def worker(task: Any, case: Case, contenders: list[Contender], settings: Any) -> Measured | Failure:
        names = [f"{c.backend} {c.layout}" for c in contenders]
        asked.append(names)
        for name in ("cusparselt batch", "native batch"):
            if name in names:
                return Failure("no end after 40 s: killed", name)
        return Measured(
            failures=[("triton bsr batch", "ValueError: because")], notes=[("dense batch", "slow")]
        )

    found = gpu.Outcome()
    assert gpu.run_case(CASE, contenders, worker, SETTINGS, found) == []
    assert [len(names) for names in asked] == [5, 4, 3]
    assert found.wrong == [f"{CASE}: native batch: no end after 40 s: killed"]
    assert found.lines == [
        f"{CASE}: cusparselt batch: no end after 40 s: killed",
        f"{CASE}: triton bsr batch: ValueError: because",
        f"{CASE}: dense batch: slow",
    ]
    found = gpu.Outcome()
    gpu.run_case(
        CASE, contenders, lambda *_: Failure("the process died of SIGSEGV", "timing"), SETTINGS, found
    )
    assert found.wrong == [f"{CASE}: timing: the process died of SIGSEGV"]


class Broken(Dense):
    backend = "broken"

    def build(self, linear: Any, mask: Any, case: Case) -> Any:
        raise RuntimeError("it is broken\nfor a reason")


class Wrong(Dense):
    backend = "wrong"

    def build(self, linear: Any, mask: Any, case: Case) -> Any:
        return torch.nn.Linear(linear.in_features, linear.out_features)


def test_one_failure_is_not_the_end() -> None:
    found = measure(CASE, [Broken(), Sparsekern("batch"), Wrong(), Dense()], SETTINGS)
    assert [row.backend for row in found.rows] == [Sparsekern("batch").backend, "dense"]
    assert [name for name, _ in found.failures] == ["broken batch", "wrong batch"]
    assert found.failures[0][1] == "RuntimeError: it is broken"
    assert "must equal dense within" in found.failures[1][1]
    ours, dense = found.rows
    assert dense.speedup_vs_dense == 1.0
    assert ours.weights == "cold"
    assert ours.peak_source == "matmul"


def test_the_context_that_is_lost_ends_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "context_lost", lambda: True)
    with pytest.raises(RuntimeError, match="it is broken"):
        measure(CASE, [Broken(), Dense()], SETTINGS)


class FakeCuda:
    """Enough of torch.cuda to walk through graphs: a capture runs, and a replay runs again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuse: bool) -> None:
        self.refuse, self.capturing, self.calls = refuse, False, 0
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.calls += 1

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                pass

            def record(self) -> None:
                self.at = fake.calls

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return 2.0 * (end.at - self.at)

        @contextlib.contextmanager
        def graph(found: Graph, stream: object) -> Any:
            self.capturing = True
            yield
            self.capturing = False
            if self.refuse:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

        fakes = {"CUDAGraph": Graph, "Event": Event, "graph": graph, "Stream": lambda device: None}
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, value)
        properties = type("Properties", (), {"L2_cache_size": 50 << 20})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, refuse=False)
    watch = measuring.GraphReplay("cuda")
    assert watch.cache_bytes == 50 << 20
    seen: list[tuple[int, bool]] = []

    def turn(i: int) -> measuring.Call:
        return lambda: seen.append((i, cuda.capturing)) or (torch.ones(2),)  # type: ignore[func-returns-value]

    rotation = watch.prepare([turn(0), turn(1), turn(2)])
    assert seen == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)]
    assert rotation.length == 3
    assert not rotation.remark
    assert watch.seconds(rotation, 5) == pytest.approx(2e-3)
    assert rotation.outputs()[0].tolist() == [0.0, 0.0], "a replay that writes nothing must not pass"


def test_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, refuse=True)
    rotation = measuring.GraphReplay("cuda").prepare([lambda: (torch.ones(1),)])
    remark = "not captured in a graph, timed with its launches: RuntimeError: operation not permitted"
    assert rotation.remark.startswith(remark)
    assert rotation.outputs()[0].tolist() == [1.0]


def test_ours_must_be_fit_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    remark = "not captured in a graph"
    monkeypatch.setattr(
        measuring.Clock,
        "prepare",
        lambda self, turns: measuring._Rotation(turns[0], turns[0], 1, remark),
    )
    ours = Sparsekern("batch")
    found = measure(CASE, [ours, Dense()], SETTINGS)
    assert found.failures == [(f"{ours.backend} batch", remark)]
    assert found.notes == [("dense batch", remark)]
    assert len(found.rows) == 2


@pytest.mark.parametrize(
    ("format", "sparsity", "batch", "gain"),
    [
        ("2:4", 0.5, 8192, 1.77),
        ("64:2:8", 0.75, 4096, 0.9),
        ("128:2:8", 0.75, 4096, 1.8),
        ("64:2:16", 0.875, 4096, 1.8),
        ("128:2:16", 0.875, 4096, 3.6),
        ("bsr32", 0.78, 4096, 1.0),
        ("bsr64", 0.55, 4096, 1.0),
        ("bsr128", 0.11, 4096, 1.0),
        ("csr", 0.97, 4096, 1.25),
        ("csr", 0.5, 1, 1.8),
        ("csr", 0.7, 1, 2.8),
        ("csr", 0.8, 1, 3.8),
        ("csr", 0.9, 1, 6.2),
        ("2:4", 0.5, 1, 1.78),
        ("64:2:8", 0.75, 1, 3.6),
        ("128:2:16", 0.875, 1, 7.1),
    ],
)
def test_what_flop_and_bytes_let_expect(format: str, sparsity: float, batch: int, gain: float) -> None:
    side = 8192 if batch == 8192 else 4096
    case = Case(side, side, batch, sparsity, "forward", BF16, True, format)
    assert limit(case, dense=True).seconds / limit(case).seconds == pytest.approx(gain, rel=0.03)
    layer = replace(case, product="forward_backward")
    parts = [replace(case, product=p) for p in ("forward", "backward_input", "backward_weight")]
    assert limit(layer).seconds == pytest.approx(sum(limit(part).seconds for part in parts))
    if format == "2:4":
        assert limit(parts[2]).seconds >= limit(parts[1]).seconds == limit(case).seconds
    assert limit(case).flop == pytest.approx(2 * (1 - sparsity) * side * side * batch)


def test_tables_of_goals_and_expectations() -> None:
    assert "Not measured." in gpu.expectations()
    assert "bsr128 90 %" in gpu.expectations()
    common: dict[str, object] = {
        "format": "bsr128",
        "product": "forward",
        "dtype": "bfloat16",
        "weights": "cold",
        "out_features": 4096,
        "in_features": 4096,
        "batch": 4096,
        "peak_source": "matmul",
        "peak_gflops": 790e3,
        "read_gbs": 4300.0,
    }
    rows = [
        made_up(0.9, "native", "batch", 8.0, **{**common, "median_ms": 0.039}),
        made_up(0.9, "dense", "batch", 1.0, **common),
        made_up(0.9, "auto", "batch", 0.9, **common),
    ]
    assert "50.1 %" in gpu.against_expectations(rows).splitlines()[-1]
    lines = goals.goals(rows, gpu_cases.GOALS).splitlines()[2:]
    assert [line.split()[-2:] for line in lines] == [["7.00x", "met"], ["not", "met"]]


def test_pictures_of_cold_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    common: dict[str, object] = {
        "weights": "cold",
        "dtype": "bfloat16",
        "product": "forward",
        "peak_source": "matmul",
    }
    rows = [
        made_up(s, backend, "batch", 2.0, format="bsr64", **common)
        for s in (0.5, 0.9)
        for backend in ("native", "dense", "triton bsr")
    ]
    assert plot.pictures(rows, tmp_path) == ["bsr", "roofline"]
    assert len(plot.plot(rows, tmp_path)) == 2


def test_the_sections() -> None:
    cases = [case for section in gpu_cases.SECTIONS for case in section.cases if not section.auto]
    assert all(case.cold for case in cases)
    assert len({*cases}) == len(cases)
    assert {section.name for section in gpu_cases.SECTIONS} >= {s.name for s in gpu_cases.REHEARSAL}
    for peer, spec in zip(gpu_peers.PEERS, ("csr", "bsr64", "2:4"), strict=True):
        mine = Case(4096, 4096, 4096, 0.5, "forward", BF16, True, spec)
        assert peer.refuses(mine) is None
        assert peer.refuses(replace(mine, format="5:11")) is not None
        assert peer.refuses(replace(mine, product="backward_weight")) is not None
