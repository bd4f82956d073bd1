"""The gradient of a whole dense weight, of a layer that stores its nonzeros only, a few rows at a time."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Pairs = list[tuple[Tensor, Tensor]]


class DenseGradient:
    """Rows of ``∂loss/∂W = Σ grad_yᵀ x`` over all uses of the layer, and all ranks of ``torch.distributed``.

    Args:
        pairs: x ``(..., in)`` and grad_y ``(..., out)`` of each use.
        shape: ``(out, in)``.
        like: gives device and dtype; float32 for the 16-bit types.
    """

    def __init__(self, pairs: Pairs, shape: tuple[int, int], like: Tensor) -> None:
        self.shape = shape
        self._zeros = like.new_zeros(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self._pairs = [(x.reshape(-1, shape[1]).to(self._zeros), g.reshape(-1, shape[0])) for x, g in pairs]

    def __call__(self, rows: slice) -> Tensor:
        """A new ``[len(rows), in]``. With several ranks, all of them must ask for the same rows."""
        total = self._zeros.new_zeros((len(range(*rows.indices(self.shape[0]))), self.shape[1]))
        for x, grad in self._pairs:
            total.addmm_(grad[:, rows].to(x).t(), x)
        if _distributed():
            dist.all_reduce(total)
        return total


class GradientRecorder:
    """Keeps what dense gradients are made of: the x and grad_y of each use of a layer in one training step.

    While it is not armed, nothing is hooked. While it is, code under ``torch.compile`` runs eagerly: hooks
    that come after compilation are not seen by it, and its compiled graphs stay valid for the steps that
    follow.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._pairs: dict[nn.Module, Pairs] = {layer: [] for layer in layers}
        self._stop: weakref.finalize[..., GradientRecorder] | None = None

    def arm(self) -> None:
        """Record from now on, until :meth:`disarm` or the recorder's end."""
        if self._stop is None:
            hook = _Hook(self._pairs)
            handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in self._pairs]
            self._stop = weakref.finalize(self, _stop_recording, handles)
            self._stop.atexit = False
            _run_eagerly()

    def disarm(self) -> None:
        """Stop recording and forget."""
        if self._stop is not None:
            self._stop()
            self._stop = None
            self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        for layer in self._pairs:
            self._pairs[layer] = []  # a new list: a late backward pass may still append to the old one

    def gradient(self, layer: nn.Module, shape: tuple[int, int], like: Tensor) -> DenseGradient | None:
        """The dense gradient of ``layer``, or None if no backward pass (on any rank) went through it."""
        pairs = self._pairs[layer]
        uses = len(pairs)
        if _distributed():
            counter = torch.tensor(uses, device=like.device)
            dist.all_reduce(counter)
            uses = int(counter)
        return DenseGradient(pairs, shape, like) if uses else None


class _Hook:
    """The forward hook of the layers."""

    def __init__(self, recorded: dict[nn.Module, Pairs]) -> None:
        self._recorded = recorded

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        pairs = self._recorded.get(layer)
        if pairs is not None and y.requires_grad:
            x = (args[0] if args else kwargs["x"]).detach()
            # Where y is a view, as for x of three dimensions, an operation in place on it (a ReLU, say) takes
            # the view out of the graph, but never the base.
            base = y if y._base is None else y._base
            base.register_hook(lambda grad: pairs.append((x, grad.detach())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ({},)  # a copied or saved model records nothing


def _stop_recording(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    _run_compiled()


# torch's compiler stance is one for the process: the first recorder to arm sets it, the last sets it back.
_stances: list[Any] = []


def _run_eagerly() -> None:
    if _stances:
        _stances.append(_stances[0])
    elif "torch._dynamo" in sys.modules:
        _stances.append(torch.compiler.set_stance("force_eager"))
    else:  # nothing is compiled, and to import the compiler takes seconds
        _stances.append(contextlib.nullcontext())


def _run_compiled() -> None:
    stance = _stances.pop()
    if not _stances:
        stance.__exit__(None, None, None)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
