"""What sparse tensor cores are told of a pattern: as CUTLASS orders it, and nothing that is undefined."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from cases import random_pattern
from sparsekern import NM, VNM, Pattern
from sparsekern.formats.metadata import Metadata
from torch import Tensor

REFERENCE = Path(__file__).parent / "reference"


def test_it_is_ordered_as_cutlass_orders_it() -> None:
    """Each word is what CUTLASS has the same lane load, for the same positions.

    It pairs two blocks of 16 rows in a register where this library pairs two of 32 columns.
    """
    reference = json.loads((REFERENCE / "sparse_metadata.json").read_text())
    rows = [int(row, 16) for row in reference["metadata"]]
    index = torch.tensor([[row >> 2 * i & 3 for i in range(32)] for row in rows], dtype=torch.uint8)
    words = [word & 0xFFFFFFFF for word in NM((32, 64), index, 2, 4).metadata().words.tolist()]
    assert len(words) == 4 * 64
    for block, g, half, t in itertools.product(range(2), range(8), range(2), range(2)):
        theirs = int(reference["words"][half][4 * g + 2 * block + t], 16)
        assert words[64 * block + 32 * t + 4 * g + half] == theirs


def test_it_lies_in_memory_as_cutlass_wants_it_on_hopper() -> None:
    reference = json.loads((REFERENCE / "sparse_metadata_sm90.json").read_text())
    rows, columns = torch.tensor(reference["rows"]), torch.tensor(reference["columns"])
    pattern = random_pattern("2:4", (len(rows), 8 * len(columns)), 1.0)
    assert isinstance(pattern, NM)
    in_bytes = pattern.metadata().words.view(torch.uint8)
    assert len(in_bytes) == len(rows) * len(columns)
    # 8 columns hold 4 values, whose positions take 2 bits each, the first one lowest.
    positions = pattern.index.view(len(rows), len(columns), 4).int()
    expected = (positions << torch.arange(0, 8, 2)).sum(2)
    assert torch.equal(in_bytes[rows[:, None] + columns].int(), expected.int())


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (16, 64), (21, 37), (33, 130), (0, 8), (8, 0)], ids=str)
@pytest.mark.parametrize("spec", ["2:4", "1:4", "1:2", "2:8", "1:12", "2:16", "64:2:8", "4:2:5", "20:2:16"])
def test_positions_are_the_columns_of_values(spec: str, shape: tuple[int, int]) -> None:
    """Read back from the words, for each row and 4 columns; in V:N:M selected columns, counted through."""
    pattern = random_pattern(spec, shape, 1.0)
    assert isinstance(pattern, NM | VNM)
    tile_rows, width, columns = shape[0], pattern.options["m"], shape[1]
    if isinstance(pattern, VNM):
        tile_rows, width, columns = min(pattern.v, shape[0]), 4, 4 * pattern.columns.shape[1]
    groups = torch.arange(pattern.index.shape[1]) // pattern.n
    mask = torch.zeros(shape[0], columns, dtype=torch.bool).scatter_(1, groups * width + pattern.index, True)
    words = pattern.metadata().words
    if 0 in shape:
        assert not len(words)
        return
    row_blocks, column_blocks = -(-tile_rows // 16), -(-columns // 128)
    if isinstance(pattern, NM):
        row_blocks = -(-row_blocks // 4) * 4
    assert len(words) == -(-shape[0] // tile_rows) * row_blocks * column_blocks * 64
    words = words.view(-1, column_blocks, row_blocks, 2, 8, 4)
    for row, quad in itertools.product(range(shape[0]), range(-(-columns // 4))):
        tile, in_tile = divmod(row, tile_rows)
        word = int(words[tile, quad // 32, in_tile // 16, quad // 4 % 2, in_tile % 8, quad % 32 // 8])
        nibble = word >> (in_tile % 16 // 8 * 16 + quad % 4 * 4) & 15
        at = mask[row, 4 * quad : 4 * quad + 4].nonzero()[:, 0].tolist()
        assert set(at) <= {nibble & 3, nibble >> 2}
        if len(at) == 1:
            assert at[0] == (nibble >> 2 if at[0] == 3 else nibble & 3), (
                "a lone value is in the first slot but in column 3"
            )
    for shift in range(0, 32, 4):
        assert bool(((words >> shift & 3) < (words >> shift + 2 & 3)).all())


@pytest.mark.parametrize("shape", [(4, 4), (16, 64), (20, 132), (136, 8), (0, 8)], ids=str)
def test_of_the_transpose(shape: tuple[int, int]) -> None:
    """Where it is 2:4 too: its own words. One column that holds 3 of 4 rows, and there are none."""
    mask = NM.prune_transposable(torch.rand(shape), 2, 4)
    built = NM.from_mask(mask, 2, 4).metadata()
    other_way = NM.from_mask(mask.t().contiguous(), 2, 4).metadata()
    assert built.transposed is not None
    assert torch.equal(built.transposed, other_way.words)
    if 0 not in shape:
        assert len(built.transposed)
        i = int(torch.randint(shape[0], ()))
        mask[i, :4] = ~mask[i, :4]
        assert not len(built_without(NM.from_mask(mask, 2, 4)))
    for uneven in ((shape[0] + 2, 8), (8, shape[1] + 2)):
        assert not len(built_without(random_pattern("2:4", uneven, 1.0)))


def built_without(pattern: Pattern) -> Tensor:
    assert isinstance(pattern, NM)
    transposed = pattern.metadata().transposed
    assert transposed is not None
    return transposed


@pytest.mark.parametrize("spec", ["3:4", "4:8", "5:11", "1:3", "1:1"])
def test_others_have_none(spec: str) -> None:
    pattern = random_pattern(spec, (16, 64), 1.0)
    assert isinstance(pattern, NM)
    assert not len(pattern.metadata().words)
    assert not Metadata.fits(pattern.n, pattern.m)
