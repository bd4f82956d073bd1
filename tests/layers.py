"""The layer that the tests of copies and checkpoints share."""

from __future__ import annotations

from typing import Any

import sparsekern as sk
import torch
from cases import free


def make_layer(format: str = "csr", sparsity: float = 0.7, **options: Any) -> sk.SparseLinear:
    """A layer of random values and positions; W is [100, 70]."""
    return sk.SparseLinear(70, 100, sparsity=free(format, sparsity), format=format, **options)


def assert_equal_layers(a: sk.SparseLinear, b: sk.SparseLinear) -> None:
    """Equal bits: positions, everything derived from them, values, bias, and what comes out."""
    assert type(a) is type(b)
    assert torch.equal(a.mask, b.mask), "positions differ"
    assert torch.equal(a.values, b.values), "values differ"
    assert torch.equal(a.bias, b.bias) if a.bias is not None and b.bias is not None else a.bias is b.bias
    assert all(torch.equal(s, t) for s, t in zip(a.pattern.tensors(), b.pattern.tensors(), strict=True))
    x = torch.randn(5, 70, dtype=a.values.dtype)
    assert torch.equal(a(x), b(x))


def detached(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of a state_dict that shares no memory with the layer."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}
