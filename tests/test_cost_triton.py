"""When ``backend="auto"`` runs Triton's kernels, by arithmetic: no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from sparsekern import cost_triton
from sparsekern.cost_gpu import AMPERE, HOPPER, Facts, Gpu, dense_seconds
from sparsekern.formats import parse_format

SIZE = 4096


def facts(spec: str, percent: int) -> Facts:
    kind = parse_format(spec)
    return Facts(kind.kind.format, (SIZE, SIZE), SIZE * SIZE * percent // 100, kind.options)


def wins(spec: str, percent: float, batch: int, dtype: torch.dtype, gpu: Gpu = HOPPER) -> bool:
    training = batch > 16
    return cost_triton._wins(facts(spec, percent), batch, dtype, gpu, training, training)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("spec", ["csr", "bsr4", "bsr8", "bsr16", "bsr32", "bsr64", "bsr128"])
def test_compiled_graphs_choose_by_the_same_arithmetic(spec: str, few: bool, dtype: torch.dtype) -> None:
    batch = 16 if few else 4096
    most = max((p for p in range(1, 101) if wins(spec, p, batch, dtype)), default=0)
    assert cost_triton._COMPILED_PERCENT[spec][few][dtype == torch.float32] == most


@pytest.mark.parametrize(("spec", "percent"), [("2:4", 50), ("1:4", 25), ("2:8", 25), ("64:2:8", 25)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_groups_pay_with_few_rows_alone(spec: str, percent: int, dtype: torch.dtype) -> None:
    assert wins(spec, percent, 16, dtype)
    assert not wins(spec, percent, 4096, dtype)
    assert wins("128:2:16", 12.5, 4096, dtype) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("gpu", [HOPPER, AMPERE])
def test_what_is_expected_of_blocks(gpu: Gpu) -> None:
    """Large ones are bound by multiplies, a tenth of them, and small ones by what they read from L2."""
    dense = dense_seconds((SIZE, SIZE), 4096, torch.bfloat16, gpu)
    times = [
        cost_triton.seconds(facts(f"bsr{side}", 10), "forward", 4096, torch.bfloat16, gpu)
        for side in (128, 64, 32, 16)
    ]
    assert times == sorted(times)
    assert 5 < dense / times[0] < 10
    assert dense / times[1] > 3


def test_a_batch_without_rows() -> None:
    assert wins("csr", 50, 0, torch.float32)
