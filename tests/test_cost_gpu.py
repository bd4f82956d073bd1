"""``backend="auto"`` on a GPU: what the arithmetic chooses, and dense copies that wait for nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_pattern
from sparsekern import copies, cost, cost_gpu, dense
from sparsekern.cost_gpu import AMPERE, HOPPER, Facts, Gpu
from sparsekern.dense import DENSE, NATIVE, By, Plan
from sparsekern.formats import parse_format
from test_pattern_transfers import Waits

SHAPE = (4096, 4096)
FORMATS = ("csr", "bsr8", "bsr16", "bsr32", "bsr64", "bsr128", "2:4", "2:8", "4:8", "64:2:8", "128:2:16")
GPUS = {"hopper": HOPPER, "ampere": AMPERE}
MASK = Plan(By.MASK, By.NATIVE, By.NATIVE)
"""Along the mask, in inference."""


def facts(format: str, sparsity: float | None = None, shape: tuple[int, int] = SHAPE) -> Facts:
    kind = parse_format(format)
    fixed = kind.kind.fixed_sparsity(**kind.options)
    kept = 1.0 - (sparsity if fixed is None else fixed)
    return Facts(kind.kind.format, shape, round(shape[0] * shape[1] * kept), kind.options)


@pytest.mark.parametrize(
    ("format", "sparsity", "batch", "expected"),
    [
        # Few rows of x are bound by the weight's bytes, and along a mask by expanding it.
        *(("csr", s, 1, MASK) for s in (0.5, 0.8)),
        *(("csr", s, 16, MASK) for s in (0.5, 0.8, 0.9)),
        *(("csr", s, 32, DENSE) for s in (0.8, 0.9)),
        *(("csr", s, 1, NATIVE) for s in (0.9, 0.95, 0.98)),
        *((f"bsr{side}", 0.8, 8, NATIVE) for side in (16, 32, 64, 128)),
        *((format, None, 8, NATIVE) for format in ("2:8", "64:2:8", "128:2:16")),
        *((format, None, 8, MASK) for format in ("2:4", "4:8")),
        # Many: CSR runs on plain arithmetic, small blocks and V reread x through L2.
        *(("csr", s, 4096, DENSE) for s in (0.8, 0.9, 0.95, 0.97)),
        *(("csr", s, 4096, NATIVE) for s in (0.98, 0.99)),
        *(("csr", s, batch, DENSE) for s in (0.5, 0.8, 0.9) for batch in (64, 256)),
        ("bsr32", 0.7, 4096, DENSE),
        ("bsr32", 0.9, 4096, NATIVE),
        ("bsr64", 0.5, 4096, DENSE),
        ("bsr64", 0.7, 4096, NATIVE),
        ("bsr128", 0.1, 4096, DENSE),
        ("bsr128", 0.5, 4096, NATIVE),
        *((format, None, 4096, DENSE) for format in ("2:8", "4:8", "64:2:8")),
        *((format, None, 4096, NATIVE) for format in ("128:2:8", "128:2:16")),
    ],
)
def test_inference_on_hopper(format: str, sparsity: float | None, batch: int, expected: dense.Plan) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        made = cost_gpu.predict(
            facts(format, sparsity), batch, dtype, HOPPER, need_x=False, need_values=False
        )
        assert made.plan == expected


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("format", FORMATS)
def test_no_plan_is_slower_than_dense_and_its_copies(format: str, gpu: str) -> None:
    for batch, sparsity in ((b, s) for b in (1, 7, 16, 64, 1000, 8192) for s in (0.0, 0.5, 0.9, 0.99)):
        for dtype in (torch.float32, torch.bfloat16):
            for need_x, need_values in ((False, False), (True, False), (False, True), (True, True)):
                what = (facts(format, sparsity), batch, dtype, GPUS[gpu], need_x, need_values)
                made, whole, native = (cost_gpu.predict(*what, plan=plan) for plan in (None, DENSE, NATIVE))
                assert made.seconds <= whole.seconds
                assert made.plan == NATIVE or made.seconds <= native.seconds / cost.MARGIN
                assert made.dense == whole.dense > 0
                if not (need_x or need_values):
                    assert made.plan in (NATIVE, DENSE, MASK)
                    assert whole.seconds == whole.dense  # the copy of W is kept


def test_cutlass_runs_2_of_4_on_hopper() -> None:
    """Where its waves of tiles are full, rows are whole 16 bytes, and the library has it."""
    without = replace(HOPPER, cutlass=0.0)

    def forward(
        spec: str, batch: int, shape: tuple[int, int], gpu: Gpu = HOPPER, dtype=torch.bfloat16
    ) -> float:
        return cost_gpu.native_seconds(facts(spec, shape=shape), "forward", batch, dtype, gpu)

    large = (4096, 4096)
    dense_time = cost_gpu.dense_seconds(large, 4096, torch.bfloat16, HOPPER)
    for spec in ("2:4", "1:2"):
        assert forward(spec, 4096, large) < dense_time < forward(spec, 4096, large, without)
        assert cost_gpu.predict(facts(spec), 4096, torch.float16, HOPPER, False, False).plan == NATIVE
    for spec, batch, shape, dtype in (
        ("2:4", 256, large, torch.bfloat16),
        *(
            ("2:4", b, (rows, 4096), torch.bfloat16)
            for b in (1, 16, 64)
            for rows in (8448, 14336, 28672, 32000)
        ),
        ("2:4", 1152, large, torch.bfloat16),
        ("2:4", 4096, (4100, 4096), torch.bfloat16),
        ("2:4", 4096, (4096, 4104), torch.bfloat16),
        ("2:4", 4096, large, torch.float32),
        ("1:4", 4096, large, torch.bfloat16),
        ("64:2:8", 4096, large, torch.bfloat16),
    ):
        assert forward(spec, batch, shape, HOPPER, dtype) == forward(spec, batch, shape, without, dtype)


def test_masks_that_are_2_4_both_ways() -> None:
    """The gradient of x is a sparse product: with many rows on Ampere faster than a dense one."""
    one_way, batches = facts("2:4"), (1, 64, 4096)
    both_ways = replace(one_way, transposable=True)
    without = replace(HOPPER, cutlass=0.0)
    for gpu, gains in ((without, (2.7, 2.7, 2.6)), (AMPERE, (1.5, 1.7, 2.6))):
        for batch, gain in zip(batches, gains, strict=True):
            what = "backward_input", batch, torch.float16, gpu
            expanded, transposed = (cost_gpu.native_seconds(each, *what) for each in (one_way, both_ways))
            assert gain <= expanded / transposed < gain + 0.3
    for other in ({"product": "forward"}, {"dtype": torch.float32}):
        what = {"product": "backward_input", "batch": 4096, "dtype": torch.float16, "gpu": HOPPER, **other}
        assert cost_gpu.native_seconds(one_way, **what) == cost_gpu.native_seconds(both_ways, **what)
    plans = [cost_gpu.predict(each, 4096, torch.float16, AMPERE).plan for each in (one_way, both_ways)]
    assert plans == [Plan(By.NATIVE, By.DENSE, By.DENSE), Plan(By.NATIVE, By.NATIVE, By.DENSE)]
    kind = parse_format("2:4")
    for transposable in (False, True):
        pattern = kind.from_mask(kind.prune(torch.rand(32, 64), transposable=transposable))
        assert not Facts.of(pattern).transposable  # on a CPU there is no such kernel
        pattern.derived = pattern.metadata()  # type: ignore[attr-defined]
        assert Facts.of(pattern).transposable == transposable


def test_wide_groups() -> None:
    """The gradient of x of V:N:M from selected columns alone, where there is shared memory for its sums."""

    def seconds(format: str, gpu: cost_gpu.Gpu = HOPPER, **other: Any) -> float:
        what = {"batch": 4096, "dtype": torch.float16, **other}
        return cost_gpu.native_seconds(facts(format), "backward_input", gpu=gpu, **what)

    for m, gain in ((16, 1.9), (20, 1.4), (32, 2.0), (64, 1.8), (100, 1.0), (12, 1.0)):
        assert seconds(f"96:2:{m}") / seconds(f"64:2:{m}") == pytest.approx(gain, rel=0.05)
        for other in ({"gpu": AMPERE}, {"dtype": torch.float32}, {"batch": 500}):
            if m != 20:  # which leaves room for its sums on Ampere, and makes more blocks
                assert seconds(f"96:2:{m}", **other) == seconds(f"64:2:{m}", **other)


def test_rates_are_of_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for (major, minor), multiprocessors, shared in (((9, 0), 114, 227), ((12, 0), 170, 99), ((8, 6), 82, 99)):
        found = SimpleNamespace(
            major=major,
            minor=minor,
            multi_processor_count=multiprocessors,
            shared_memory_per_block_optin=shared << 10,
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        gpu = cost_gpu.of_device.__wrapped__(torch.device("cuda"))
        assert (gpu.multiprocessors, gpu.shared) == (multiprocessors, shared << 10)
        assert gpu.dense == (HOPPER if major >= 9 else AMPERE).dense
        assert gpu.cutlass == (HOPPER.cutlass if major == 9 and torch.ops.sparsekern.cutlass() else 0.0)


def test_products_are_chosen_one_by_one() -> None:
    """The gradient of CSR values reads x through L2, that of V:N:M's x multiplies W's zeros."""
    training = cost_gpu.predict(facts("csr", 0.98), 4096, torch.bfloat16, HOPPER)
    assert training.plan == dense.Plan(By.NATIVE, By.NATIVE, By.DENSE)
    training = cost_gpu.predict(facts("128:2:16"), 4096, torch.bfloat16, HOPPER)
    assert training.plan == dense.Plan(By.NATIVE, By.DENSE, By.NATIVE)


@pytest.mark.parametrize("gpu", GPUS)
def test_the_gradient_of_x_never_runs_along_a_mask(gpu: str) -> None:
    found = set()
    for format, batch in ((f, b) for f in FORMATS for b in (1, 8, 33, 64, 100, 300, 4096)):
        for sparsity, need_x in ((s, n) for s in (0.0, 0.3, 0.5, 0.8, 0.9) for n in (False, True)):
            plan = cost_gpu.predict(
                facts(format, sparsity), batch, torch.float16, GPUS[gpu], need_x, True
            ).plan
            assert plan.grad_x is not By.MASK
            found.add(plan.grad_values)
            for refused in ({"dtype": torch.float32}, {"masked": False}):
                what = {"dtype": torch.float16, "masked": True, **refused}
                made = cost_gpu.predict(facts(format, sparsity), batch, gpu=GPUS[gpu], need_x=need_x, **what)
                assert By.MASK not in made.plan
    assert found == {By.DENSE, By.NATIVE, By.MASK}


def test_tf32_makes_dense_products_faster() -> None:
    before = torch.get_float32_matmul_precision()
    what = (facts("csr", 0.9), 4096, torch.float32, HOPPER, False, False)
    try:
        torch.set_float32_matmul_precision("highest")
        assert cost_gpu.predict(*what).plan == NATIVE
        torch.set_float32_matmul_precision("high")
        assert cost_gpu.predict(*what).plan == DENSE
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_copy_that_is_not_kept_is_paid_for() -> None:
    what = (facts("csr", 0.75), 1, torch.bfloat16, HOPPER, False, False)
    assert cost_gpu.predict(*what, masked=False).plan == DENSE
    assert cost_gpu.predict(*what, masked=False, keeps=False).plan == NATIVE
    assert cost_gpu.predict(*what).plan == cost_gpu.predict(*what, keeps=False).plan == MASK


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_graphs_choose_as_the_arithmetic_does(format: str) -> None:
    """The table of whole numbers, but near break-even."""
    pattern = random_pattern(format, (256, 256), 1.0)
    name, options = pattern.format, pattern.options
    for sparsity in (0.02, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995):
        one = facts(format, sparsity)
        for few, dtype in (
            (few, dtype) for few in (True, False) for dtype in (torch.float32, torch.bfloat16)
        ):
            need, batch = not few, 16 if few else 4096
            native, whole = (
                cost_gpu.predict(one, batch, dtype, HOPPER, need, need, keeps=False, plan=plan).seconds
                for plan in (NATIVE, DENSE)
            )
            if 0.8 < native / whole < 1.2:
                continue

            class Like:
                format, nnz, shape = name, one.values, SHAPE

            Like.options = options  # type: ignore[attr-defined]
            chosen = cost_gpu.native_if_compiled(Like, few, dtype)  # type: ignore[arg-type]
            assert chosen == (native < whole), (format, sparsity, few, dtype)


def test_graphs_use_no_mask_that_they_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "has_kernel", lambda op, device: True)
    monkeypatch.setattr(copies, "mask_fits", lambda device: True)
    monkeypatch.setattr(cost_gpu, "of_device", lambda device: HOPPER)
    pattern = random_pattern("csr", (2048, 2048), 0.3)

    def chosen(keeps: bool) -> Plan:
        return cost_gpu.choose(pattern, 4, torch.bfloat16, False, False, keeps)

    assert chosen(True) == MASK
    assert chosen(False).forward is not By.MASK
    copies.mask_operands(pattern)
    assert chosen(False) == MASK


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """CPU tensors go the way of a GPU's; what its runtime would say."""
    says = {"stream": 7, "capturing": False}
    monkeypatch.setattr(copies, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(copies, "capturing", lambda tensor: says["capturing"])
    monkeypatch.setattr(copies, "_stream", lambda tensor: says["stream"])
    monkeypatch.setattr(copies, "has_mask", lambda pattern: False)
    monkeypatch.setattr(copies, "_event", lambda tensor: f"event of {says['stream']}")
    monkeypatch.setattr(copies, "_wait", lambda tensor, event: says["waited"].append(event))
    return says


def test_other_streams_wait_for_a_mask(gpu: dict[str, Any]) -> None:
    pattern, gpu["waited"] = random_pattern("csr", (30, 20), 0.3), []
    made = copies.mask_operands(pattern)
    assert copies.mask_operands(pattern) is made
    assert gpu["waited"] == []
    gpu["stream"] = 8
    assert copies.mask_operands(pattern) is made
    assert gpu["waited"] == ["event of 7"]
    gpu["capturing"] = True
    assert copies.mask_operands(pattern) is made
    assert gpu["waited"] == ["event of 7"]


def test_no_mask_where_a_block_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_block_optin = 99 << 10

    pattern = random_pattern("csr", (30, 20), 0.3)
    monkeypatch.setattr(copies, "has_kernel", lambda op, device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    try:
        copies.mask_fits.cache_clear()
        assert not copies.has_mask_on_gpu(pattern, capturing=False)
        Properties.shared_memory_per_block_optin = 227 << 10
        copies.mask_fits.cache_clear()
        assert copies.has_mask_on_gpu(pattern, capturing=False)
    finally:
        copies.mask_fits.cache_clear()


def test_nothing_waits_for_the_gpu(gpu: dict[str, Any]) -> None:
    for format in ("csr", "bsr16", "2:4", "32:2:8"):
        pattern = random_pattern(format, (64, 96), 0.5)
        values = torch.randn(pattern.values_shape, requires_grad=True)
        x = torch.randn(5, 96, requires_grad=True)
        with Waits() as waits:
            for _ in range(3):
                y = dense.planned_linear(x, values, None, pattern, DENSE)
                torch.autograd.grad(y.sum(), (x, values))
                with torch.no_grad():
                    dense.planned_linear(x, values, None, pattern, DENSE)
        assert not waits.found


def test_the_copy_on_a_gpu(gpu: dict[str, Any]) -> None:
    pattern = random_pattern("csr", (30, 20), 0.5)
    values, x = torch.randn(pattern.values_shape), torch.randn(3, 20)

    def product() -> torch.Tensor:
        with torch.no_grad():
            y = dense.planned_linear(x, values, None, pattern, DENSE)
        torch.testing.assert_close(y, x @ pattern.scatter(values).t())
        copy = pattern.memo.get(("copy", torch.float32))
        return None if copy is None else copy.weight

    gpu["capturing"] = True
    assert product() is None  # a replay scatters the values of its time
    gpu["capturing"] = False
    first = product()
    assert product() is first
    gpu["stream"] = 8
    second = product()
    assert second is not first
    values.mul_(2)
    assert product() is not second
    gpu["capturing"] = True
    values.data.mul_(2)
    product()
