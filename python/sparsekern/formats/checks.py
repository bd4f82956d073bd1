"""What all formats check of index tensors, scores and sparsities, with one wording."""

from __future__ import annotations

import math
from numbers import Real
from operator import index as as_int

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """``(out_features, in_features)`` as two ints that fit 32 bits."""
    out_features, in_features = as_int(shape[0]), as_int(shape[1])
    if min(out_features, in_features) < 0 or max(out_features, in_features) > INT32_MAX:
        raise ValueError(f"shape must be two sizes in [0, {INT32_MAX}], got {(out_features, in_features)}")
    return out_features, in_features


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int | str, ...]) -> None:
    """Raise unless ``tensor`` is contiguous, of ``dtype`` and of these ``sizes``; a string is any size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(sizes) and all(
        isinstance(size, str) or size == got for size, got in zip(sizes, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        must = f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, sizes))}]"
        raise ValueError(f"{name} must be {must}, got {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {tensor.stride()}")


def check_one_device(**tensors: Tensor) -> None:
    """Raise unless all ``tensors`` are on one device."""
    devices = [str(tensor.device) for tensor in tensors.values()]
    if len(set(devices)) > 1:
        raise ValueError(f"{' and '.join(tensors)} must be on one device, got {' and '.join(devices)}")


def check_compressed(
    ptr_name: str, ptr: Tensor, idx_name: str, idx: Tensor, rows: int, columns: int, entries: str
) -> None:
    """Raise unless ``ptr`` and ``idx`` are compressed rows.

    Int32 ``ptr [rows + 1]`` runs from 0 to the number of ``entries`` (a word for messages), and int32 ``idx``
    holds columns in ``[0, columns)``, strictly ascending within a row.
    """
    check_tensor(ptr_name, ptr, torch.int32, (rows + 1,))
    check_tensor(idx_name, idx, torch.int32, (entries,))
    check_one_device(**{ptr_name: ptr, idx_name: idx})
    if ptr.device.type == "meta":
        return
    # All questions at once, so that a GPU is waited for once. A step down is allowed only where a row starts.
    count = idx.numel()
    falling = ptr[1:] < ptr[:-1]  # not diff(), which can overflow
    facts = [ptr[0], ptr[-1], falling.any()]
    unsorted = falling
    if count:
        starts = torch.zeros(count + 1, dtype=torch.bool, device=ptr.device)
        starts.index_fill_(0, ptr.clamp(0, count).long(), True)
        unsorted = (idx[1:] <= idx[:-1]).logical_and_(starts[1:count].logical_not_())
        facts += [*torch.aminmax(idx), unsorted.any()]
    first, last, falls, *rest = torch.stack([fact.to(torch.int32) for fact in facts]).tolist()
    if first != 0 or last != count:
        raise ValueError(f"{ptr_name} must run from 0 to {entries} = {count}, got {first} to {last}")
    if falls:
        row = int(falling.nonzero()[0])
        raise ValueError(f"{ptr_name} must not decrease, got a decrease after row {row}")
    low, high, breaks = rest or (0, -1, 0)
    if low < 0 or high >= columns:
        raise ValueError(f"{idx_name} must be in [0, {columns}), got values from {low} to {high}")
    if breaks:
        entry = int(unsorted.nonzero()[0]) + 1
        raise ValueError(f"{idx_name} must ascend strictly within each row, but entry {entry} does not")


def check_nnz(nnz: int, shape: tuple[int, int]) -> None:
    """Raise where a pattern of this ``shape`` has more values than 32 bits can count."""
    if nnz > INT32_MAX:
        raise ValueError(f"a pattern must have at most {INT32_MAX} nonzeros, got {nnz} for shape {shape}")


def as_scores(name: str, tensor: Tensor) -> Tensor:
    """A matrix ``[out, in]`` in the dtype that pruning computes in.

    float32, or float64 if that or an integer: there every integer has a magnitude, the smallest int8 as well.

    Raises:
        TypeError: no tensor.
        ValueError: not dense, not of a float or integer dtype, no matrix.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.dtype not in (*_FLOATS, *_INTEGERS):
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise ValueError(
            f"{name} must be a dense matrix of {kinds} or integers, got {tensor.dtype}, {tensor.layout}"
        )
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be a matrix [out, in], got shape {list(tensor.shape)}")
    short = tensor.dtype in _FLOATS and tensor.dtype != torch.float64
    return tensor.detach().to(torch.float32 if short else torch.float64)


def check_scores(scores: Tensor, finite: bool = False) -> Tensor:
    """:func:`as_scores`, without NaN, and without infinities too where they must be ``finite``."""
    scores = as_scores("scores", scores)
    check_numbers(scores, finite)
    return scores


def check_numbers(scores: Tensor, finite: bool = False) -> None:
    """Raise where ``scores`` hold NaN, or infinities though sums of them must be ``finite``."""
    if not scores.numel():
        return
    low, high = torch.stack(torch.aminmax(scores)).tolist()  # NaN if one is; a fifth of isfinite's time
    if math.isnan(low):
        at = int(scores.isnan().reshape(-1).nonzero()[0])
        raise ValueError(f"scores must not hold NaN, got one at flat index {at}")
    if finite and (math.isinf(low) or math.isinf(high)):
        at = int(scores.isinf().reshape(-1).nonzero()[0])
        raise ValueError(f"scores must be finite, got {float(scores.reshape(-1)[at])} at flat index {at}")


def check_sparsity(name: str, sparsity: float | None) -> float:
    """``sparsity``, or an error where it is no number in [0, 1)."""
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if sparsity is None or (number and not 0.0 <= sparsity < 1.0):
        raise ValueError(f"{name} must be in [0, 1), got {sparsity}")
    if not number:
        raise TypeError(f"{name} must be a number in [0, 1), got {sparsity!r}")
    return float(sparsity)


def kept_count(size: int, sparsity: float | None) -> int:
    """``round(size · (1 − sparsity))``: how many of ``size`` weights or blocks stay."""
    return round(size * (1.0 - check_sparsity("sparsity", sparsity)))


def check_fixed_sparsity(sparsity: float | None, fixed: float, spec: str) -> None:
    """Raise unless ``sparsity`` is None or what the format ``spec`` fixes."""
    if sparsity is not None and abs(check_sparsity("sparsity", sparsity) - fixed) > 1e-6:
        raise ValueError(f"sparsity must be {fixed:.6g} or None, as format {spec!r} fixes it, got {sparsity}")
