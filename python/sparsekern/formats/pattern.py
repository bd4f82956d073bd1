"""What every sparsity pattern can do, whatever its format."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from . import triton_masks

if TYPE_CHECKING:
    from typing_extensions import Self

P = TypeVar("P", bound="Pattern")
D = TypeVar("D", bound="DevicePattern")


class Pattern(ABC):
    """The positions of the nonzeros of a weight ``W [out, in]``: index tensors, never values.

    A pattern is immutable: a mask update builds a new one. Its primary tensors (:meth:`state`) define it and
    are what a ``state_dict`` holds; whatever else the kernels need (the transposed index, say) is derived
    from them when the pattern is built, so a training step never builds an index.
    """

    format: ClassVar[str]
    """The format's stem, e.g. ``"csr"``."""
    state_names: ClassVar[tuple[str, ...]]
    """Names of the primary index tensors, as they appear in a ``state_dict``."""

    shape: tuple[int, int]
    """``(out_features, in_features)``."""

    memo: Memo
    """What calls look up again and again."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """With an empty memo."""
        self = super().__new__(cls)
        self.memo = Memo()
        return self

    # Each format has options of its own (the block, N and M), named alike in all of these.

    @classmethod
    @abstractmethod
    def from_mask(cls: type[P], mask: Tensor, *args: Any, **options: Any) -> P:
        """The pattern of a bool mask ``[out, in]``."""

    @classmethod
    @abstractmethod
    def from_state(
        cls: type[P], shape: tuple[int, int], state: dict[str, Tensor], *args: Any, **options: Any
    ) -> P:
        """The pattern of primary index tensors, checked completely. Raises ``ValueError`` on bad contents."""

    @classmethod
    @abstractmethod
    def prune(cls, scores: Tensor, sparsity: float | None, *args: Any, **options: Any) -> Tensor:
        """The bool mask of this format with the largest sum of ``scores [out, in]`` at ``sparsity``.

        None where the format fixes it.
        """

    @classmethod
    @abstractmethod
    def random(
        cls: type[P],
        shape: tuple[int, int],
        sparsity: float | None,
        generator: torch.Generator | None,
        *args: Any,
        **options: Any,
    ) -> P:
        """A random pattern, on the CPU, that keeps as much as :meth:`prune` does. O(nnz) memory."""

    @classmethod
    @abstractmethod
    def spec_of(cls, *args: Any, **options: Any) -> str:
        """The spec string of these options in its shortest form."""

    @classmethod
    def parts(cls, shape: tuple[int, int], *args: Any, **options: Any) -> tuple[int, str]:
        """How many parts of W stay or go as a whole, and what they are: its weights, unless in blocks."""
        return shape[0] * shape[1], "weights"

    @classmethod
    def fixed_sparsity(cls, *args: Any, **options: Any) -> float | None:
        """The sparsity of every pattern with these options, e.g. ½ for 2:4; None where it is free."""
        return None

    @property
    def options(self) -> dict[str, Any]:
        """What :meth:`from_mask` was given beside the mask."""
        return {}

    @property
    def spec(self) -> str:
        """The spec string, e.g. ``"bsr32"``."""
        return self.spec_of(**self.options)

    @property
    @abstractmethod
    def values_shape(self) -> tuple[int, ...]:
        """The shape of the ``values`` that go with this pattern."""

    @abstractmethod
    def flat_index(self) -> Tensor:
        """int64 of :attr:`values_shape`: each value's position in the flattened ``[out·in]`` weight.

        ``out · in``, one past the end, marks padding: values past the edge of W, which are and stay 0.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All index tensors, primary and derived, in the order in which this format's ops take them."""

    def sizes(self) -> list[int]:
        """``[out, in]``, and this format's options as integers: what its ops take beside :meth:`tensors`."""
        return [*self.shape]

    @property
    def operands(self) -> tuple[list[Tensor], list[int]]:
        """:meth:`tensors` and :meth:`sizes`, listed once, as every call takes them."""
        if "operands" not in self.memo:
            self.memo["operands"] = self.tensors(), self.sizes()
        found: tuple[list[Tensor], list[int]] = self.memo["operands"]
        return found

    def gpu_tensors(self) -> list[Tensor]:
        """:meth:`tensors` as Triton's kernels take them, wherever they are: those of a GPU."""
        return self.tensors()

    @property
    def gpu_operands(self) -> tuple[list[Tensor], list[int]]:
        """:meth:`gpu_tensors` and :meth:`sizes`, listed once."""
        if "gpu operands" not in self.memo:
            self.memo["gpu operands"] = self.gpu_tensors(), self.sizes()
        found: tuple[list[Tensor], list[int]] = self.memo["gpu operands"]
        return found

    def _map(self: P, fn: Callable[[Tensor], Tensor]) -> P:
        """The same pattern with ``fn`` applied to each of its tensors (to move them to another device)."""
        return map_tensors(self, fn)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each primary index tensor."""
        return ((name, getattr(self, name)) for name in self.state_names)

    def check(self) -> None:
        """Check the contents of all index tensors again: ``ValueError`` where they were written to."""
        sound = self.from_state(self.shape, dict(self.state()), **self.options)
        for i, (found, built) in enumerate(zip(self.tensors(), sound.tensors(), strict=True)):
            if not torch.equal(found, built):
                names = ", ".join(self.state_names)
                raise ValueError(f"tensors()[{i}] of {self} must be what {names} give, got other contents")

    @property
    def nnz(self) -> int:
        """The number of stored values, padding not counted."""
        nnz = 1
        for size in self.values_shape:
            nnz *= size
        return nnz

    @property
    def density(self) -> float:
        """``nnz / (out · in)``; 0 for a weight without elements."""
        size = self.shape[0] * self.shape[1]
        return self.nnz / size if size else 0.0

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self: P, device: torch.device | str) -> P:
        """This pattern with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def to_mask(self) -> Tensor:
        """The dense bool mask ``[out, in]``. For people and tests: it is as large as the dense weight."""
        size = self.shape[0] * self.shape[1]
        mask = torch.zeros(size + 1, dtype=torch.bool, device=self.device)  # one more, for padding
        mask[self.flat_index().reshape(-1)] = True
        return mask[:size].view(self.shape)

    def gather(self, dense: Tensor) -> Tensor:
        """The values of ``dense [out, in]`` at this pattern's positions; padding is 0."""
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"dense must have shape {list(self.shape)}, got {list(dense.shape)}")
        index = self.flat_index()
        if self.nnz == index.numel():
            return dense.reshape(-1)[index]
        inside = index < dense.numel()
        return torch.where(inside, dense.reshape(-1)[index.clamp(max=dense.numel() - 1)], dense.new_zeros(()))

    def scatter(self, values: Tensor) -> Tensor:
        """The dense weight ``[out, in]`` with ``values`` at this pattern's positions and 0 elsewhere.

        Differentiable.
        """
        if tuple(values.shape) != self.values_shape:
            raise ValueError(f"values must have shape {list(self.values_shape)}, got {list(values.shape)}")
        size = self.shape[0] * self.shape[1]
        dense = values.new_zeros(size + (self.nnz != values.numel()))
        dense = dense.index_put((self.flat_index().reshape(-1),), values.reshape(-1))
        return dense[:size].view(self.shape)

    def zero_padding_(self, values: Tensor) -> Tensor:
        """``values`` with its padding set to 0, in place."""
        if self.nnz != values.numel():
            values.masked_fill_(self.flat_index() == self.shape[0] * self.shape[1], 0)
        return values

    def check_padding(self, values: Tensor) -> None:
        """Raise ``ValueError`` unless the padding of ``values`` is 0, as far as its numbers are known."""
        if self.nnz == values.numel() or values.is_meta:
            return
        padding = self.flat_index().to(values.device) == self.shape[0] * self.shape[1]
        if wrong := int(values[padding].count_nonzero()):
            raise ValueError(
                f"values must be 0 past the edge of W {list(self.shape)}, got others in {wrong} places"
            )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.spec!r}, shape={self.shape}, nnz={self.nnz}, "
            f"density={self.density:.4g}, device={self.device})"
        )


