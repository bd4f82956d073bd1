"""How much of a global sparsity each layer takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .formats.checks import check_sparsity

DISTRIBUTIONS = ("uniform", "er", "erk")


def allocate(
    distribution: str | Mapping[str, float], shapes: Mapping[str, Sequence[int]], sparsity: float
) -> dict[str, float]:
    """The sparsity of each layer, such that all of them together have ``sparsity``.

    Args:
        distribution:
            * ``"uniform"``: every layer has ``sparsity``.
            * ``"er"`` (Erdős–Rényi): ``density = ε · (out + in) / (out · in)``, other dimensions ignored
              (Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
              connectivity").
            * ``"erk"`` (Erdős–Rényi kernel): ``density = ε · Σ dims / Π dims`` over all dimensions of the
              weight (Evci et al. 2020, "Rigging the Lottery", section 3). The same as ER where all layers are
              linear.
            * a dict of layer name to sparsity: taken as it is; layers that it does not name are dense.
        shapes: layer name to weight shape, ``[out, in]`` or ``[out, in, *kernel]``.
        sparsity: fraction of zeros over all layers, in [0, 1). A dict does not look at it.

    Returns:
        Layer name to sparsity, in [0, 1). With ER and ERK, ε makes the nonzeros of all layers add up to
        ``(1 − sparsity) · Σ size``. Layers that would need a density above 1 are dense, and ε is solved again
        for the others.

    Raises:
        ValueError: an unknown distribution, a sparsity outside [0, 1), a shape without ``out`` and ``in``, or
            a dict that names a layer that ``shapes`` lacks.

    >>> allocate("erk", {"fc1": (300, 784), "fc2": (100, 300), "head": (10, 100)}, 0.9)["head"]
    0.18...
    """
    if isinstance(distribution, Mapping):
        return _from_names(distribution, shapes)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {DISTRIBUTIONS} or a dict of layer names, got {distribution!r}"
        )
    check_sparsity("sparsity", sparsity)
    for name, shape in shapes.items():
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                f"shape of {name!r} must be (out, in, ...) of positive sizes, got {tuple(shape)}"
            )
    if distribution == "uniform" or sparsity == 0.0:
        return dict.fromkeys(shapes, float(sparsity))
    dims = 2 if distribution == "er" else None
    raw = {name: sum(shape[:dims]) / math.prod(shape[:dims]) for name, shape in shapes.items()}
    return _scale_to(raw, {name: math.prod(shape) for name, shape in shapes.items()}, sparsity)


def _scale_to(raw: dict[str, float], sizes: dict[str, int], sparsity: float) -> dict[str, float]:
    """Sparsities ``1 − min(1, ε · raw)`` with the ε that keeps ``(1 − sparsity) · Σ sizes`` nonzeros."""
    budget = (1.0 - sparsity) * sum(sizes.values())
    sparse = set(raw)
    while sparse:
        left = budget - sum(size for name, size in sizes.items() if name not in sparse)
        epsilon = left / sum(raw[name] * sizes[name] for name in sparse)
        # Capping layers at density 1 leaves more nonzeros to the others: ε only grows, so a capped layer
        # stays capped.
        full = {name for name in sparse if epsilon * raw[name] >= 1.0}
        if not full:
            break
        sparse -= full
    return {name: 1.0 - epsilon * raw[name] if name in sparse else 0.0 for name in raw}


def _from_names(distribution: Mapping[str, float], shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    unknown = sorted(set(distribution) - set(shapes))
    if unknown:
        raise ValueError(f"distribution must name layers among {sorted(shapes)}, got {unknown}")
    for name, sparsity in distribution.items():
        check_sparsity(f"sparsity of {name!r}", sparsity)
    return {name: float(distribution.get(name, 0.0)) for name in shapes}
