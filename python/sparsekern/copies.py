"""What a pattern remembers for products by others than its own kernels: its bit mask, and dense copies of W.

A copy is kept while the values do not change, so inference scatters them once. Torch counts most changes
(optimizers, in-place operations, ``load_state_dict``), but not those through ``.data`` or NumPy. While
gradients are recorded all values are summed up to find these too; inference, where that could cost as much as
the product, compares 256 of them. Write under ``torch.no_grad()`` instead.

On a GPU nothing here waits for it, so that calls can be captured in a CUDA graph: to compare values would.
A training step scatters anew, some 10 us where a product that is worth running dense takes 50. Inference
trusts version and address alone, on the stream that made the copy. While a graph is captured W is scattered
too: replays see the values of their time.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ._library import has_kernel
from .formats import BSR, Pattern, mask
from .formats.csr import Tiles
from .formats.pattern import DevicePattern
from .formats.products import PRODUCTS

_KEPT = threading.local()


def scratch(shape: tuple[int, int], like: Tensor) -> Tensor | None:
    """Memory for a dense gradient of W, the same each time: fresh pages can cost as much as the product.

    None on a GPU, where torch keeps memory, by stream.
    """
    if on_gpu(like):
        return None
    kept: dict[Any, dict[tuple[int, int], Tensor]] = _KEPT.__dict__
    views = kept.setdefault((like.dtype, like.device), {})
    found = views.get(shape)
    if found is None:
        size = shape[0] * shape[1]
        memory = max(views.values(), key=Tensor.numel, default=None)
        if memory is None or memory.numel() < size:
            views.clear()
            memory = like.new_empty(size)
        found = views[shape] = memory.view(-1)[:size].view(shape)
    return found


def scatter_by_format(values: Tensor, pattern: Pattern) -> Tensor:
    """W, by the format's own op, which is differentiable."""
    weight: Tensor = PRODUCTS[pattern.format].scatter(values.contiguous(), pattern.tensors(), pattern.sizes())
    return weight


def scatter(values: Tensor, pattern: Pattern, memory: Tensor | None = None) -> Tensor:
    """W, in ``memory`` where it may."""
    if not has_mask(pattern):
        return scatter_by_format(values, pattern)
    weight = values.new_empty(pattern.shape) if memory is None else memory
    mask.expand(values, *mask_operands(pattern), weight)
    return weight


def gather(dense: Tensor, pattern: Pattern) -> Tensor:
    """The values of W again."""
    if not has_mask(pattern):
        values: Tensor = PRODUCTS[pattern.format].gather(dense, *pattern.operands)
        return values
    values = dense.new_empty(pattern.values_shape)
    mask.compress(dense, *mask_operands(pattern), values)
    return values


def has_mask(pattern: Pattern) -> bool:
    """Whether values move along a bit mask: whole rows of blocks need none, and GPU kernels go by column."""
    return not isinstance(pattern, BSR) and pattern.device.type == "cpu"


def has_mask_on_gpu(pattern: Pattern, capturing: bool) -> bool:
    """Whether a GPU has products along this pattern's bit mask, which no graph that is captured makes."""
    if isinstance(pattern, BSR) or not has_kernel("mask_linear", pattern.device.type):
        return False
    return mask_fits(pattern.device) and (not capturing or "mask" in pattern.memo)


@functools.cache
def mask_fits(device: torch.device) -> bool:
    """Whether a block of this GPU may have the 110 KB of shared memory that products along a mask take.

    Those of compute capability 8.6, 8.9 and 12.0 may have 99.
    """
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack what is asked for
    return int(properties.shared_memory_per_block_optin) >= 110 << 10


