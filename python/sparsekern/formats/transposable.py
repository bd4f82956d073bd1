"""Masks that are N:M along the rows and along the columns: the best one, tile by tile.

In each M × M tile the mask X maximizes ``Σ S·X`` with N ones in each row and each column, which is a
minimum-cost flow. It is solved exactly, for many tiles at once:

1. *Prices* of the columns. The relaxed problem with a quadratic term has the solution
   ``X = clamp(½ + (S − u − v) / 2h, 0, 1)`` with prices u of the rows and v of the columns that make its sums
   N. Ten damped Newton steps while h falls approach it. This only makes the rest short.
2. *Rows*: the N largest ``S − v`` of each row. Whatever v is, this mask is the best one of those that have
   its column sums.
3. *Flow*: while a column holds too many ones, one of them moves, along the path of columns that costs least,
   to a column that holds too few. Shortest paths keep a flow the best one for its column sums (Ahuja,
   Magnanti and Orlin, Network Flows, §9.7), so the mask is optimal when all sums are N.

After the prices, 0.2 ones per 4:8 tile of normal scores and 0.8 per 8:16 tile are left to move; without them
4.4 and 12.6. A clamp in place of a sigmoid (an entropy term) leaves a third as many, and costs less.

Scores and prices are integers in units of 2⁻²⁰ of the range of a tile's scores, which float32 adds without
rounding: otherwise paths would run in circles that seem to gain. Nothing else is lost. On 880 tiles of 4:8,
2:8, 1:8, 6:10 and 8:16 (normal scores and Student's t) the sums were those of linear programming. 2:4 has 90
masks: all are tried.

Reading and writing memory is all that this costs: hence sums into buffers that stay, maxima without indices
(with them, torch takes 30 times as long), and positions looked up only where a one moves.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .groups import beaten, chunk

_WIDTHS = [0.585**k for k in range(10)]  # h, in mean deviations of the scores: 1 to 0.008
_UNITS = 2.0**20  # in the range of a tile's scores: a path gains at most M ≤ 16 ranges, and 2²⁴ is exact


def transposable_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool ``[out, in]`` for finite floating-point ``scores`` whose sizes are multiples of ``m``."""
    out_features, in_features = scores.shape
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if not mask.numel():
        return mask
    best = _best_of_all if (n, m) == (2, 4) else _best
    step = m * max(1, 2 * chunk(scores.device) // (m * in_features))
    for first in range(0, out_features, step):
        rows = scores[first : first + step]
        tiles = rows.reshape(-1, m, in_features // m, m)  # [row of tiles, row, tile, column]
        mask[first : first + step] = best(tiles, n).reshape(rows.shape)
    return mask


def _best_of_all(tiles: Tensor, n: int) -> Tensor:
    """The best of the 90 masks 2:4 of each tile; ties to the first, lexicographically."""
    row = [[float(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), n)]
    masks = torch.tensor(list(itertools.product(row, repeat=4)), dtype=tiles.dtype, device=tiles.device)
    masks = masks[(masks.sum(1) == n).all(1)].view(90, 16)
    grid = tiles.transpose(1, 2)
    best = (grid.reshape(-1, 16) @ masks.t()).argmax(1)
    return masks.bool()[best].view(grid.shape).transpose(1, 2)


def _best(tiles: Tensor, n: int) -> Tensor:
    """The best mask N:M of each tile."""
    m = tiles.shape[1]
    if n == m:
        return torch.ones_like(tiles, dtype=torch.bool)
    scores = tiles.permute(3, 1, 0, 2).reshape(m, m, -1)  # [column, row, tile], here and below
    scores = scores - scores.amin(0).amin(0)
    scores.div_(scores.amax(0).amax(0).clamp_(min=torch.finfo(scores.dtype).tiny)).mul_(_UNITS).round_()
    chosen = beaten(scores - _prices(scores, n).round_()) < n
    _balance(scores, chosen, n)
    return chosen.view(m, m, tiles.shape[0], -1).permute(2, 1, 3, 0)


def _prices(scores: Tensor, n: int) -> Tensor:
    """Prices ``[m, 1, tiles]`` of the columns at which the N best of each row are about N of each column."""
    m = len(scores)
    centred = scores - scores.mean(0).mean(0)
    deviation = centred.abs().mean(0).mean(0).clamp_(min=torch.finfo(scores.dtype).tiny)
    centred /= deviation
    v = centred.mean(1, keepdim=True)
    u = centred.mean(0, keepdim=True) - 0.5 * math.log(n / (m - n))
    y, squares = torch.empty_like(scores), torch.empty_like(scores)
    for h in _WIDTHS:
        torch.sub(centred, u, out=y).sub_(v).clamp_(-h, h)  # h (2 X − 1)
        torch.mul(y, y, out=squares)
        rows = _newton_step(y.sum(0, keepdim=True), squares.sum(0, keepdim=True), n, m, h)
        columns = _newton_step(y.sum(1, keepdim=True), squares.sum(1, keepdim=True), n, m, h)
        u += rows
        v += columns.sub_(columns.mean(0, keepdim=True))  # u moves what all columns have in common
    return v * deviation


def _newton_step(y: Tensor, squares: Tensor, n: int, m: int, h: float) -> Tensor:
    """How far prices must rise for the X of a line to sum to N, given its sums of y and y². Damped.

    The slope counts the X between 0 and 1. In place of that count it has 3/2 Σ (1 − (y/h)²), as much where
    they spread evenly, in one pass instead of three.
    """
    slope = squares.sub_(m * h * h).clamp_(max=-4 / 3 * h * h)
    return y.add_(h * (m - 2 * n)).div_(slope).mul_(-2 / 3 * h * h).clamp_(-2.5 * h, 2.5 * h)


def _balance(scores: Tensor, chosen: Tensor, n: int) -> None:
    """Move ones of ``chosen`` along best paths until each column holds ``n``. In place."""
    excess = chosen.sum(1, dtype=torch.int16) - n
    tiles = (excess != 0).any(0).nonzero()[:, 0]
    excess, s, x = excess[:, tiles], scores[:, :, tiles], chosen[:, :, tiles].to(scores.dtype)
    # What a one gains that leaves its place or enters a free one; 1 − 1/x is 0 for x = 1, −∞ for x = 0.
    leave, enter = (1 - 1 / x) - s, (1 - 1 / (1 - x)) + s
    while tiles.numel():
        source, end, row, lane = _best_paths(leave, enter, excess)
        leave[end, row, lane] = -enter[end, row, lane]
        enter[source, row, lane] = -leave[source, row, lane]
        leave[source, row, lane] = enter[end, row, lane] = -torch.inf
        chosen[source, row, tiles[lane]] = False
        chosen[end, row, tiles[lane]] = True
        unbalanced = (excess != 0).any(0)
        if 2 * int(unbalanced.sum()) <= len(unbalanced):  # else balanced tiles stay: they do nothing
            left = unbalanced.nonzero()[:, 0]
            tiles, excess, leave, enter = tiles[left], excess[:, left], leave[:, :, left], enter[:, :, left]


def _best_paths(leave: Tensor, enter: Tensor, excess: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best path of each tile to a column with too few ones, by its moves; ``excess`` follows.

    The moves are four vectors: a one of row ``row`` goes from column ``source`` to ``end`` in tile ``lane``.
    """
    m = len(excess)
    # gains[k][column]: the most that a path of up to k moves to that column gains (Bellman and Ford), and
    # through[k][row] when the last of them is in that row.
    gains = [torch.where(excess > 0, 0.0, -torch.inf).to(leave.dtype)]
    through: list[Tensor] = []
    sums = torch.empty_like(leave)
    for _ in range(m - 1):
        row_gain = torch.add(leave, gains[-1][:, None], out=sums).amax(0)
        gain = torch.add(enter, row_gain, out=sums).amax(1)
        better = gain > gains[-1]
        ready = ~better.any(0)
        if 8 * int(ready.sum()) >= 7 * len(ready):
            break  # the few tiles that have longer paths wait until they are among themselves
        gains.append(torch.where(better, gain, gains[-1]))
        through.append(row_gain)
    else:
        ready = torch.ones_like(ready)
    lane = (ready & (excess != 0).any(0)).nonzero()[:, 0]
    end = torch.where(excess < 0, gains[-1], -torch.inf)[:, lane].argmax(0)
    excess[end, lane] += 1
    moves = []
    for k in range(len(through), 0, -1):  # back along the paths: where the k-th move helped, it is on them
        on = (gains[k][end, lane] > gains[k - 1][end, lane]).nonzero()[:, 0]
        to, at = end[on], lane[on]
        row = (enter[to, :, at] + through[k - 1][:, at].t()).argmax(1)
        source = (leave[:, row, at] + gains[k - 1][:, at]).argmax(0)
        moves.append((source, to, row, at))
        end[on] = source
    excess[end, lane] -= 1
    sources, ends, rows, lanes = (torch.cat(part) for part in zip(*moves, strict=True))
    return sources, ends, rows, lanes
