"""Block sparsity: compressed rows of dense blocks (BSR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_compressed, check_scores, check_shape, kept_count
from .csr import compress, counts_to_ptr, row_index, transpose
from .pattern import Pattern, check_mask, top_mask
from .sampling import sample

SIDES = (4, 8, 16, 32, 64, 128)


class BSR(Pattern):
    """A pattern of dense blocks on a regular grid.

    Args:
        shape: ``(out_features, in_features)``. Where the block does not divide it, the blocks of the last
            block row and column reach past the edge: the values there are padding, 0 and with gradient 0.
        block_row_ptr: int32 ``[ceil(out / bh) + 1]``; block row i owns the blocks
            ``block_row_ptr[i] : block_row_ptr[i + 1]``.
        block_col_idx: int32 ``[blocks]``; block columns, strictly ascending within a block row.
        block: ``(bh, bw)``, a block's height and width, each one of 4, 8, 16, 32, 64, 128.

    Raises:
        ValueError: wrong dtype, shape or contents; the message names the tensor, the rule and what was found.

    The values are ``[blocks, bh, bw]``. Derived when built, for ``backward_input``, is W transposed:
    int32 ``t_block_ptr [ceil(in / bw) + 1]``, ``t_block_row [blocks]`` (block rows, ascending within a block
    column) and ``t_block [blocks]`` (which block each of those is). For kernels that take the longest first,
    int32 ``row_order [ceil(out / bh)]`` and ``t_row_order [ceil(in / bw)]`` list the block rows, and those of
    W transposed, by falling number of blocks.
    """

    format = "bsr"
    state_names = ("block_row_ptr", "block_col_idx")

    def __init__(
        self,
        shape: tuple[int, int],
        block_row_ptr: Tensor,
        block_col_idx: Tensor,
        block: tuple[int, int],
    ) -> None:
        self.shape = check_shape(shape)
        self.block = check_block(block)
        rows, columns = block_grid(self.shape, self.block)
        check_compressed(
            "block_row_ptr", block_row_ptr, "block_col_idx", block_col_idx, rows, columns, "blocks"
        )
        self.block_row_ptr = block_row_ptr
        self.block_col_idx = block_col_idx
        self.t_block_ptr, self.t_block_row, self.t_block = transpose(block_row_ptr, block_col_idx, columns)
        self.row_order, self.t_row_order = _longest_first(block_row_ptr), _longest_first(self.t_block_ptr)
        self._nnz = block_col_idx.numel() * self.block[0] * self.block[1]
        if block_col_idx.device.type != "meta":  # there, nobody knows where the blocks are
            heights, widths = _inside(self.shape, self.block, block_col_idx.device)
            block_row = row_index(block_row_ptr, block_col_idx.numel())
            self._nnz = int((heights[block_row] * widths[block_col_idx]).sum())

    @classmethod
    def from_mask(cls, mask: Tensor, block: tuple[int, int]) -> BSR:
        """The pattern of a bool mask ``[out, in]`` that is constant within each block.

        Raises:
            ValueError: a block that is neither empty nor full; the message names it and its count.
        """
        check_mask(mask)
        shape, (height, width) = check_shape((mask.shape[0], mask.shape[1])), check_block(block)
        rows, columns = block_grid(shape, (height, width))
        grid = F.pad(mask, (0, columns * width - shape[1], 0, rows * height - shape[0])).contiguous()
        count = (
            grid.view(torch.uint8)
            .view(-1, width)
            .sum(1, dtype=torch.uint8)
            .view(rows, height, columns)
            .sum(1)
        )
        heights, widths = _inside(shape, (height, width), mask.device)
        full = heights[:, None] * widths
        mixed = ((count != 0) & (count != full)).nonzero()
        if mixed.numel():
            at = tuple(mixed[0].tolist())
            raise ValueError(
                f"mask must be constant within each {height} x {width} block, but block {at} holds "
                f"{int(count[at])} of {int(full[at])}"
            )
        kept = count != 0
        return cls(shape, counts_to_ptr(kept.sum(1)), kept.nonzero()[:, 1].to(torch.int32), block)

    @classmethod
    def from_state(cls, shape: tuple[int, int], state: dict[str, Tensor], block: tuple[int, int]) -> BSR:
        """The pattern of ``block_row_ptr`` and ``block_col_idx``, checked completely.

        Raises as the class does.
        """
        return cls(shape, state["block_row_ptr"], state["block_col_idx"], block)

    @classmethod
    def prune(cls, scores: Tensor, sparsity: float | None, block: tuple[int, int]) -> Tensor:
        """Bool mask of the ``round(blocks · (1 − sparsity))`` blocks with the largest sums of ``scores``.

        Ties go to the lower block. Sums are over what is inside W, so a block that the edge cuts counts as
        one block but scores less.

        Raises:
            ValueError: scores that are no matrix or not finite; a sparsity outside [0, 1); a bad block.
        """
        height, width = check_block(block)
        scores = check_scores(scores, finite=True)
        shape = (scores.shape[0], scores.shape[1])
        rows, columns = block_grid(shape, (height, width))
        count = kept_count(rows * columns, sparsity)
        grid = F.pad(scores, (0, columns * width - shape[1], 0, rows * height - shape[0]))
        blocks = grid.reshape(rows, height, columns, width)
        sums = blocks.sum((1, 3))
        if not bool(sums.isfinite().all()):  # they overflowed
            sums = blocks.sum((1, 3), dtype=torch.float64)
        kept = top_mask(sums, count)
        mask = kept[:, None, :, None].expand(rows, height, columns, width)
        return mask.reshape(rows * height, columns * width)[: shape[0], : shape[1]].contiguous()

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        sparsity: float | None,
        generator: torch.Generator | None,
        block: tuple[int, int],
    ) -> BSR:
        """``round(blocks · (1 − sparsity))`` random blocks; those that the edge cuts are as likely."""
        rows, columns = block_grid(check_shape(shape), check_block(block))
        count = kept_count(rows * columns, sparsity)
        return cls(shape, *compress(sample(rows * columns, count, generator), rows, columns), block)

    @classmethod
    def parts(cls, shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, str]:
        """The number of blocks, and their size."""
        rows, columns = block_grid(shape, block)
        return rows * columns, f"blocks of {block[0]} x {block[1]}"

    @classmethod
    def spec_of(cls, block: tuple[int, int]) -> str:
        """``"bsr32"``, or ``"bsr64x32"`` where a block's height and width differ."""
        height, width = block
        return f"bsr{height}" if height == width else f"bsr{height}x{width}"

    @property
    def options(self) -> dict[str, Any]:
        """``{"block": (bh, bw)}``."""
        return {"block": self.block}

    @property
    def values_shape(self) -> tuple[int, ...]:
        """``(blocks, bh, bw)``: the blocks stand block row by block row, as in ``block_col_idx``."""
        return (self.block_col_idx.numel(), *self.block)

    @property
    def nnz(self) -> int:
        """The number of values inside W."""
        return self._nnz

    def flat_index(self) -> Tensor:
        """int64 ``[blocks, bh, bw]``: ``row · in + column`` of each value; ``out · in`` marks padding."""
        (out_features, in_features), (height, width) = self.shape, self.block
        device = self.block_col_idx.device
        block_row = row_index(self.block_row_ptr, self.block_col_idx.numel())
        row = (block_row * height)[:, None, None] + torch.arange(height, device=device)[:, None]
        column = (self.block_col_idx.long() * width)[:, None, None] + torch.arange(width, device=device)
        index = row * in_features + column
        if out_features % height or in_features % width:
            index.masked_fill_((row >= out_features) | (column >= in_features), out_features * in_features)
        return index

    def tensors(self) -> list[Tensor]:
        """``[block_row_ptr, block_col_idx, t_block_ptr, t_block_row, t_block]``."""
        return [self.block_row_ptr, self.block_col_idx, self.t_block_ptr, self.t_block_row, self.t_block]

    def gpu_tensors(self) -> list[Tensor]:
        """:meth:`tensors`, ``row_order`` and ``t_row_order``."""
        return [*self.tensors(), self.row_order, self.t_row_order]

    def sizes(self) -> list[int]:
        """``[out, in, bh, bw]``."""
        return [*self.shape, *self.block]


def check_block(block: Sequence[int]) -> tuple[int, int]:
    """``(bh, bw)``, or ``ValueError`` where that is no block."""
    if not isinstance(block, Sequence) or len(block) != 2 or any(side not in SIDES for side in block):
        raise ValueError(f"block must be (height, width) with sides from {SIDES}, got {block!r}")
    return int(block[0]), int(block[1])


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many block rows and block columns cover ``shape``."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _longest_first(ptr: Tensor) -> Tensor:
    """int32: the rows by falling length, equal ones as they stand."""
    return torch.argsort(ptr.diff(), descending=True, stable=True).to(torch.int32)


def _inside(shape: tuple[int, int], block: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64: the height inside W of each block row, and the width of each block column."""
    starts = (torch.arange(0, size, side, device=device) for size, side in zip(shape, block, strict=True))
    heights, widths = (
        (size - start).clamp(max=side) for start, size, side in zip(starts, shape, block, strict=True)
    )
    return heights, widths