def mask_operands(pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The bit mask of a pattern that has one, and where its rows begin, as the mask's ops take them."""
    found: tuple[Tensor, Tensor] | None = pattern.memo.get("mask")
    if found is None:
        assert isinstance(pattern, DevicePattern)
        if isinstance(pattern.derived, Tiles):
            found = mask.mask_of(pattern.derived, pattern.shape[1])
        else:
            found = mask.mask_on_gpu(pattern.shape, pattern.flat_index().view(-1))
        pattern.memo["mask"] = found
        if on_gpu(found[0]):
            pattern.memo["mask made"] = _stream(found[0]), _event(found[0])
    elif on_gpu(found[0]) and not capturing(found[0]):  # a capture begins when all streams are done
        stream, made = pattern.memo["mask made"]
        if stream != _stream(found[0]):
            _wait(found[0], made)
    return found


def is_dense(pattern: Pattern) -> bool:
    """Whether the values are W itself, row by row."""
    found: bool | None = pattern.memo.get("whole")
    if found is None:
        whole = pattern.format != "bsr" and pattern.nnz == pattern.shape[0] * pattern.shape[1]
        found = pattern.memo["whole"] = whole
    return found


class _Lease:
    """Who holds it may read a copy's W later."""

    __slots__ = ("__weakref__",)


class _Copy:
    """A dense copy, and what it was made of.

    Attributes:
        values: they are alive as long as this is, so no other tensor has their address.
        some, sample: :func:`_some` of them and what it held, or None where inference has not asked for it.
        checksum: that of all values, or None where no training step has asked for it.
        stream: that of the GPU which made W: on others it may not be there yet.
        lease: what all who may read W later hold.
    """

    __slots__ = ("address", "checksum", "lease", "sample", "some", "stream", "values", "version", "weight")

    def __init__(self, values: Tensor, weight: Tensor, sample: Tensor | None, checksum: int | None) -> None:
        self.values, self.weight, self.sample, self.checksum = values, weight, sample, checksum
        self.some = None if sample is None else _some(values)
        self.address, self.version = values.data_ptr(), values._version
        self.stream = _stream(values)
        self.lease: weakref.ref[_Lease] | None = None

    def looks_same(self) -> bool:
        """Whether some values are known to be as they were."""
        return self.some is not None and self.sample is not None and self.some.equal(self.sample)

    def lend(self) -> _Lease:
        """The lease."""
        lease = None if self.lease is None else self.lease()
        if lease is None:
            lease = _Lease()
            self.lease = weakref.ref(lease)
        return lease


def on_gpu(tensor: Tensor) -> bool:
    """Whether to read a number of this tensor would wait for a GPU."""
    return tensor.is_cuda


def capturing(tensor: Tensor) -> bool:
    """Whether what is run with this tensor now goes into a CUDA graph."""
    return on_gpu(tensor) and torch.cuda.is_current_stream_capturing()


def _stream(tensor: Tensor) -> int | None:
    """The stream that runs what is done with this tensor; None on a CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if on_gpu(tensor) else None


def _event(tensor: Tensor) -> Any:
    """When the stream that runs what is done with this tensor now will have done what it was given."""
    return torch.cuda.current_stream(tensor.device).record_event()


def _wait(tensor: Tensor, event: Any) -> None:
    torch.cuda.current_stream(tensor.device).wait_event(event)


def weight_of(values: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """W in ``dtype``: the copy that the pattern remembers, or a new one where the values changed."""
    if capturing(values):
        return _fresh(values, pattern, dtype)
    copy = _remembered(values, pattern, dtype)
    if isinstance(copy, Tensor):
        return copy
    if on_gpu(values):
        if copy is None or copy.stream != _stream(values):
            copy = _renew(values, pattern, dtype, sample=False, checksum=False)
        return copy.weight
    if copy is None or not copy.looks_same():
        copy = _renew(values, pattern, dtype, sample=True, checksum=copy is not None)
    return copy.weight


def leased_weight_of(values: Tensor, pattern: Pattern, dtype: torch.dtype) -> tuple[Tensor, _Lease | None]:
    """:func:`weight_of` for a training step: all values are compared, and W stays while the lease is held.

    Values that an optimizer changes at each step are never summed up: only when they are seen a second time,
    W is made once more, and what the third time compares is taken down.
    """
    if on_gpu(values):
        return _fresh(values, pattern, dtype), None
    copy = _remembered(values, pattern, dtype)
    if isinstance(copy, Tensor):
        return copy, None
    if copy is None or copy.checksum is None or copy.checksum != _checksum(copy.values):
        copy = _renew(values, pattern, dtype, sample=copy is not None, checksum=copy is not None)
    return copy.weight, copy.lend()


def _fresh(values: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """W in ``dtype``, kept by nobody."""
    if is_dense(pattern):
        return values.detach().view(pattern.shape).to(dtype)
    return scatter_by_format(values.detach(), pattern).to(dtype)


def _remembered(values: Tensor, pattern: Pattern, dtype: torch.dtype) -> _Copy | Tensor | None:
    """The copy of these values, as far as version and address tell; or W where nothing can be remembered."""
    # Values of inference mode count no versions, and others may have no flat view.
    if is_dense(pattern) or values.is_inference() or not values.is_contiguous():
        return _fresh(values, pattern, dtype)
    copy: _Copy | None = pattern.memo.get(("copy", dtype))
    if copy is None or copy.version != values._version or copy.address != values.data_ptr():
        return None
    return copy


def _renew(values: Tensor, pattern: Pattern, dtype: torch.dtype, *, sample: bool, checksum: bool) -> _Copy:
    """A copy of these values, with what is asked for taken down.

    In the old one's memory, if no one may read that later: fresh pages cost time.
    """
    values = values.detach()
    old: _Copy | None = pattern.memo.get(("copy", dtype))
    free = old is not None and (old.lease is None or old.lease() is None)
    reuse = old is not None and free and values.dtype == dtype and not on_gpu(values)
    memory = old.weight if old is not None and reuse else None
    seen = _some(values).clone() if sample else None, _checksum(values) if checksum else None
    weight = scatter(values, pattern, memory)
    copy = _Copy(values, weight if weight.dtype == dtype else weight.to(dtype), *seen)
    pattern.memo["copy", dtype] = copy
    return copy


class Ready:
    """Dense inference calls that were looked at, for the next ones like them.

    To look at all of a call takes 25 us, a fifth of a product of one row of x with 1024 x 1024 weights; to
    see that nothing changed takes 4.
    """

    __slots__ = ("address", "bias", "copy", "key", "shapes", "values", "weight")

    def __init__(self, weight: Tensor, values: Tensor, bias: Tensor | None, copy: _Copy | None) -> None:
        self.weight, self.copy, self.address = weight, copy, values.data_ptr()
        self.values, self.bias = weakref.ref(values), _none if bias is None else weakref.ref(bias)
        self.key = ("copy", weight.dtype)
        self.shapes: set[torch.Size] = set()  # of the x that came

    @classmethod
    def remember(cls, name: str, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> None:
        """That this call, without gradients, is ``linear(x, W, bias)``."""
        copy: _Copy | None = pattern.memo.get(("copy", x.dtype))
        whole = is_dense(pattern)
        if not x.is_contiguous() or values.dtype != x.dtype or (copy is None and not whole):
            return
        found: Ready | None = pattern.memo.get(("ready", name))
        if found is None or len(found.shapes) > 100 or not found._is_of(x, values, bias, pattern):
            weight = values.detach().view(pattern.shape) if copy is None else copy.weight
            found = pattern.memo["ready", name] = cls(weight, values, bias, copy)
        found.shapes.add(x.shape)

    def serves(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> bool:
        """Whether this call, without gradients, is ``linear(x, self.weight, bias)``."""
        return (
            x.shape in self.shapes
            and self._is_of(x, values, bias, pattern)
            and x.is_contiguous()
            and x.is_cpu
            and not torch.is_autocast_enabled("cpu")
            and (self.copy is None or self.copy.looks_same())
        )

    def _is_of(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> bool:
        """Whether dtype, weight and bias are these; of the values, as far as version and address tell."""
        copy = self.copy
        return (
            values is self.values()
            and bias is self.bias()
            and x.dtype == self.key[1]
            and values.data_ptr() == self.address
            and pattern.memo.get(self.key) is copy
            and (copy is None or copy.version == values._version)
        )


def _none() -> None:
    """What a dead reference gives."""


def kept_bytes(pattern: Pattern) -> int:
    """The bytes of the dense copies that the pattern remembers, with the mask along which they are made."""
    copies = sum(copy.weight.nbytes for copy in pattern.memo.values() if isinstance(copy, _Copy))
    bits, row_ptr = pattern.memo.get("mask", (None, None))
    if bits is None:
        return copies
    own = not isinstance(getattr(pattern, "derived", None), Tiles)  # else it is theirs
    return int(copies + bits.nbytes + (row_ptr.nbytes if own else 0))


def _some(values: Tensor) -> Tensor:
    """A view of 16 runs of 16 values, or of all if there are less than 256."""
    flat = values.view(-1)
    size = flat.numel()
    return flat if size < 256 else flat.as_strided((16, 16), (size // 16, 1), flat.storage_offset())


def _checksum(values: Tensor) -> int:
    """The sum of the values' bits, as integers of 8 bytes: ten times as fast as comparing them."""
    raw = values.view(-1).view(torch.uint8)
    even = raw.numel() // 8 * 8
    rest = int(raw[even:].sum()) if even < raw.numel() else 0
    aligned = raw[:even].storage_offset() % 8 == 0
    return int(raw[:even].view(torch.int64).sum()) + rest if aligned else int(raw.sum())
