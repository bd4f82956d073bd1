"""``SparseLinear``: ``torch.nn.Linear`` whose weight stores its nonzeros only."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..formats import Format, Pattern, parse_format
from ..formats.checks import check_tensor
from ..formats.pattern import check_mask


class SparseLinear(nn.Module):
    """``y = x Wᵀ + b`` with a sparse ``W [out, in]``: values, gradient and optimizer state are O(nnz).

    Args:
        in_features: size of each input, ``(..., in_features)``.
        out_features: size of each output, ``(..., out_features)``.
        bias: whether to add a learned ``[out_features]`` bias.
        sparsity: fraction of zeros, in [0, 1), that leaves something; None for 0.9, or for what the format
            fixes.
        format: the sparsity format: ``"csr"`` keeps ``round(out · in · (1 − sparsity))`` random positions,
            ``"bsr32"`` or ``"bsr64x32"`` that share of random blocks, ``"2:4"`` 2 random ones of each 4
            columns, ``"64:2:8"`` 2 of 4 that 64 rows chose of each 8. See :mod:`sparsekern.formats`.
        device, dtype: as in ``torch.nn.Linear``.
        generator: draws the positions and the initial values; a CPU generator.

    Attributes:
        values: the nonzeros, an ordinary ``nn.Parameter`` of shape ``pattern.values_shape``.
        bias: ``nn.Parameter [out_features]`` or None.
        pattern: where the nonzeros are. Replace it with :meth:`set_pattern`.
        backend: which kernels run, see :func:`sparsekern.linear`; ``"auto"``.

    Initial values are uniform in ±1/√(density · in), the bias in ±1/√(in): ``nn.Linear``'s rule with the
    fan-in that is left, so that activations keep their variance (Evci et al., "The Difficulty of Training
    Sparse Neural Networks").

    >>> layer = SparseLinear(1024, 4096, sparsity=0.9)
    >>> layer(torch.randn(8, 1024)).shape
    torch.Size([8, 4096])
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    pattern: Pattern

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float | None = None,
        format: str = "csr",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, Integral):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dtype is not None and dtype not in ops.SCATTER_DTYPES:
            raise ValueError(f"dtype must be one of {list(ops.SCATTER_DTYPES)}, got {dtype}")
        kind = parse_format(format)
        if sparsity is None and kind.fixed_sparsity is None:
            sparsity = 0.9
        pattern = kind.random((out_features, in_features), sparsity, generator)
        values = torch.empty(pattern.values_shape, dtype=dtype or torch.get_default_dtype(), device="cpu")
        bias_value = torch.empty(out_features, dtype=values.dtype, device="cpu") if bias else None
        fan_in = max(pattern.density * in_features, 1.0)
        values.uniform_(-1.0, 1.0, generator=generator).mul_(1.0 / math.sqrt(fan_in))
        pattern.zero_padding_(values)
        if bias_value is not None:
            bias_value.uniform_(-1.0, 1.0, generator=generator).mul_(1.0 / math.sqrt(in_features))
        self._init(pattern, values, bias_value)
        self.to(torch.get_default_device() if device is None else device)

    def _init(self, pattern: Pattern, values: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.backend = "auto"
        self.pattern = pattern
        self.values = nn.Parameter(values)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        sparsity: float | None = None,
        mask: Tensor | None = None,
        format: str = "csr",
        transposable: bool = False,
    ) -> SparseLinear:
        """The sparse copy of a dense layer.

        It keeps the largest magnitudes at ``sparsity``, or the positions of ``mask``.

        Args:
            linear: the layer to copy; it is left as it is.
            sparsity: fraction of zeros, in [0, 1), that leaves something.
            mask: bool ``[out, in]`` that fits the format. Exactly one of ``sparsity`` and ``mask`` must be
                given, or none where the format fixes the sparsity.
            format: the sparsity format.
            transposable: keep the best N:M mask whose transpose is N:M too, see :func:`sparsekern.prune`; not
                with ``mask``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        kind = parse_format(format)
        if (sparsity is None) == (mask is None) and not (mask is None and kind.fixed_sparsity is not None):
            got = "neither" if mask is None else "both"
            raise ValueError(f"exactly one of sparsity and mask must be given, got {got}")
        weight = linear.weight.detach()
        if mask is None:
            pattern = kind.pruned(weight, sparsity, transposable)
        elif transposable:
            raise ValueError("transposable must be False where mask is given: that says what stays")
        else:
            check_mask(mask)
            if mask.shape != weight.shape:
                raise ValueError(f"mask must have shape {list(weight.shape)}, got {list(mask.shape)}")
            pattern = kind.from_mask(mask.to(weight.device))
        layer = cls.__new__(cls)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer._init(pattern, pattern.gather(weight), bias)
        layer.values.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        layer.train(linear.training)
        return layer

    @property
    def in_features(self) -> int:
        """Size of each input."""
        return self.pattern.shape[1]

    @property
    def out_features(self) -> int:
        """Size of each output."""
        return self.pattern.shape[0]

    @property
    def format(self) -> str:
        """The pattern's format, e.g. ``"csr"`` or ``"bsr32"``."""
        return self.pattern.spec

    @property
    def _kind(self) -> Format:
        return Format(type(self.pattern), self.pattern.options)

    @property
    def density(self) -> float:
        """``nnz / (out · in)``."""
        return self.pattern.density

    @property
    def mask(self) -> Tensor:
        """The dense bool mask ``[out, in]``, built anew at each call."""
        return self.pattern.to_mask()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        own = self._parameters  # nn.Module finds an attribute there in 1 us, a tenth of a small layer's call
        try:
            values, bias = own["values"], own["bias"]
        except KeyError:  # a replica's, or parametrized
            values, bias = self.values, self.bias
        return ops.linear(x, values, self.pattern, bias, backend=self.backend)  # type: ignore[arg-type]

    def to_dense(self) -> nn.Linear:
        """The equal ``nn.Linear``, a copy."""
        weight = self.pattern.scatter(self.values.detach())
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    @torch.no_grad()
    def set_pattern(self, pattern: Pattern | Tensor, values: Tensor | None = None) -> None:
        """Change where the nonzeros are. Values at positions in both patterns survive; new ones start at 0.

        The parameter ``values`` stays the same object, so an optimizer keeps it; its gradient is dropped.
        Where nnz is the same its storage stays too. Optimizer state is carried along by the methods of
        :mod:`sparsekern.training`.

        Args:
            pattern: a pattern of this layer's format, or a bool mask ``[out, in]``. With another nnz, an
                optimizer that has state for ``values`` must be made anew: its tensors have the old shape.
            values: the new values, where they are known already.

        Raises:
            ValueError: a pattern or values of the wrong shape; the layer stays as it was.
        """
        if not isinstance(pattern, Pattern):
            check_mask(pattern)
            pattern = self._kind.from_mask(pattern.to(self.pattern.device))
        if pattern.spec != self.pattern.spec:
            raise ValueError(f"pattern must be of format {self.pattern.spec!r}, got {pattern.spec!r}")
        if pattern.shape != self.pattern.shape:
            raise ValueError(f"pattern must have shape {self.pattern.shape}, got {pattern.shape}")
        pattern = pattern.to(self.values.device)
        if values is None:
            values = move_values(self.pattern, pattern, self.values)
        meta = isinstance(values, Tensor) and values.is_meta and not self.values.is_meta
        if not isinstance(values, Tensor) or not values.is_floating_point() or meta:
            got = (
                f"{values.dtype} on {values.device}" if isinstance(values, Tensor) else type(values).__name__
            )
            raise ValueError(f"values must be a tensor of floating-point numbers, got {got}")
        if tuple(values.shape) != pattern.values_shape:
            raise ValueError(f"values must have shape {list(pattern.values_shape)}, got {list(values.shape)}")
        self.pattern = pattern
        self.values.grad = None
        if values.shape == self.values.shape:
            self.values.copy_(values)
        else:
            self.values.data = values.detach().to(self.values, copy=True)
        pattern.zero_padding_(self.values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        # Module.to(), .cuda(), .to_empty() and the like act through _apply. Of what fn does to tensors, only
        # the move to another device is meant for the positions.
        device = fn(torch.empty(0, dtype=torch.int32, device=self.pattern.device)).device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.pattern.device.type != "meta":  # from there, a state_dict brings them back
            self.pattern = self.pattern.to(device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "shape"] = torch.tensor(self.pattern.shape, device="cpu")
        for name, tensor in self.pattern.state():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Index and values belong together: all of them are loaded, or none.
        names = ("shape", *self.pattern.state_names, "values")
        own = {prefix + name: parameter for name, parameter in self.named_parameters(recurse=False)}
        rest = {key: tensor for key, tensor in state_dict.items() if key[len(prefix) :] not in names[:-1]}
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if not missing:
            assign = local_metadata.get("assign_to_params_buffers", False)
            try:
                self._load_pattern({name: state_dict[prefix + name] for name in names}, assign)
            except (ValueError, TypeError) as error:
                # torch collects the messages of all layers and raises them as one error.
                error_msgs.append(f"{prefix}pattern is refused: {error}")
                rest = own  # this layer loads its own parameters: it stays as it was
        else:
            missing_keys.extend(missing)
            partial = len(missing) < len(names)
            rest = own if partial else {**rest, prefix + "values": self.values}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_pattern(self, state: dict[str, Tensor], assign: bool) -> None:
        """Take over a checked pattern, and make room for its values."""
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                got = f"a {tensor.layout} one" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must be a dense torch.Tensor, got {got}")
        values, shape = state.pop("values"), state.pop("shape")
        check_tensor("shape", shape, torch.int64, (2,))
        if tuple(shape.tolist()) != self.pattern.shape:
            raise ValueError(f"shape must be {list(self.pattern.shape)}, got {shape.tolist()}")
        if not values.is_floating_point():
            raise ValueError(f"values must be floating-point numbers, got {values.dtype}")
        if values.is_meta and not (self.values.is_meta or assign):
            raise ValueError("values must hold numbers, got a tensor on meta")
        # A copy, even on one device: what was checked must not change with a memory-mapped file.
        device = values.device if self.values.is_meta else self.values.device
        state = {name: tensor.to(device, copy=True).contiguous() for name, tensor in state.items()}
        pattern = self._kind.from_state(self.pattern.shape, state)
        if tuple(values.shape) != pattern.values_shape:
            raise ValueError(f"values must have shape {list(pattern.values_shape)}, got {list(values.shape)}")
        pattern.check_padding(values)
        self.pattern = pattern
        if tuple(self.values.shape) != pattern.values_shape:
            self.values.data = self.values.data.new_zeros(pattern.values_shape)
            self.values.grad = None

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, sparsity={1.0 - self.density:.4g}"
        )


def move_values(old: Pattern, new: Pattern, values: Tensor) -> Tensor:
    """``values`` of pattern ``old`` at the positions of ``new``.

    Survivors keep theirs, new positions are 0. O(nnz) memory.
    """
    old_index, new_index = old.flat_index().reshape(-1), new.flat_index().reshape(-1)
    moved = values.new_zeros(new_index.shape)
    if old_index.numel() and new_index.numel():
        old_index, order = torch.sort(old_index)
        at = torch.searchsorted(old_index, new_index).clamp_(max=old_index.numel() - 1)
        survives = old_index[at] == new_index
        moved[survives] = values.detach().reshape(-1)[order[at[survives]]]
    return moved.view(new.values_shape)
