"""What a product costs by each strategy: the model behind ``backend="auto"`` on a CPU.

A strategy's time is a sum of non-negative terms, ``t = Σ_i c_i f_i``. The features ``f`` are what bounds the
kernels: a call, the weight's bytes, multiply-adds, and what goes in and out; the coefficients ``c``, in
seconds, are measured, see :mod:`sparsekern.benchmark.tune`. One row of x, few and many run on different
kernels, so ranges of batches have coefficients of their own. Only ratios of two times are used, so a profile
of another clock serves as well; one of another thread count roughly. GPUs have :mod:`.cost_gpu`.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

from ._library import LOAD_ERROR
from .copies import has_mask, is_dense
from .dense import DENSE, MASK, NATIVE, By, Plan
from .formats import Pattern

VERSION = 2
"""Of the profile's layout."""

RANGES = (1, 4, 8, 16)
"""The last batch of each range, but for that of many. Kernels for few rows of x end at one of these, which
depends on format and instruction set."""

FEW = RANGES[-1]

MARGIN = 0.95
"""For inference, kernels of ours run where they are predicted to take at most this share of what torch's
dense product does: near break-even a wrong guess must cost nothing."""

MIXED_MARGIN = 0.9
"""And training plans that mix them with dense products: these copy W and its gradient besides, which a busy
memory slows most. Of 125 cases on 2 AVX2 cores (CSR, 30 to 90 % sparsity, 4 to 1024 rows) the worst is 0.93x
of dense with it, and 0.80x where the margin of inference holds."""

_PARTS = {
    "dense": ("linear", "forward", "backward_input", "backward_weight"),
    "mask": ("forward", "backward_input", "backward_weight"),
    "native": ("forward", "backward", "backward_weight"),
}
"""What is measured. Dense: torch's own ``linear``, and the products of a plan, whose forward one looks for
the copy of W. Mask: of all patterns alike, by the size of W. Native: the gradients together, and that of the
values alone."""


