"""Masks that are N:M along the rows and along the columns: the best one, tile by tile.

In each M × M tile the mask X maximizes ``Σ S·X`` with N ones in each row and each column, which is a
minimum-cost flow. It is solved exactly, for many tiles at once:

1. *Prices* of the columns. The relaxed problem with an entropy term has the solution
   ``X = sigmoid((S − u − v) / ε)`` with prices u of the rows and v of the columns that make its sums N. Eight
   damped Newton steps while ε falls approach it. This only makes the rest short.
2. *Rows*: the N largest ``S − v`` of each row. Whatever v is, this mask is the best one of those that have
   its column sums.
3. *Flow*: while a column holds too many ones, one of them moves, along the path of columns that costs least,
   to a column that holds too few. Shortest paths keep a flow the best one for its column sums (Ahuja,
   Magnanti and Orlin, Network Flows, §9.7), so the mask is optimal when all sums are N.

After the prices, 0.6 ones per 4:8 tile of normal scores and 2.2 per 8:16 tile are left to move; without them
2.3 and 6.7. Rounding can cost some 2⁻¹⁸ of a tile's largest score; on 880 tiles of 4:8, 2:8, 1:8, 6:10 and
8:16 (normal scores and Student's t) the sums were those of linear programming. 2:4 has 90 masks: all are
tried.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .groups import CHUNK, beaten

_STEPS = [0.5 * 0.72**k for k in range(8)]  # ε, in mean deviations of the scores: 0.5 to 0.05
_TOLERANCE = 2.0**-18  # a path must gain more, of scores up to 1: 16 times what rounding can add to one step


def transposable_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool ``[out, in]`` for finite floating-point ``scores`` whose sizes are multiples of ``m``."""
    out_features, in_features = scores.shape
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if not mask.numel():
        return mask
    step = m * max(1, CHUNK // (m * in_features))
    for first in range(0, out_features, step):
        rows = scores[first : first + step]
        tiles = rows.view(-1, m, in_features // m, m).permute(1, 3, 0, 2).reshape(m, m, -1)
        chosen = _best_of_all(tiles) if (n, m) == (2, 4) else _best(tiles, n)
        grid = chosen.view(m, m, -1, in_features // m).permute(2, 0, 3, 1)
        mask[first : first + step] = grid.reshape(rows.shape)
    return mask


def _best_of_all(scores: Tensor) -> Tensor:
    """The best of the 90 masks 2:4 for ``scores [4, 4, tiles]``; ties to the first, lexicographically."""
    row = [[float(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    masks = torch.tensor(list(itertools.product(row, repeat=4)), dtype=scores.dtype, device=scores.device)
    masks = masks[(masks.sum(1) == 2).all(1)].view(90, 16)
    best = (masks @ scores.reshape(16, -1)).argmax(0)
    return masks.bool()[best].t().reshape(scores.shape)


def _best(scores: Tensor, n: int) -> Tensor:
    """Bool ``[m, m, tiles]`` for ``scores [m, m, tiles]``: the best N:M masks."""
    m = scores.shape[0]
    if n == m:
        return torch.ones_like(scores, dtype=torch.bool)
    largest = scores.abs().amax((0, 1)).clamp_(min=torch.finfo(scores.dtype).tiny)
    scores = scores / largest
    ranks = beaten([column.contiguous() for column in (scores - _prices(scores, n)).unbind(1)])
    chosen = torch.stack([rank < n for rank in ranks], 1)
    _balance(scores, chosen, n)
    return chosen


def _prices(scores: Tensor, n: int) -> Tensor:
    """Prices ``[1, m, tiles]`` of the columns at which the N best of each row are about N of each column."""
    m = scores.shape[0]
    centred = scores - scores.mean((0, 1))
    deviation = centred.abs().mean((0, 1)).clamp_(min=torch.finfo(scores.dtype).tiny)
    centred /= deviation
    v = centred.mean(0, keepdim=True)
    u = centred.mean(1, keepdim=True) - math.log(n / (m - n)) * _STEPS[0]
    for epsilon in _STEPS:
        x = torch.sigmoid_((centred - u).sub_(v).div_(epsilon))
        slope = torch.addcmul(x, x, x, value=-1.0)  # of the sigmoid: x (1 − x)
        rows = _newton_step(x, slope, n, 1)
        columns = _newton_step(x, slope, n, 0)
        u += epsilon * rows
        v += epsilon * (columns - columns.mean(1, keepdim=True))  # u moves what all columns have in common
    return v * deviation


def _newton_step(x: Tensor, slope: Tensor, n: int, dim: int) -> Tensor:
    """How far, in ε, the prices along ``dim`` must rise so that ``x`` sums to ``n`` along it. Damped."""
    excess = x.sum(dim, keepdim=True) - n
    return (excess / slope.sum(dim, keepdim=True).clamp_(min=0.1 * n)).clamp_(-2.0, 2.0)


def _balance(scores: Tensor, chosen: Tensor, n: int) -> None:
    """Move ones of ``chosen`` along best paths until each column holds ``n``. In place, scores up to 1."""
    m = scores.shape[0]
    tiles = torch.arange(scores.shape[2], device=scores.device)
    while True:
        excess = chosen[:, :, tiles].sum(0) - n
        unbalanced = (excess != 0).any(0)
        tiles, excess = tiles[unbalanced], excess[:, unbalanced]
        if not tiles.numel():
            return
        s, x = scores[:, :, tiles], chosen[:, :, tiles]
        leave, enter = torch.where(x, -s, -torch.inf), torch.where(x, -torch.inf, s)  # [row, column, tile]
        move = leave[0, :, None] + enter[0]  # [from, to, tile]: the best row to move a one in
        for row in range(1, m):
            torch.maximum(move, leave[row, :, None] + enter[row], out=move)
        # The best paths from columns with too many ones (Bellman and Ford).
        gain = torch.where(excess > 0, 0.0, -torch.inf).to(s.dtype)
        before = torch.full_like(excess, -1)
        for _ in range(m - 1):
            best, source = (move + gain[:, None]).max(0)
            better = best > gain + _TOLERANCE
            if not bool(better.any()):
                break
            gain = torch.where(better, best, gain)
            before = torch.where(better, source, before)
        _walk(chosen, leave, enter, before, torch.where(excess < 0, gain, -torch.inf).argmax(0), tiles)


def _walk(chosen: Tensor, leave: Tensor, enter: Tensor, before: Tensor, end: Tensor, tiles: Tensor) -> None:
    """In each of ``tiles``, move a one along each step of the path: from ``end`` back to ``before`` = −1."""
    lane = torch.arange(tiles.numel(), device=tiles.device)
    for _ in range(len(before)):
        source = before[end, lane]
        on = source >= 0
        source, end, lane = source[on], end[on], lane[on]
        if not lane.numel():
            return
        row = (leave[:, source, lane] + enter[:, end, lane]).argmax(0)
        chosen[row, source, tiles[lane]] = False
        chosen[row, end, tiles[lane]] = True
        end = source
