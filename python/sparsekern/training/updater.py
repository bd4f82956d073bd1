"""One decision of dynamic sparse training: which weights to drop, which to grow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import CSR
from ..formats.checks import check_numbers
from ..formats.pattern import check_mask, top_mask

RowScores = Callable[[slice], Tensor]
"""Gives the scores ``[len(rows), in]`` of some rows of a weight, as a new tensor."""

CHUNKS = 16
"""Scores are made and searched in this many groups of rows: a tensor has 1/16 of the weight's elements."""


def drop_grow(mask: Tensor, drop_score: Tensor, grow_score: Tensor, fraction: float) -> Tensor:
    """One mask update of SET or RigL: ``k = int(nnz · fraction)`` active weights go, k inactive ones come.

    The k active positions of lowest ``drop_score`` are dropped; then the k inactive ones of highest
    ``grow_score`` are grown, among which those just dropped. Ties go to the lower index: it stays, and it is
    grown first.

    Args:
        mask: bool ``[out, in]``, True where a weight is active.
        drop_score: ``[out, in]``, low where a weight can go: ``|w|``. Read where the mask is True.
        grow_score: ``[out, in]``, high where one is missed: random for SET, ``|∂loss/∂W|`` for RigL.
        fraction: share of the active weights to move, in [0, 1].

    Returns:
        The new mask, with as many active weights as ``mask``.

    Raises:
        ValueError: a mask that is no bool matrix, scores of another shape or with NaN, a bad fraction.

    Source: Mocanu et al. 2018 (SET); Evci et al. 2020, "Rigging the Lottery", algorithm 1 (RigL).

    >>> new_mask = drop_grow(mask, weight.abs(), weight.grad.abs(), 0.3)
    """
    check_mask(mask)
    for name, score in (("drop_score", drop_score), ("grow_score", grow_score)):
        if score.shape != mask.shape:
            raise ValueError(f"{name} must have the mask's shape {list(mask.shape)}, got {list(score.shape)}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    nnz = int(mask.sum())
    count = int(nnz * fraction)
    new = torch.zeros_like(mask)
    active = drop_score[mask]
    check_numbers(active)
    new[mask] = top_mask(active, nnz - count)
    inactive = ~new
    others = grow_score[inactive]
    check_numbers(others)
    new[inactive] = top_mask(others, count)
    return new


@dataclass(frozen=True)
class Move:
    """The way from one pattern to the next, for all tensors with one number per nonzero."""

    pattern: CSR
    """The new pattern; it has as many nonzeros as the old one."""
    survives: Tensor
    """bool ``[nnz]``: which old values stay."""
    fresh: Tensor
    """bool ``[nnz]``: which new values have no old one."""

    def __call__(self, values: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """``values`` of the old pattern in the order of the new one, with ``fill`` where they are fresh."""
        moved = torch.empty_like(values)
        moved[self.fresh] = fill if isinstance(fill, float) else fill.to(moved.dtype)
        moved[~self.fresh] = values[self.survives]
        return moved

    @property
    def churn(self) -> float:
        """The share of the nonzeros that are fresh."""
        return float(self.fresh.sum()) / max(self.fresh.numel(), 1)


def drop_grow_sparse(pattern: CSR, drop_score: Tensor, grow_score: RowScores, count: int) -> Move:
    """:func:`drop_grow` on sparse storage. A position that is dropped and grown at once keeps its value.

    Args:
        pattern: the present pattern.
        drop_score: ``[nnz]``, one per value.
        grow_score: gives the grow scores of some rows.
        count: how many weights to move, at most nnz.

    No tensor has more than ``out · in / 16`` or nnz elements.
    """
    check_numbers(drop_score)
    index = pattern.flat_index()
    survives = top_mask(drop_score, pattern.nnz - count)
    grown = top_positions(grow_score, pattern.shape, index[survives], count)
    grown = _revive(index, survives, grown)
    index, fresh = _merge(index[survives], grown)
    return Move(CSR.from_flat_index(pattern.shape, index), survives, fresh)


def _revive(index: Tensor, survives: Tensor, grown: Tensor) -> Tensor:
    """Let the dropped positions that are among ``grown`` survive. Returns the other grown ones."""
    dropped = (~survives).nonzero().squeeze(1)
    if dropped.numel() == 0:
        return grown
    dropped_index = index[dropped]
    at = torch.searchsorted(dropped_index, grown).clamp_(max=dropped.numel() - 1)
    again = dropped_index[at] == grown
    survives[dropped[at[again]]] = True
    return grown[~again]


def _merge(kept: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """Two ascending runs as one, and a bool tensor that tells where the elements of ``grown`` are in it."""
    # Before a grown position come the grown ones and the kept ones below it.
    at = torch.searchsorted(kept, grown) + torch.arange(grown.numel(), device=grown.device)
    fresh = torch.zeros(kept.numel() + grown.numel(), dtype=torch.bool, device=kept.device)
    fresh[at] = True
    merged = torch.empty_like(fresh, dtype=kept.dtype)
    merged[at] = grown
    merged[~fresh] = kept
    return merged, fresh


def top_positions(scores: RowScores, shape: tuple[int, int], excluded: Tensor, count: int) -> Tensor:
    """Flat positions of the ``count`` highest scores outside ``excluded``, ascending; ties go to the lower.

    One pass over the rows in order keeps the candidates above a floor, which rises as better ones are found.
    It starts at a guess from some 64 rows, so that about 1.5 times ``count`` candidates are met and one
    selection at the end is enough; for 4096 x 4096 that takes half the time of a floor that starts at the
    bottom. A guess that was too high is noticed (too few candidates), and the pass is repeated without it.
    The result is exact either way.

    Args:
        scores: gives the scores of some rows.
        shape: ``(out, in)``.
        excluded: ascending int64 flat positions that are not to be chosen.
        count: how many to choose.

    Raises:
        ValueError: fewer than ``count`` positions have a score above −∞ (NaN scores).
    """
    out_features, in_features = shape
    if count == 0:
        return excluded[:0]
    step = -(-out_features // CHUNKS)
    starts = range(0, out_features, step)
    bounds = torch.arange(0, out_features + step, step, device=excluded.device) * in_features
    splits = torch.searchsorted(excluded, bounds).tolist()
    for floor in (_guess_floor(scores, shape, excluded.numel(), count), -math.inf):
        values, positions = torch.empty(0), excluded[:0]
        for i, start in enumerate(starts):
            chunk = scores(slice(start, min(start + step, out_features))).view(-1)
            base = start * in_features
            chunk[excluded[splits[i] : splits[i + 1]] - base] = -math.inf
            at = (chunk > floor).nonzero().squeeze(1)
            values = torch.cat([values.to(chunk), chunk[at]])
            positions = torch.cat([positions, at.add_(base)])
            if values.numel() > 2 * count:
                best = top_mask(values, count)
                values, positions = values[best], positions[best]
                floor = float(values.min())  # a later score equal to it loses the tie
        if values.numel() >= count:
            return positions[top_mask(values, count)]
    raise ValueError(
        f"grow scores must be numbers at {count} inactive positions or more, got {values.numel()}"
    )


def _guess_floor(scores: RowScores, shape: tuple[int, int], excluded: int, count: int) -> float:
    """The score that about 1.5 times ``count`` eligible positions exceed, judged by a sample of rows."""
    every = max(CHUNKS, shape[0] // 64)
    sample = scores(slice(0, None, every)).view(-1)
    above = math.ceil(1.5 * count * sample.numel() / (shape[0] * shape[1] - excluded))
    if above >= sample.numel():
        return -math.inf
    return float(torch.topk(sample, above, sorted=False).values.min())
