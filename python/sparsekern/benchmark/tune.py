"""``python -m sparsekern tune``: measures the coefficients of :mod:`sparsekern.cost` on this machine."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import cost, ops, triton_profile
from ..copies import gather, mask_operands, scatter
from ..dense import MASK
from ..formats import CSR, mask, parse_format, triton_products
from ..formats.products import PRODUCTS
from . import tune_triton
from .progress import progress
from .timing import quantile, race

SHAPES = ((128, 128), (512, 512), (2048, 1024), (768, 3072), (4096, 2048))
BATCHES = (1, 2, 4, 5, 8, 9, 16, 32, 128, 512)
_FROM_MEMORY = 2**23
"""Weights of so many elements overflow the caches, which counts for few rows of x; many are left out."""
_MIN_SECONDS = 0.002
_WORST_FIT = 0.25
"""Median relative error of a fit that is not to be trusted: 10 % is usual, the machine was busy."""

# Format and sparsity of the weights from which each family's coefficients are fitted.
SAMPLES: dict[str, Sequence[tuple[str, float | None]]] = {
    "csr": (("csr", 0.98), ("csr", 0.8), ("csr", 0.4)),
    "bsr4": (("bsr4", 0.9), ("bsr4", 0.4)),
    "bsr8": (("bsr8", 0.9), ("bsr8", 0.4)),
    "bsr16": (("bsr16", 0.9), ("bsr16", 0.2)),
    "bsr32": (("bsr32", 0.9), ("bsr64", 0.2)),
    "nm4": (("1:4", None), ("2:4", None)),
    "nm": (("2:8", None), ("8:16", None)),
    "vnm": (("64:2:16", None), ("64:2:8", None)),
}


@dataclass(frozen=True)
class Reading:
    """One measured call: which coefficients it says something about, its features and its seconds."""

    key: str
    features: list[float]
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tune``."""
    parser.add_argument("--output", type=Path, help="the profile to write (default: where it is looked for)")


def main(arguments: argparse.Namespace) -> int:
    """Measure what this machine has: the CPU for ``"auto"``, and on a GPU the tiles of Triton's kernels."""
    status = tune_cpu(arguments)
    if status == 0 and torch.cuda.is_available() and triton_products.missing("bsr", "cuda") is None:
        path = triton_profile.profile_path()
        source = f"measured with torch {torch.__version__}"
        try:
            tiles = tune_triton.measure()
            triton_profile.use(tiles, {})
            triton_profile.write(path, tiles, tune_triton.compare(), source)
        except KeyboardInterrupt:
            print("interrupted; no profile of Triton's kernels was written", file=sys.stderr)
            return 130
        print(f"wrote {path}: tiles of Triton's kernels, and how they compare with the native ones")
        triton_profile.load(path)
    return status


