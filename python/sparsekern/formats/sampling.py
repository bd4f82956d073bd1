"""Random positions of every format, drawn without a tensor of the dense weight's size."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(size: int, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` distinct numbers in ``[0, size)``, ascending int64: each such set is as likely.

    O(count) memory: 0.1 % of 20000 x 20000 positions take 20 MB and 0.4 s. Ranking as many random scores
    took 8 GB and 28 s.
    """
    if size <= 16 * count:  # a byte for each number takes no more than what sorting takes below
        return _choose(size, count, generator)
    # Of n numbers, about n² / (2 · size) were drawn before. Twice that, and some more, nearly always suffice.
    draws = count + count * count // size + 100
    while True:
        found: Tensor = _draw(size, draws, generator).sort().values.unique_consecutive()
        if found.numel() >= count:
            return found[_choose(found.numel(), count, generator)]


def sample_groups(rows: int, columns: int, n: int, m: int, generator: torch.Generator | None) -> Tensor:
    """``n`` positions of each group of ``m ≤ 256`` columns, ascending within a group; all sets as likely.

    uint8 ``[rows, columns // m · n + min(n, c)]``, as the last group has the ``c = columns % m`` that are
    left.
    """
    groups, rest = divmod(columns, m)
    whole = _subsets(rows, groups, n, m, generator)
    return torch.cat([whole, _subsets(rows, 1, min(n, rest), rest, generator)], 1)


def _choose(size: int, count: int, generator: torch.Generator | None) -> Tensor:
    """:func:`sample` in O(size) memory."""
    inverted = 2 * count > size  # then those that are left out are drawn
    drawn = torch.zeros(size, dtype=torch.bool, device="cpu")
    while missing := min(count, size - count) - int(drawn.count_nonzero()):
        drawn[_draw(size, missing, generator)] = True
    return (drawn != inverted).nonzero().squeeze(1)


def _draw(size: int, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` numbers in ``[0, size)``, of 63 bits each: of 32, as torch.randint takes them for sizes up to
    2²⁸, the first numbers are up to 6 % likelier than the last."""
    return torch.empty(count, dtype=torch.int64, device="cpu").random_(generator=generator).remainder_(size)


def _subsets(rows: int, groups: int, n: int, m: int, generator: torch.Generator | None) -> Tensor:
    """uint8 ``[rows, groups · n]``: ``n`` of ``m`` each (Floyd; Bentley, "A Sample of Brilliance", 1987)."""
    chosen: list[Tensor] = []
    for last in range(m - n, m):
        drawn = torch.randint(last + 1, (rows, groups), generator=generator, dtype=torch.uint8, device="cpu")
        taken = torch.zeros_like(drawn, dtype=torch.bool)
        for position in chosen:
            taken |= position == drawn
        drawn.masked_fill_(taken, last)
        for i, position in enumerate(chosen):  # insert it
            chosen[i], drawn = torch.minimum(position, drawn), torch.maximum(position, drawn)
        chosen.append(drawn)
    if not chosen:
        return torch.empty((rows, 0), dtype=torch.uint8, device="cpu")
    return torch.stack(chosen, 2).flatten(1)