class DevicePattern(Pattern):
    """A pattern whose kernels need other things on a GPU than on a CPU."""

    derived: Any
    """What the kernels of the tensors' device need beside the primary tensors."""

    @abstractmethod
    def _kind(self, device: str | None = None) -> Any:
        """The type of :attr:`derived` on this type of device, or that of the tensors."""

    @abstractmethod
    def _build(self, kind: Any) -> Any:
        """The :attr:`derived` of this type."""

    def gpu_tensors(self) -> list[Tensor]:
        """:meth:`tensors` of this pattern as it is on a GPU."""
        kind = self._kind("cuda")
        if isinstance(self.derived, kind) or self.device.type == "meta":
            return self.tensors()
        there = copy.copy(self)
        there.derived = self._build(kind)
        return there.tensors()

    def _derive(self) -> None:
        """Where it is missing or another device's. On meta there is nothing to derive anew from."""
        if not hasattr(self, "derived") or (
            not isinstance(self.derived, self._kind()) and self.device.type != "meta"
        ):
            self.derived = self._build(self._kind())

    def _map(self: D, fn: Callable[[Tensor], Tensor]) -> D:
        moved = super()._map(fn)
        moved._derive()
        return moved

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._derive()  # torch.load can bring tensors to another device


class Memo(dict[Any, Any]):
    """What was derived from a pattern, and can be again: copies and pickles start with an empty one."""

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Memo:
        return Memo()

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()


T = TypeVar("T")


def map_tensors(record: T, fn: Callable[[Tensor], Tensor]) -> T:
    """A copy of ``record`` with ``fn`` applied to its tensors and to those of the records in it."""
    other = object.__new__(type(record))
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            value = fn(value)
        elif hasattr(value, "_map"):
            value = value._map(fn)
        object.__setattr__(other, name, value)
    return other


def check_mask(mask: Tensor) -> None:
    """Raise unless ``mask`` is a dense bool matrix."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 2 or mask.dtype != torch.bool or mask.layout != torch.strided:
        raise ValueError(f"mask must be a dense bool tensor [out, in], got {mask.dtype} {list(mask.shape)}")


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Bool tensor that marks the ``count`` largest ``scores``, which must hold no NaN.

    Ties go to the lower flat index, so it is reproducible.
    A k-th value plus one comparison, not a sort: O(n), and exact where ``torch.topk`` leaves ties to chance.
    """
    flat = scores.reshape(-1)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if (kernels := triton_masks.kernels_for(flat)) is not None:
        marked: Tensor = kernels.top_mask(flat.contiguous(), count)
        return marked.view(scores.shape)
    threshold = torch.topk(flat, count, sorted=False).values.min()
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask.index_fill_(0, ties[: count - int(mask.sum())], True)
    return mask.view(scores.shape)