def tune_cpu(arguments: argparse.Namespace) -> int:
    """Measure, fit, save, and say how well the fit predicts what was measured."""
    path = arguments.output or cost.profile_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OSError(f"{path} must be a file that can be written")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        readings = list(measure())
    except KeyboardInterrupt:
        print("interrupted; no profile was written", file=sys.stderr)
        return 130
    coefficients = {key: fit([r for r in readings if r.key == key]) for key in cost.all_keys()}
    errors = [abs(np.dot(coefficients[r.key], r.features) / r.seconds - 1.0) for r in readings]
    fitted = (
        f"{len(readings)} readings, half within {quantile(errors, 0.5):.0%} of the fit, "
        f"nine in ten within {quantile(errors, 0.9):.0%}"
    )
    if quantile(errors, 0.5) > _WORST_FIT:
        print(f"error: {fitted}: run it again on an idle machine; no profile was written", file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    cost.write(
        path, coefficients, f"measured with {threads} threads, {cost.isa()}, torch {torch.__version__}"
    )
    print(f"wrote {path}: {fitted}")
    return 0


def measure() -> Iterator[Reading]:
    """All readings, with a progress bar."""
    families = [
        ("dense", None, None),
        ("mask", "csr", 0.1),
        ("mask", "csr", 0.5),
        *((f, *s) for f, samples in SAMPLES.items() for s in samples),
    ]
    cases = list(itertools.product(families, cost.DTYPES, SHAPES))
    for (family, spec, sparsity), dtype, shape in progress(cases):
        if spec is None:
            yield from _dense(dtype, shape)
        elif family == "mask":
            yield from _masked(sparsity, dtype, shape)
        else:
            yield from _native(family, spec, sparsity, dtype, shape)


def fit(readings: Sequence[Reading]) -> list[float]:
    """Non-negative coefficients with the least squared relative error.

    There are so few that the best of all subsets which come out non-negative is the exact answer.
    """
    rows = np.array([r.features for r in readings]) / np.array([[r.seconds] for r in readings])
    best, least = np.zeros(cost.TERMS), np.inf
    for count in range(1, cost.TERMS + 1):
        for chosen in map(list, itertools.combinations(range(cost.TERMS), count)):
            scale = rows[:, chosen].max(0)
            found = np.linalg.lstsq(rows[:, chosen] / scale, np.ones(len(rows)), rcond=None)[0] / scale
            error = float(np.square(rows[:, chosen] @ found - 1.0).sum())
            if (found >= 0.0).all() and error < least:
                best, least = np.zeros(cost.TERMS), error
                best[chosen] = found
    return [float(c) for c in best]


def batches(shape: tuple[int, int]) -> Iterator[int]:
    """Those that are measured with weights of this shape."""
    return (batch for batch in BATCHES if batch <= cost.FEW or shape[0] * shape[1] < _FROM_MEMORY)


def _dense(dtype: torch.dtype, shape: tuple[int, int]) -> Iterator[Reading]:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    pattern = CSR.from_mask(torch.rand(shape) < 0.5)
    values = pattern.gather(weight)
    for batch in batches(shape):
        x, grad = torch.randn(batch, shape[1]).to(dtype), torch.randn(batch, shape[0]).to(dtype)
        calls: dict[str, Callable[[], object]] = {
            "linear": partial(torch.nn.functional.linear, x, weight, bias),
            "forward": partial(ops.linear, x, values, pattern, bias, backend="dense"),
            "backward_input": partial(torch.mm, grad, weight),
            "backward_weight": partial(_weight_gradients, grad, x),
        }
        yield from _read("dense", dtype, shape, weight.numel(), batch, calls)


def _weight_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return grad.t() @ x, grad.sum(0)


def _masked(sparsity: float | None, dtype: torch.dtype, shape: tuple[int, int]) -> Iterator[Reading]:
    pattern = CSR.from_mask(CSR.prune(torch.rand(shape), sparsity))
    values, bias = torch.randn(pattern.values_shape).to(dtype), torch.randn(shape[0]).to(dtype)
    at = mask_operands(pattern)
    for batch in batches(shape):
        x, grad = torch.randn(batch, shape[1]).to(dtype), torch.randn(batch, shape[0]).to(dtype)
        pattern.memo[cost.remembered_at(batch, dtype, False, False)] = MASK
        calls: dict[str, Callable[[], object]] = {
            "forward": partial(ops.linear, x, values, pattern, bias),
            "backward_input": partial(mask.linear_backward, grad, x, values, *at, True, False),
            "backward_weight": partial(mask.linear_backward, grad, x, values, *at, False, True),
        }
        yield from _read("mask", dtype, shape, shape[0] * shape[1], batch, calls)


def _native(
    family: str, spec: str, sparsity: float | None, dtype: torch.dtype, shape: tuple[int, int]
) -> Iterator[Reading]:
    kind = parse_format(spec)
    pattern = kind.from_mask(kind.prune(torch.rand(shape), sparsity))
    values, bias = torch.randn(pattern.values_shape).to(dtype), torch.randn(shape[0]).to(dtype)
    products, at = PRODUCTS[pattern.format], (pattern.tensors(), pattern.sizes())
    for batch in batches(shape):
        x, grad = torch.randn(batch, shape[1]).to(dtype), torch.randn(batch, shape[0]).to(dtype)
        calls: dict[str, Callable[[], object]] = {
            "forward": partial(ops.linear, x, values, pattern, bias, backend="native"),
            "backward": partial(products.backward, grad, x, values, *at, True, True, True),
            "backward_weight": partial(products.backward, grad, x, values, *at, False, True, True),
        }
        yield from _read(family, dtype, shape, values.numel(), batch, calls)
    weight = scatter(values, pattern)
    copies: dict[str, Callable[[], object]] = {"scatter": lambda: scatter(values, pattern, weight)}
    yield from _read(family, dtype, shape, weight.numel(), 1, copies)
    copies = {"gather": lambda: gather(weight, pattern)}
    yield from _read(family, dtype, shape, values.numel(), 1, copies)


@torch.no_grad()
def _read(
    strategy: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    values: int,
    batch: int,
    calls: dict[str, Callable[[], object]],
) -> list[Reading]:
    features = cost.features(*shape, values, batch)
    times = race(calls, rounds=3, min_seconds=_MIN_SECONDS)
    return [
        Reading(cost.key(strategy, dtype, product, batch), features, min(seconds))
        for product, seconds in times.items()
    ]