def features(out_features: int, in_features: int, values: int, batch: int) -> list[float]:
    """A call, the weight's values, multiply-adds, and numbers in and out; ``values`` of a dense weight is
    ``out · in``."""
    columns = batch if batch <= FEW else -(-batch // FEW) * FEW  # many rows run in whole vectors of them
    return [1.0, values, float(values) * columns, float(in_features + out_features) * columns]


def family(pattern: Pattern) -> str:
    """Patterns of one family share coefficients: their kernels are as fast per value."""
    options = pattern.options
    if pattern.format == "bsr":
        return f"bsr{min(*options['block'], 32)}"
    if pattern.format == "nm":
        return "nm4" if options["m"] <= 4 else "nm"
    return pattern.format


def key(strategy: str, dtype: torch.dtype, product: str, batch: int) -> str:
    """Names the coefficients of a strategy (a family, ``"dense"``), e.g. ``"csr/float32/forward/16"``."""
    end = next((end for end in RANGES if batch <= end), "many")
    return f"{strategy}/{str(dtype).removeprefix('torch.')}/{product}/{end}"


@dataclass(frozen=True)
class Profile:
    """Measured coefficients.

    Attributes:
        coefficients: :func:`key` to one number per feature, in seconds.
        source: where they come from, for people.
    """

    coefficients: Mapping[str, list[float]]
    source: str

    @property
    def has_masks(self) -> bool:
        """Whether kernels that follow a mask were measured; where not, they are not chosen."""
        return not _MASK_KEYS.isdisjoint(self.coefficients)

    def seconds(
        self, strategy: str, dtype: torch.dtype, product: str, shape: tuple[int, int], values: int, batch: int
    ) -> float:
        """The predicted time of a part of a training step, or of ``"scatter"`` or ``"gather"``."""
        coefficients = self.coefficients[key(strategy, dtype, product, batch)]
        terms = features(*shape, values, batch)
        return sum(c * f for c, f in zip(coefficients, terms, strict=True))


@dataclass(frozen=True)
class Prediction:
    """What the model says of one call.

    Attributes:
        plan: who should compute what.
        seconds: the time of that.
        dense: the time of an ``nn.Linear`` of the same shape.
    """

    plan: Plan
    seconds: float
    dense: float


def predict(
    pattern: Pattern,
    batch: int,
    dtype: torch.dtype,
    need_x: bool = True,
    need_values: bool = True,
    plan: Plan | None = None,
) -> Prediction:
    """The fastest plan for a call, with its backward pass where gradients of x or the values are needed.

    Or, if ``plan`` is given, the time of that one.

    A plan with a dense forward product or gradient of x scatters the values first, but for inference, where
    the copy is kept.
    """
    profile = current()
    shape, name = pattern.shape, family(pattern)
    size, values = shape[0] * shape[1], math.prod(pattern.values_shape)

    def native(product: str, numbers: int = values, rows: int = batch) -> float:
        return profile.seconds(name, dtype, product, shape, numbers, rows)

    def by_size(strategy: str, product: str) -> float:
        return profile.seconds(strategy, dtype, product, shape, size, batch)

    masked = has_mask(pattern) and profile.has_masks
    sized = {By.DENSE: "dense", **({By.MASK: "mask"} if masked else {})}
    forward = {by: by_size(strategy, "forward") for by, strategy in sized.items()}
    grad_x = {by: by_size(strategy, "backward_input") if need_x else 0.0 for by, strategy in sized.items()}
    grad_values = {
        by: by_size(strategy, "backward_weight") if need_values else 0.0 for by, strategy in sized.items()
    }
    linear = by_size("dense", "linear") + grad_x[By.DENSE] + grad_values[By.DENSE]
    copied = not is_dense(pattern)
    scatter = native("scatter", size, 1) if copied and (need_x or need_values) else 0.0
    grad_values[By.DENSE] += native("gather", rows=1) if copied and need_values else 0.0
    forward[By.NATIVE] = native("forward")
    weight_alone = native("backward_weight") if need_values else 0.0
    both = native("backward") if need_x else weight_alone

    def seconds_of(plan: Plan) -> float:
        if plan.grad_values is not By.NATIVE:
            gradients = grad_values[plan.grad_values] + (grad_x[plan.grad_x] if need_x else 0.0)
        else:
            gradients = both if plan.grad_x is By.NATIVE else grad_x[plan.grad_x] + weight_alone
        dense = plan.forward is By.DENSE or (plan.grad_x is By.DENSE and need_x)
        return forward[plan.forward] + gradients + (scatter if dense else 0.0)

    def handicapped(plan: Plan) -> float:
        if plan == DENSE:
            return seconds_of(plan)
        if not (need_x or need_values):
            return seconds_of(plan) / MARGIN
        return seconds_of(plan) / (MIXED_MARGIN if By.DENSE in plan else 1.0)

    if plan is None:
        plan = min(plans(need_x, need_values, masked), key=handicapped)
    return Prediction(plan, seconds_of(plan), linear)


def plans(need_x: bool, need_values: bool, masked: bool) -> list[Plan]:
    """Those that differ: a plan says nothing of gradients that are not needed."""
    whole = [DENSE, NATIVE, *([MASK] if masked else [])]
    if not (need_x or need_values):
        return whole
    if not (need_x and need_values):
        gradients = [plan[1:] for plan in whole]
    else:  # a native gradient of x alone is not measured
        every = [plan[0] for plan in whole]
        gradients = [(x, w) for x in every for w in every if x is not By.NATIVE or w is By.NATIVE]
    return [Plan(plan[0], *pair) for plan in whole for pair in gradients]


def choose(pattern: Pattern, batch: int, dtype: torch.dtype, need_x: bool, need_values: bool) -> Plan:
    """:func:`predict`'s plan, remembered by the pattern for batches of about this size."""
    if batch == 0:
        return NATIVE
    at = remembered_at(batch, dtype, need_x, need_values)
    plan: Plan | None = pattern.memo.get(at)
    if plan is None:
        plan = pattern.memo[at] = predict(pattern, at[0], dtype, need_x, need_values).plan
    return plan


def remembered_at(
    batch: int, dtype: torch.dtype, need_x: bool, need_values: bool
) -> tuple[int, torch.dtype, bool, bool]:
    """Where a pattern's memo has the plan, under the largest batch that shares it."""
    return batch if batch <= FEW else 1 << (batch - 1).bit_length(), dtype, need_x, need_values


# Whole numbers: a float that is read while torch.compile traces makes it compile everything twice.
_COMPILED_PERCENT = {"csr": 50, "bsr": 60, "nm": 50, "vnm": 50}


def native_if_compiled(pattern: Pattern, dtype: torch.dtype) -> bool:
    """The choice for a compiled graph, which serves every batch: by density alone, about where native kernels
    break even with dense at large batches. Dense products of bfloat16 are twice as fast, ours are not."""
    percent = _COMPILED_PERCENT[pattern.format]
    if dtype != torch.float32:
        percent //= 2
    return 100 * pattern.nnz <= percent * pattern.shape[0] * pattern.shape[1]


# --- profiles: the one that ``tune`` wrote on this machine, else the one that comes with the package --------

_BUILT_IN = Path(__file__).with_name("profiles")


def profile_path() -> Path:
    """Where ``python -m sparsekern tune`` keeps what it measured: the platform's folder for such data.

    ``SPARSEKERN_PROFILE`` names another file.
    """
    if path := os.environ.get("SPARSEKERN_PROFILE"):
        return Path(path)
    return Path(platformdirs.user_data_dir("sparsekern", appauthor=False)) / f"{isa()}.json"


def isa() -> str:
    """The instruction set whose profile counts; ``"generic"`` without the library: nothing is native then.

    Dot instructions for bfloat16 have no profile of their own, as no machine with them has measured one: BSR,
    2:4 and V:2:M are predicted to be slower than they should be there, and ``auto`` takes dense early.
    """
    used = "generic" if LOAD_ERROR else str(torch.ops.sparsekern.isa())
    return used.partition("+")[0]


@functools.cache
def current() -> Profile:
    """This machine's profile. A file that cannot be used is warned of once, and the built-in one used."""
    path = profile_path()
    if path.exists() or "SPARSEKERN_PROFILE" in os.environ:
        try:
            return read(path)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"{error}; using the built-in profile. `python -m sparsekern tune` makes a new one",
                RuntimeWarning,
                stacklevel=3,
            )
    return read(_BUILT_IN / f"{isa()}.json")


