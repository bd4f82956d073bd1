"""Masks of the largest scores: of all, of each group of M columns, and V:N:M's columns.

What :mod:`sparsekern.formats` computes with torch's ops, each of them a launch that passes over all scores.
Here one to six passes do, and nothing waits for the GPU. Expected for 4096 × 4096 scores in float32 at 4
TB/s, not yet measured: :func:`top_mask` some 250 µs, as its histograms take half a cycle for a score,
:func:`top_of_groups` 20, :func:`best_columns` of 64:2:8 200. No compiler traces this.
"""

from __future__ import annotations

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device

BLOCK = tl.constexpr(2048)
_PROGRAMS = (
    1024  # of a histogram: each counts many blocks in registers, and adds 256 numbers up in memory once
)


@on_device
def top_mask(scores: Tensor, count: int) -> Tensor:
    """Bool tensor that marks the ``count`` largest of ``scores``, ties to the lower flat index.

    The key of the last one to be marked is found from its highest byte down: a histogram over those that
    agree with what is known of it, from which the next byte follows. 4 passes for float32, 2 for 16 bits;
    one more counts its ties, the last writes the mask.

    Args:
        scores: float32, bfloat16 or float16 without NaN, contiguous.
        count: from 1 to ``scores.numel()``.
    """
    flat = scores.view(-1)
    size, digits = flat.numel(), flat.dtype.itemsize
    blocks = triton.cdiv(size, BLOCK.value)
    # What is known of the key, and how many to mark have no larger one; as far as each pass found out.
    key, left = flat.new_zeros(digits + 1, dtype=torch.int64), flat.new_zeros(digits + 1, dtype=torch.int64)
    left[0] = count
    bins = flat.new_zeros((digits, 256), dtype=torch.int32)
    for i in range(digits):
        _count_digits[(min(blocks, _PROGRAMS),)](flat, key[i:], bins[i], size, SHIFT=8 * (digits - 1 - i))
        _next_digit[(1,)](bins[i], key[i:], left[i:])
    ties = flat.new_empty(blocks, dtype=torch.int32)
    _count_ties[(blocks,)](flat, key[digits:], ties, size)
    before = ties.cumsum(0) - ties
    mask = torch.empty_like(scores, dtype=torch.bool)
    _mark[(blocks,)](flat, key[digits:], left[digits:], before, mask.view(torch.int8), size)
    return mask


@triton.jit
def _ordered(score):
    """An int32 for each score, in the same order; that of -0 is that of 0.

    By bits: nothing is rounded, and no number below the normal ones taken for 0.
    """
    if score.dtype == tl.float32:
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(bits == -0x80000000, 0, bits)
        bits ^= (bits >> 31) & 0x7FFFFFFF
    else:
        bits = score.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(bits == -0x8000, 0, bits)
        bits ^= (bits >> 31) & 0x7FFF
    return bits


@triton.jit
def _keys(scores, at, inside):
    """Those of scores in memory, from 0 on, as int64."""
    HALF: tl.constexpr = 1 << (scores.dtype.element_ty.primitive_bitwidth - 1)
    return _ordered(tl.load(scores + at, mask=inside, other=0.0)).to(tl.int64) + HALF


@triton.jit
def _count_digits(scores, key, bins, size, SHIFT: tl.constexpr):
    """``bins[d]`` += the scores whose digit at SHIFT is d, of those that begin as ``key`` does."""
    begin = tl.load(key)
    counts = tl.zeros((256,), tl.int32)
    for turn in range(0, tl.cdiv(tl.cdiv(size, BLOCK), tl.num_programs(0))):
        block = turn * tl.num_programs(0) + tl.program_id(0)
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keys = _keys(scores, at, at < size)
        agrees = (at < size) & (keys >> (SHIFT + 8) == begin)
        counts += tl.histogram(((keys >> SHIFT) & 255).to(tl.int32), 256, mask=agrees)
    tl.atomic_add(bins + tl.arange(0, 256), counts, mask=counts > 0, sem="relaxed")  # integers: in any order


@triton.jit
def _next_digit(bins, key, left):
    """Of the key, and how many to mark have this digit too and no larger one."""
    digit = tl.arange(0, 256)
    counts = tl.load(bins + digit).to(tl.int64)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # with a larger digit
    wanted = tl.load(left)
    here = tl.max(tl.where(above + counts >= wanted, digit, 0), 0)
    tl.store(key + 1, tl.load(key) * 256 + here)
    tl.store(left + 1, wanted - tl.sum(tl.where(digit == here, above, 0), 0))


@triton.jit
def _count_ties(scores, key, ties, size):
    """How many scores of each block have the key."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tie = (at < size) & (_keys(scores, at, at < size) == tl.load(key))
    tl.store(ties + tl.program_id(0), tl.sum(tie.to(tl.int32), 0))


@triton.jit
def _mark(scores, key, left, before, mask, size):
    """Those with a larger key, and of its ties the first ones."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keys = _keys(scores, at, at < size)
    tie = keys == tl.load(key)
    rank = tl.load(before + tl.program_id(0)) + tl.cumsum(tie.to(tl.int32), 0)
    tl.store(mask + at, ((keys > tl.load(key)) | (tie & (rank <= tl.load(left)))).to(tl.int8), mask=at < size)


