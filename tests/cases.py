"""The matrix that all kernels are tested on: formats, shapes, batches, densities, layouts, products.

A new format joins by one entry in :data:`MASKS`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sparsekern import Pattern
from sparsekern.doctor.cases import LAYOUTS
from sparsekern.formats import parse_format
from tolerance import Exact
from torch import Tensor


def unstructured_mask(out_features: int, in_features: int, density: float) -> Tensor:
    """Random positions. Between densities 0 and 1, one row and one column are full and a tenth is empty.

    Of a single row or column, none is empty.
    """
    mask = torch.rand(out_features, in_features) < density
    if 0.0 < density < 1.0:
        mask[torch.randint(out_features, ())] = True
        mask[:, torch.randint(in_features, ())] = True
        for axis, size in enumerate((out_features, in_features)):
            if size > 1:
                mask.index_fill_(axis, torch.randperm(size)[: -(-size // 10)], False)
    return mask


def block_mask(out_features: int, in_features: int, density: float, block: tuple[int, int]) -> Tensor:
    """Random blocks, those at the edges cut off."""
    down, across = -(-out_features // block[0]), -(-in_features // block[1])
    mask = unstructured_mask(down, across, density)
    return mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:out_features, :in_features]


def pruned_mask(out_features: int, in_features: int, density: float, format: str) -> Tensor:
    """The mask of random scores, for formats that fix their density."""
    return parse_format(format).prune(torch.rand(out_features, in_features))


def mask_maker(format: str) -> Callable[[int, int, float], Tensor]:
    """``(out, in, density)`` to a random mask of a format."""
    kind = parse_format(format)
    if kind.fixed_sparsity is not None:
        return partial(pruned_mask, format=format)
    return partial(block_mask, **kind.options) if kind.options else unstructured_mask


MASKS = {
    format: mask_maker(format)
    for format in ("csr", "bsr4", "bsr16x8", "bsr32", "2:4", "2:8", "5:11", "64:2:8", "4:2:5")
}
"""Format spec string to a random mask of that format."""

ALL_FORMATS = (
    *("csr", "bsr4", "bsr8", "bsr16", "bsr32", "bsr64", "bsr128", "bsr4x128", "bsr128x4", "bsr64x32"),
    *("1:1", "1:2", "1:4", "2:4", "3:4", "4:4", "2:8", "4:8", "8:16", "16:16", "1:16"),
    *("64:2:8", "128:2:16", "32:2:5", "4:2:4", "16:2:32"),
)
"""Specs that are tried on few cases."""

SMALL_SHAPES = ((1, 1), (7, 5), (16, 16))
MEDIUM_SHAPES = ((333, 129), (130, 1000), (1025, 257))
LARGE_SHAPES = ((3000, 2000), (100, 5000))
BATCHES = (0, 1, 2, 7, 8, 16, 17, 40, 63, 64, 65, 130, 300)
DENSITIES = (0.0, 0.02, 0.1, 0.5, 1.0)
DTYPES = (torch.float32, torch.bfloat16)


def random_pattern(format: str, shape: tuple[int, int], density: float) -> Pattern:
    return parse_format(format).from_mask(mask_maker(format)(*shape, density))


def op(pattern: Pattern, product: str, library: str = "sparsekern") -> Any:
    """The op of a pattern's format, e.g. ``torch.ops.sparsekern.csr_linear`` for ``"linear"``."""
    return getattr(getattr(torch.ops, library), f"{pattern.format}_{product}")


def free(format: str, sparsity: float) -> float | None:
    """``sparsity``, or None where the format fixes it."""
    return sparsity if parse_format(format).fixed_sparsity is None else None


def where(pattern: Pattern) -> tuple[list[Tensor], list[int]]:
    """A pattern as its ops take it."""
    return pattern.tensors(), pattern.sizes()


@dataclass(frozen=True)
class Case:
    format: str
    shape: tuple[int, int]
    batch: int
    density: float
    dtype: torch.dtype
    layout: str


def cases(
    shapes: Iterable[tuple[int, int]],
    formats: Iterable[str] = tuple(MASKS),
    layouts: Iterable[str] = tuple(LAYOUTS),
    dtypes: Iterable[torch.dtype] = DTYPES,
    sample: int | None = None,
) -> Iterator[Case]:
    """All cases, or only ``sample`` random batches and densities of each format, shape, dtype and layout."""
    chosen = random.Random(torch.initial_seed())
    for format, shape, dtype, layout in itertools.product(formats, shapes, dtypes, layouts):
        free = parse_format(format).fixed_sparsity is None
        rest = list(itertools.product(BATCHES, DENSITIES if free else DENSITIES[-1:]))
        for batch, density in rest if sample is None else chosen.sample(rest, min(sample, len(rest))):
            yield Case(format, shape, batch, density, dtype, layout)


def check_products(
    case: Case,
    library: str = "sparsekern",
    where: Callable[[Pattern], tuple[list[Tensor], list[int]]] = where,
    pattern: Pattern | None = None,
    needs: Iterable[tuple[bool, ...]] = tuple(itertools.product((True, False), repeat=3)),
) -> None:
    """Every op of a format on random numbers, against dense products in float64. None: a random pattern.

    ``needs``: which gradients are asked for at once.
    """
    lay = LAYOUTS[case.layout]
    out_features, in_features = case.shape
    pattern = pattern or random_pattern(case.format, case.shape, case.density)
    at = where(pattern)
    product = partial(op, pattern, library=library)
    x = lay(torch.randn(case.batch, in_features).to(case.dtype))
    grad = lay(torch.randn(case.batch, out_features).to(case.dtype))
    values = torch.randn(pattern.values_shape).to(case.dtype)
    bias = torch.randn(out_features).to(case.dtype)
    weight = pattern.scatter  # values to W, so that W of ones holds a 1 for each term

    y = Exact(lambda x, v: x @ weight(v).t(), x, values)
    y.check(product("linear")(x, values, None, *at), f"linear {case}")
    y = Exact(lambda x, v, b: x @ weight(v).t() + b, x, values, bias)
    y.check(product("linear")(x, values, bias, *at), f"linear with bias {case}")

    grad_x = Exact(lambda g, v: g @ weight(v), grad, values)
    grad_values = Exact(lambda g, x: pattern.gather(g.t() @ x), grad, x)
    grad_bias = Exact(lambda g: g.sum(0), grad)
    grad_x.check(product("linear_backward_input")(grad, values, *at), f"backward_input {case}")
    grad_values.check(product("linear_backward_weight")(grad, x, *at), f"backward_weight {case}")
    for need in needs:
        gradients = product("linear_backward")(grad, x, values, *at, *need)
        for exact, got, needed in zip((grad_x, grad_values, grad_bias), gradients, need, strict=True):
            if needed:
                exact.check(got, f"backward, need {need}, {case}")
            else:
                assert got.numel() == 0