def read(path: Path) -> Profile:
    """The profile in a file. Raises ``ValueError`` that names the file if it is not one of this version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, coefficients = data["version"], data["coefficients"]
        if version != VERSION:
            raise ValueError(f"version must be {VERSION}, got {version!r}")
        wanted = set(all_keys())
        if _MASK_KEYS.isdisjoint(coefficients):  # measured before there were such kernels
            wanted -= _MASK_KEYS
        if missing := sorted(wanted - set(coefficients)):
            raise ValueError(f"coefficients must hold {missing[0]!r}")
        for name in wanted:
            numbers = coefficients[name]
            good = isinstance(numbers, list) and len(numbers) == TERMS
            # Times are compared and multiplied: neither 0 nor enormous.
            good = good and all(isinstance(c, int | float) and 0.0 <= c <= 1e3 for c in numbers)
            if not good or not any(numbers):
                rule = f"{TERMS} numbers from 0 to 1000, not all 0"
                raise ValueError(f"coefficients of {name!r} must be {rule}, got {numbers!r}")
        return Profile({name: coefficients[name] for name in wanted}, str(data["source"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # bad JSON is a ValueError too
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} must be a profile of sparsekern: {what}") from None


def write(path: Path, coefficients: Mapping[str, list[float]], source: str) -> None:
    """Save a profile; a reader sees the old file or the new one, never half of it."""
    text = json.dumps({"version": VERSION, "source": source, "coefficients": coefficients}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    current.cache_clear()


FAMILIES = ("csr", "bsr4", "bsr8", "bsr16", "bsr32", "nm4", "nm", "vnm")
DTYPES = (torch.float32, torch.bfloat16)
TERMS = len(features(1, 1, 1, 1))


def all_keys() -> Iterator[str]:
    """All that a profile holds."""
    for strategy, dtype in itertools.product(("dense", "mask", *FAMILIES), DTYPES):
        parts = _PARTS.get(strategy, _PARTS["native"])
        for product, batch in itertools.product(parts, (*RANGES, FEW + 1)):
            yield key(strategy, dtype, product, batch)
        if strategy in FAMILIES:
            yield key(strategy, dtype, "scatter", 1)
            yield key(strategy, dtype, "gather", 1)


_MASK_KEYS = frozenset(name for name in all_keys() if name.startswith("mask/"))