@on_device
def top_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool ``[out, in]``: the ``n`` largest of each ``m`` columns of each row, ties to the lower column.

    One pass. A score is compared with all of its group: ``m²`` comparisons in registers.

    Args:
        scores: ``[out, in]`` without NaN, contiguous; float32, bfloat16 or float16.
        n, m: ``1 ≤ n ≤ m ≤ 16``.
    """
    mask = torch.empty_like(scores, dtype=torch.bool)
    out_features, in_features = scores.shape
    side = triton.next_power_of_2(m)
    groups = out_features * triton.cdiv(in_features, m)
    step = 4096 // side**2  # 32 comparisons for each of 128 threads
    if scores.numel():
        _top_of_groups[(triton.cdiv(groups, step),)](
            scores, mask.view(torch.int8), groups, in_features, n, M=m, SIDE=side, STEP=step
        )
    return mask


@triton.jit
def _top_of_groups(
    scores, mask, groups, in_features, n, M: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr
):
    per_row = tl.cdiv(in_features, M)
    group = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    i = tl.arange(0, SIDE)
    column = (group % per_row)[:, None] * M + i[None, :]
    inside = (group < groups)[:, None] & (i < M)[None, :] & (column < in_features)
    at = (group // per_row)[:, None] * in_features + column
    score = _ordered(tl.load(scores + at, mask=inside, other=float("-inf")))
    mine, other = score[:, :, None], score[:, None, :]
    wins = (other > mine) | ((other == mine) & (i[None, :] < i[:, None])[None, :, :])
    tl.store(mask + at, (tl.sum(wins.to(tl.int32), 2) < n).to(tl.int8), mask=inside)


@on_device
def best_columns(scores: Tensor, v: int, m: int) -> Tensor:
    """Bool ``[row tiles, groups · m]``: the 4 columns of each v × m tile that keep most with 2 for each row.

    All sets of 4 are tried, ties to the first one. In a last group that is cut short these may be columns
    past the edge, if it has fewer than 4.

    Args:
        scores: ``[out, in]``, finite, contiguous, not empty; float32, bfloat16 or float16.
        v: rows of a tile.
        m: columns of a tile, from 4 to 8.
    """
    out_features, in_features = scores.shape
    v = min(v, out_features)
    row_tiles, groups = triton.cdiv(out_features, v), triton.cdiv(in_features, m)
    selected = scores.new_empty((row_tiles, groups * m), dtype=torch.bool)
    sets = _sets(m, scores.device)
    _best_columns[(row_tiles * groups,)](
        *(scores, scores.min(), sets, selected.view(torch.int8), out_features, in_features, v),
        M=m,
        SIDE=triton.next_power_of_2(m),
        SETS=sets.shape[1],
        ROWS=max(1, 2048 // sets.shape[1]),
    )
    return selected


@functools.cache
def _sets(m: int, device: torch.device) -> Tensor:
    """int32 ``[4, sets]``: all of 4 of ``m`` columns; up to a power of 2 the last one again."""
    sets = list(itertools.combinations(range(m), 4))
    sets += [sets[-1]] * (triton.next_power_of_2(len(sets)) - len(sets))
    return torch.tensor(sets, dtype=torch.int32).t().contiguous().to(device)


@triton.jit
def _best_columns(
    scores,
    least,  # of all scores: what columns past the edge count as
    sets,
    selected,
    out_features,
    in_features,
    v,
    M: tl.constexpr,
    SIDE: tl.constexpr,
    SETS: tl.constexpr,
    ROWS: tl.constexpr,
):
    groups = tl.cdiv(in_features, M)
    tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    number = tl.arange(0, SETS)
    i = tl.arange(0, SIDE)
    low = tl.load(least).to(tl.float32)
    first = group * M
    kept = tl.zeros((SETS,), tl.float32)
    for begin in range(0, v, ROWS):
        row = tile * v + begin + tl.arange(0, ROWS)
        inside = (begin + tl.arange(0, ROWS) < v) & (row < out_features)
        line = scores + row.to(tl.int64)[:, None] * in_features + first
        all_there = inside[:, None] & ((i < M) & (first + i < in_features))[None, :]
        own = tl.load(line + i[None, :], mask=all_there, other=float("inf")).to(tl.float32)
        # Of what is above the row's least score: the sums of sets differ as they would, with no digits lost.
        floor = tl.min(own, 1)
        if first + M > in_features:
            floor = tl.minimum(floor, low)
        a = _above(line, floor, sets, number, first, in_features, inside, low)
        b = _above(line, floor, sets + SETS, number, first, in_features, inside, low)
        c = _above(line, floor, sets + 2 * SETS, number, first, in_features, inside, low)
        d = _above(line, floor, sets + 3 * SETS, number, first, in_features, inside, low)
        # The two largest of four are in one pair, or one is in each.
        best = tl.maximum(tl.maximum(a + b, c + d), tl.maximum(a, b) + tl.maximum(c, d))
        kept += tl.sum(tl.where(inside[:, None], best, 0.0), 0)
    at = tl.argmax(kept, 0)
    chosen = tl.zeros((SIDE,), tl.int32)
    for j in tl.static_range(4):
        chosen |= (i == tl.load(sets + j * SETS + at)).to(tl.int32)
    tl.store(selected + tile.to(tl.int64) * groups * M + first + i, chosen.to(tl.int8), mask=i < M)


@triton.jit
def _above(line, floor, members, number, first, in_features, inside, low):
    """How far one member of each set is above the floor of each row."""
    column = tl.load(members + number)
    there = inside[:, None] & (first + column < in_features)[None, :]
    return tl.load(line + column[None, :], mask=there, other=low).to(tl.float32) - floor[:, None]
