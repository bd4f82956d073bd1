"""What all sparse-training methods share: the layers, the clock, the checkpoint; and the simplest of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..nn import SparseLinear


class Method:
    """A sparse-training method. Call :meth:`step` after each ``optimizer.step()``.

    Its clock counts the optimizer steps that really happened: one that ``GradScaler`` skipped is no step here
    either.

    Args:
        model: holds :class:`SparseLinear` layers; those whose values are frozen are left alone.
        optimizer: trains the values of these layers.
        total_steps: how many optimizer steps the whole training takes; schedules refer to it.

    Raises:
        ValueError: no trainable sparse layer, one that the optimizer does not train, or ``total_steps`` below
        1.

    >>> method = Static(model, optimizer, total_steps=1000)
    >>> for x, y in batches:
    ...     optimizer.zero_grad()
    ...     loss(model(x), y).backward()
    ...     optimizer.step()
    ...     method.step()
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, total_steps: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        check_count("total_steps", total_steps)
        self.layers: dict[str, SparseLinear] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SparseLinear) and module.values.requires_grad
        }
        if not self.layers:
            raise ValueError(
                "model must hold a SparseLinear that is trainable (sparsekern.sparsify makes them), "
                f"got none in {type(model).__name__}"
            )
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, layer in self.layers.items() if id(layer.values) not in trained]
        if missing:
            raise ValueError(
                f"optimizer must train the values of every sparse layer, but not those of {missing}: "
                "make it from model.parameters() after sparsify"
            )
        _check_ranks(self.layers)
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.step_count = 0
        """Optimizer steps so far."""
        self._stepped = False
        # The hook must not keep the method alive: one that is dropped gives back what it holds at once.
        hook = weakref.WeakMethod(self._after_optimizer)
        handle = optimizer.register_step_post_hook(
            lambda *call: None if (alive := hook()) is None else alive(*call)
        )
        weakref.finalize(self, handle.remove)

    def step(self) -> None:
        """Do what is due after an optimizer step; nothing if there was none since the last call."""
        stepped, self._stepped = self._stepped, False
        if stepped:
            self.step_count += 1
        self._advance(stepped)

    def metrics(self) -> dict[str, float]:
        """Numbers to log: ``sparsity/<layer>``."""
        return {f"sparsity/{name}": 1.0 - layer.density for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """With the state of model and optimizer, all that is needed to continue to the same bits."""
        return {"step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave: all of it, or nothing.

        Raises:
            ValueError: the state of another method, or with entries that cannot be.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(
                f"state must be that of {type(self).__name__}, with {sorted(expected)}, got {sorted(state)}"
            )
        check_count("step_count", state["step_count"], 0)
        self._check_state(state)
        self.step_count = state["step_count"]
        self._stepped = False

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if an entry of a state with the right names cannot be."""

    def _advance(self, stepped: bool) -> None:
        """What :meth:`step` does, after the clock has moved if ``stepped``."""

    def _is_due(self, step: int) -> bool:
        """Whether the mask changes after optimizer step number ``step`` (from 1)."""
        return False

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # GradScaler does not call an optimizer whose gradients overflowed, except a fused one: that skips on
        # the device, by this tensor. It is read only when it matters, as reading it waits for the GPU.
        found_inf = getattr(optimizer, "found_inf", None)
        self._stepped = found_inf is None or not self._is_due(self.step_count + 1) or not bool(found_inf)


def check_count(name: str, count: Any, least: int = 1) -> None:
    """Raise unless ``count`` is an int, no bool, of ``least`` or more."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {count!r}")


def _check_ranks(layers: dict[str, SparseLinear]) -> None:
    """Raise unless every rank of ``torch.distributed`` has the same patterns: DDP sends parameters only."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for name, layer in layers.items():
        index = layer.pattern.flat_index().reshape(-1)
        weight = torch.arange(index.numel(), device=index.device) % 65521 + 1
        sums = torch.stack([index.sum(), (index * weight).sum(), index.new_tensor(index.numel())])
        least, most = sums.clone(), sums
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise ValueError(
                f"every rank must have the same pattern in layer {name!r}, got different ones: "
                "seed all ranks alike before the model is made, or load one state_dict on all of them"
            )


class Static(Method):
    """The masks stay as they are: random from ``SparseLinear(...)``, or given to ``from_dense``."""
