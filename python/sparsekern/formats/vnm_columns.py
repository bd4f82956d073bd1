"""The 4 of M columns for each V × M tile that keep most when each row then holds the best 2 of the 4.

``f(S) = Σ_rows (sum of the two largest scores in S)`` over all sets S of 4 columns.

* ``M ≤ 8``: all sets are tried, 70 of them for M = 8.
* Larger M: greedy, then swaps. Four times the column that adds most is added; f is monotone and submodular,
  so that keeps at least ``1 − 1/e`` of the optimum (Nemhauser, Wolsey and Fisher, 1978). Then the best swap
  of a selected column for another is made as long as it gains. What that keeps of the best of all sets, as
  mean and minimum over 512 tiles of scores ``|x|``, x normal or of Student's t with 2 degrees of freedom:

  ======  ==============  ==============  ===============  ==========  ===============  ==========
  V:M     greedy, normal  greedy, t       swaps, normal    best found  swaps, t         best found
  ======  ==============  ==============  ===============  ==========  ===============  ==========
  128:16  0.9987, 0.972   0.9999, 0.992   0.99987, 0.991   94 %        1.00000, 0.999   100 %
  64:12   0.9985, 0.976   0.9999, 0.991   0.99990, 0.993   97 %        1.00000, 1.000   100 %
  16:16   0.9973, 0.964   0.9996, 0.977   0.99976, 0.983   95 %        0.99998, 0.989   100 %
  4:16    0.9952, 0.912   0.9987, 0.950   0.99967, 0.969   97 %        0.99996, 0.985   100 %
  ======  ==============  ==============  ===============  ==========  ===============  ==========

  With M = 8, where it is not needed, it would find the best of 99 % of 64:2:8 tiles and of all 32:2:5 ones.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from . import triton_masks
from .groups import chunk

_TOLERANCE = 1e-5  # a swap must gain more, relative to f: 10 times what rounding can move a sum


def best_columns(scores: Tensor, v: int, m: int) -> Tensor:
    """Bool ``[row tiles, groups · m]`` for finite floating-point ``scores [out, in]``: 4 in each group.

    In a last group that is cut short these may be columns past the edge, if it has fewer than 4.
    """
    if m <= 8 and (kernels := triton_masks.kernels_for(scores)) is not None:
        found: Tensor = kernels.best_columns(scores.contiguous(), v, m)
        return found
    out_features, in_features = scores.shape
    height = max(1, min(v, out_features))
    row_tiles, groups = -(-out_features // v), -(-in_features // m)
    selected = torch.empty((row_tiles, groups, m), dtype=torch.bool, device=scores.device)
    if not selected.numel():
        return selected.view(row_tiles, groups * m)
    # Padded with the smallest score: a padding row adds the same to all sets, a padding column never more
    # than another one.
    padding = (0, groups * m - in_features, 0, row_tiles * height - out_features)
    padded = F.pad(scores, padding, value=float(scores.min())).view(row_tiles, height, groups, m)
    step = max(1, chunk(scores.device) // (height * groups * m))
    search = _search if m <= 8 else _greedy_and_swaps
    for first in range(0, row_tiles, step):
        tiles = padded[first : first + step].permute(3, 1, 0, 2).reshape(m, height, -1)
        chosen = search(tiles - tiles.amin(0))  # changes f by a constant; now no sums cancel
        selected[first : first + step] = chosen.view(m, -1, groups).permute(1, 2, 0)
    return selected.view(row_tiles, groups * m)


def _search(scores: Tensor) -> Tensor:
    """The best of all sets for ``scores [m, v, tiles]``, ties to the first: bool ``[m, tiles]``."""
    m, _, tiles = scores.shape
    pairs = {
        (i, j): (torch.maximum(scores[i], scores[j]), scores[i] + scores[j])
        for i, j in itertools.combinations(range(m), 2)
    }
    sets = list(itertools.combinations(range(m), 4))
    best = torch.full((tiles,), -1.0, dtype=scores.dtype, device=scores.device)
    at = torch.zeros(tiles, dtype=torch.int64, device=scores.device)
    for k, (a, b, c, d) in enumerate(sets):
        (high, both), (other_high, other_both) = pairs[a, b], pairs[c, d]
        # The two largest of four are in one pair, or one is in each.
        kept = torch.maximum(torch.maximum(both, other_both), high + other_high).sum(0)
        better = kept > best
        best = torch.where(better, kept, best)
        at.masked_fill_(better, k)
    members = torch.tensor([[column in four for four in sets] for column in range(m)], device=scores.device)
    return members[:, at]


def _greedy_and_swaps(scores: Tensor) -> Tensor:
    """A set that no swap improves, for ``scores [m, v, tiles]``, not negative: bool ``[m, tiles]``."""
    members = _greedy(scores)
    tiles = torch.arange(scores.shape[2], device=scores.device)
    while tiles.numel():
        gain, slot, column = _best_swap(scores[..., tiles], members[:, tiles])
        better = gain > _TOLERANCE
        tiles = tiles[better]
        members[slot[better], tiles] = column[better]
    return _as_mask(scores, members)


def _greedy(scores: Tensor) -> Tensor:
    """Int64 ``[4, tiles]``: four times the column that adds most to f, ties to the lower."""
    first = second = torch.zeros_like(scores[0])  # the two largest of each row in the set
    members: list[Tensor] = []
    for _ in range(4):
        value = _added(scores, second)
        for member in members:
            value.scatter_(0, member[None], -1.0)
        members.append(value.argmax(0))
        column = _take(scores, members[-1])
        first, second = torch.maximum(first, column), _second(first, second, column)
    return torch.stack(members)


def _best_swap(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[tiles]`` each: the gain of the best swap relative to f, which member goes, which column comes."""
    four = [_take(scores, member) for member in members]
    taken = _as_mask(scores, members)
    sums, columns = [], []
    for slot, member in enumerate(members):
        a, b, c = (four[i] for i in range(4) if i != slot)
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        first, second = torch.maximum(high, c), _second(high, low, c)
        value = _added(scores, second).add_((first + second).sum(0))
        kept = value.gather(0, member[None])[0]  # f, the same for each slot
        best, column = value.masked_fill_(taken, -1.0).max(0)
        sums.append(best)
        columns.append(column)
    best, slot_of_best = torch.stack(sums).max(0)
    column = torch.stack(columns).gather(0, slot_of_best[None])[0]
    return (best - kept) / kept.clamp(min=torch.finfo(kept.dtype).tiny), slot_of_best, column


def _added(scores: Tensor, second: Tensor) -> Tensor:
    """``[m, tiles]``: how much f grows with each column, given the second largest in the set of each row."""
    return (scores - second).clamp_(min=0.0).sum(1)


def _second(first: Tensor, second: Tensor, added: Tensor) -> Tensor:
    """The second largest after ``added`` has joined."""
    return torch.maximum(second, torch.minimum(first, added))


def _take(scores: Tensor, column: Tensor) -> Tensor:
    """``[v, tiles]``: one column of each tile."""
    return scores.gather(0, column.expand(1, *scores.shape[1:]))[0]


def _as_mask(scores: Tensor, members: Tensor) -> Tensor:
    """Bool ``[m, tiles]``."""
    return torch.zeros_like(scores[:, 0], dtype=torch.bool).scatter_(0, members, True)
