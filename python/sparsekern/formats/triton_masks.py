"""Masks of the largest scores by Triton's kernels, where these are on a GPU that has them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .._triton import unusable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(scores: Tensor) -> Any:
    """The module :mod:`sparsekern.triton_kernels.masks`, or None where torch's own ops have to do."""
    if not scores.is_cuda or scores.dtype not in DTYPES or scores.numel() == 0:
        return None
    return _kernels()


@functools.cache
def _kernels() -> Any:
    return None if unusable("cuda") else importlib.import_module("..triton_kernels.masks", __package__)
