"""Masks of the largest scores in Triton, under its interpreter: the same as torch's ops give.

``test_triton.py`` runs this file, with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import sparsekern as sk
import torch
from sparsekern.formats import triton_masks
from sparsekern.formats.groups import top_of_groups
from sparsekern.formats.pattern import top_mask
from sparsekern.formats.vnm_columns import best_columns
from sparsekern.triton_kernels import masks
from torch import Tensor

dtypes = pytest.mark.parametrize("dtype", triton_masks.DTYPES, ids=str)


def many_ties(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape) / 2


def signed_zeros(*shape: int) -> Tensor:
    return torch.where(torch.rand(shape) < 0.3, -0.0, 0.0)


def with_infinities(*shape: int) -> Tensor:
    scores = torch.randn(shape)
    return scores.masked_fill(torch.rand(shape) < 0.2, torch.inf).masked_fill(
        torch.rand(shape) < 0.2, -torch.inf
    )


def tiny(*shape: int) -> Tensor:
    """Numbers below the normal ones of all dtypes but float16."""
    return torch.randn(shape) * 1e-40


scores_of = pytest.mark.parametrize("make", [torch.randn, many_ties, signed_zeros, with_infinities, tiny])


@scores_of
@dtypes
def test_top_mask(make: Any, dtype: torch.dtype) -> None:
    for size in (1, 100, 2048, random.randint(2049, 5000)):
        scores = make(size).to(dtype)
        for count in {1, random.randint(1, size), max(1, size - 1)}:
            assert torch.equal(masks.top_mask(scores, count), top_mask(scores, count)), (size, count)


def test_programs_that_count_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_PROGRAMS", 2)
    scores = many_ties(9000)
    assert torch.equal(masks.top_mask(scores, 4000), top_mask(scores, 4000))


@scores_of
@dtypes
def test_top_of_groups(make: Any, dtype: torch.dtype) -> None:
    for n, m in ((1, 1), (2, 4), (2, 5), (3, 7), (8, 16), (16, 16)):
        shape = random.choice(((3, 7), (1, 1), (5, 40), (40, 33), (0, 4), (4, 0)))
        scores = make(*shape).to(dtype)
        assert torch.equal(masks.top_of_groups(scores, n, m), top_of_groups(scores, n, m)), (shape, n, m)


@dtypes
def test_best_columns(dtype: torch.dtype) -> None:
    for v, m in ((4, 4), (8, 5), (12, 7), (64, 8), (2**30, 8)):
        shape = random.choice(((3, 7), (1, 1), (35, 10), (17, 19), (70, 5)))
        whole = torch.randint(-4, 9, shape)  # whole numbers: sums are exact, ties many
        found = masks.best_columns(whole.to(dtype), v, m)
        assert torch.equal(found, best_columns(whole.float(), v, m)), (shape, v, m)


@pytest.mark.parametrize(("spec", "sparsity"), [("csr", 0.9), ("bsr8", 0.5), ("2:4", None), ("16:2:8", None)])
def test_prune_on_a_gpu_that_has_them(
    spec: str, sparsity: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randint(-9, 9, (45, 70)).float()
    expected = sk.prune(scores, sparsity, spec)
    used: list[Tensor] = []

    def kernels_for(scores: Tensor) -> Any:
        used.append(scores)
        return masks

    monkeypatch.setattr(triton_masks, "kernels_for", kernels_for)
    assert torch.equal(sk.prune(scores, sparsity, spec), expected)
    assert used
