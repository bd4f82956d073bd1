"""Guards of the hot ops, for ``pytest bench``: floors under ratios to dense, and times to compare by commit.

The floors are ratios taken side by side, about half of the goals, so that noise does not trip them and a real
slowdown does. ``--benchmark-autosave`` keeps the times, and ``--benchmark-compare`` with
``--benchmark-compare-fail=median:20%`` holds them against the last ones kept.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from sparsekern._library import LOAD_ERROR
from sparsekern.benchmark import Case, Facts, run_case
from sparsekern.benchmark.contenders import Dense, Sparsekern
from sparsekern.benchmark.roofline import Roofline
from sparsekern.nn import SparseLinear

pytestmark = pytest.mark.skipif(LOAD_ERROR is not None, reason=str(LOAD_ERROR))

FLOORS = [
    (Case(1024, 1024, 1024, 0.9, "forward"), 3.0),
    (Case(1024, 1024, 1024, 0.9, "backward_input"), 3.0),
    (Case(1024, 1024, 1024, 0.9, "backward_weight"), 3.0),
    (Case(1024, 1024, 1024, 0.9, "forward_backward"), 3.0),
    (Case(768, 3072, 128, 0.95, "forward_backward"), 4.5),
    (Case(4096, 4096, 1, 0.9, "forward"), 2.5),
    (Case(1024, 1024, 1024, 0.9, "forward", format="bsr32"), 4.0),
    (Case(1024, 1024, 1024, 0.9, "forward_backward", format="bsr32"), 3.5),
    (Case(1024, 1024, 1024, 0.75, "forward", format="2:8"), 1.0),
    (Case(1024, 1024, 1024, 0.875, "forward", format="64:2:16"), 2.2),
    (Case(1024, 1024, 1024, 0.875, "forward_backward", format="64:2:16"), 1.7),
    (Case(4096, 4096, 1, 0.5, "forward", torch.bfloat16, format="2:4"), 1.0),
    (Case(4096, 4096, 1, 0.75, "forward", torch.bfloat16, format="64:2:8"), 1.5),
]


@pytest.mark.parametrize(("case", "floor"), FLOORS, ids=str)
def test_faster_than_dense(case: Case, floor: float) -> None:
    threads = torch.get_num_threads()
    rows = run_case(case, (Sparsekern("batch"), Dense()), Facts.now(), Roofline(threads), rounds=7)
    ratio = rows[0].speedup_vs_dense
    assert ratio is not None
    assert ratio >= floor, f"{case}: must be {floor}x as fast as dense, got {ratio:.2f}x"


@pytest.mark.parametrize("product", ["forward", "forward_backward"])
@pytest.mark.parametrize("layout", ["batch", "feature"])
def test_time(benchmark: BenchmarkFixture, product: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(1024, 1024, sparsity=0.9, generator=generator)
    x = torch.randn(1024, 1024, generator=generator)
    if layout == "feature":
        x = x.t()
    benchmark.group = product
    if product == "forward":
        with torch.no_grad():
            benchmark(layer, x)
        return
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    grad = torch.ones_like(x)
    benchmark(lambda: torch.autograd.grad(layer(x), inputs, grad))
