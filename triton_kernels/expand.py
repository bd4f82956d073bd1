"""Tiles of N:M and V:N:M weights, expanded in registers: what their products share.

Triton cannot issue sparse multiplies. So a tile of W is expanded, zeros too, goes through shared memory once
and is multiplied as a dense one. V:N:M is N:4 on the 4 columns of each group that a tile of V rows selects,
so there a group has ``WIDTH`` = 4 places; for N:M these are M, rounded up to a power of two.

A thread loads the values and positions of whole groups, in runs of memory, and makes one place of a group
after another: ``where(position == place, value, ...)``, once per value. A step of 2:4 takes 14 instructions
per number of W on Hopper, 6 of them these, 8:16 takes 22. Where each lane made one place of all its groups,
as a comparison with an ``arange`` gives it, shared memory had to give 4 times as many numbers, 2 bytes at a
time: twice the instructions. To load for each place the value of its rank in the group would take a load and
some 5 instructions whatever N is, and wait for the positions first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _parts(run, COUNT: tl.constexpr):
    """``[rows, groups · COUNT]`` as COUNT tensors ``[rows, groups]``, in an order of their own."""
    ROWS: tl.constexpr = run.shape[0]
    if COUNT == 1:
        return (run,)
    else:
        even, odd = tl.split(tl.reshape(run, (ROWS, run.shape[1] // 2, 2)))
        return _parts(even, COUNT // 2) + _parts(odd, COUNT // 2)


@triton.jit
def _place(values, positions, PLACE: tl.constexpr):
    """What stands at one place of each group. Values past a row's end are at 0 too: there the first wins."""
    found = tl.zeros_like(values[0])
    for i in tl.static_range(len(values) - 1, -1, -1):
        found = tl.where(positions[i] == PLACE, values[i], found)
    return found


@triton.jit
def _places(values, positions, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """COUNT places of each group, FIRST and each (WIDTH / COUNT)-th from there, in order.

    ``[rows, groups, 2, 2, ...]``
    """
    if COUNT == 1:
        return _place(values, positions, FIRST)
    else:
        return tl.join(
            _places(values, positions, FIRST, COUNT // 2, WIDTH),
            _places(values, positions, FIRST + WIDTH // COUNT, COUNT // 2, WIDTH),
        )


@triton.jit
def _joined(values, positions, WIDTH: tl.constexpr, COUNT: tl.constexpr, TYPE: tl.constexpr):
    """All WIDTH places of each group, ``[rows, COUNT]`` numbers."""
    weights = _places(values, positions, 0, WIDTH, WIDTH)
    return tl.reshape(weights, (values[0].shape[0], COUNT)).to(TYPE, bitcast=True)


@triton.jit
def _bits(run):
    """``run`` as integers until its places are joined.

    Triton would do the reshaping that joins them in shared memory, whose layout cannot always be reshaped: an
    error that ends the process (3.7).
    """
    if run.dtype.primitive_bitwidth == 16:
        bits = run.to(tl.int16, bitcast=True)
    else:
        bits = run.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _positions(packed, row_bytes, row, inside, k0, COUNT: tl.constexpr, BITS: tl.constexpr):
    """COUNT positions of each row from the ``k0``-th on, which is in a byte of its own: ``[rows, COUNT]``."""
    ROWS: tl.constexpr = row.shape[0]
    at = k0 * BITS // 8 + tl.arange(0, COUNT * BITS // 8)[None, :]
    byte = tl.load(packed + row * row_bytes + at, inside & (at < row_bytes), 0).to(tl.int32)
    if BITS == 4:
        each = tl.join(byte & 15, byte >> 4)
    else:
        each = tl.join(tl.join(byte & 3, byte >> 4 & 3), tl.join(byte >> 2 & 3, byte >> 6))
    return tl.reshape(each, (ROWS, COUNT))


@triton.jit
def expanded(
    values,  # [rows, row_values]
    index,  # [rows, row_values]: their positions
    packed,  # [rows, row_bytes]: the same in BITS each
    row,  # [ROWS]
    inside,  # [ROWS]: whether there is such a row
    group0,  # the first of GROUPS groups, a multiple of it
    row_values,
    row_bytes,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):
    """``[ROWS, GROUPS · WIDTH]`` weights."""
    row, inside = row.to(tl.int64)[:, None], inside[:, None]
    if N & (N - 1) == 0:
        k = group0 * N + tl.arange(0, GROUPS * N)[None, :]
        there = inside & (k < row_values)
        run = _bits(tl.load(values + row * row_values + k, there, 0.0))
        if GROUPS * N * BITS % 8 == 0:
            places = _positions(packed, row_bytes, row, inside, group0 * N, GROUPS * N, BITS)
        else:
            places = tl.load(index + row * row_values + k, there, 0)
        found, places = _parts(run, N), _parts(places, N)
    else:  # Triton neither splits these nor unpacks tuples
        found = ()
        places = ()
        for i in tl.static_range(N):
            k = (group0 + tl.arange(0, GROUPS)[None, :]) * N + i
            there = inside & (k < row_values)
            at = row * row_values + k
            found = found + (_bits(tl.load(values + at, there, 0.0)),)  # noqa: RUF005
            places = places + (tl.load(index + at, there, 0),)  # noqa: RUF005
    return _joined(found, places, WIDTH, GROUPS * WIDTH, values.dtype.element_ty)


@triton.jit
def expanded_wide(
    values,
    index,
    chosen,  # [row tiles, groups, 4]
    row,
    inside,
    part0,  # the first of PARTS parts of groups
    row_values,
    groups,
    tile_rows,
    PARTS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    EACH: tl.constexpr,
):
    """The same of V:N:M on all columns, ``[ROWS, PARTS · WIDTH]``; groups have EACH parts of WIDTH places.

    ``chosen`` has the places of the selected ones. Values in another part of their group are nowhere in
    this one.
    """
    row, inside = row.to(tl.int64)[:, None], inside[:, None]
    of_part = tl.arange(0, PARTS * N)[None, :]
    part = part0 + of_part // N
    k = part // EACH * N + of_part % N
    there = inside & (k < row_values)
    run = _bits(tl.load(values + row * row_values + k, there, 0.0))
    which = tl.load(index + row * row_values + k, there, 0)
    places = tl.load(chosen + (row // tile_rows * groups + part // EACH) * 4 + which, there, 0).to(tl.int32)
    if EACH > 1:
        places -= part % EACH * WIDTH
    return _joined(_parts(run, N), _parts(places, N), WIDTH, PARTS * WIDTH, values.dtype.element_ty)
