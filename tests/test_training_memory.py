"""Sparse storage: no tensor of the dense weight's size exists in a training step, mask updates included."""

import weakref

import pytest
import sparsekern as sk
import torch
from sparsekern import _library
from sparsekern.training import SET, RigL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OUT, IN, BATCH, SPARSITY = 512, 768, 32, 0.95
DENSE_BYTES = OUT * IN * 4


class Allocations(TorchDispatchMode):
    """Sees the result of every operation: the largest storage, and the most bytes that live at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.live = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):  # what was there before is not counted
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage())
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                weakref.finalize(storage, self._freed, size)
                self.live += size
                self.peak = max(self.peak, self.live)
                self.largest = max(self.largest, size)
        return result

    def _freed(self, size):
        self.live -= size


def measure(kind, backend):
    layer = sk.SparseLinear(IN, OUT, sparsity=SPARSITY)
    layer.backend = backend
    optimizer = torch.optim.AdamW(layer.parameters())
    method = kind(layer, optimizer, total_steps=100, update_every=2)

    def step():
        optimizer.zero_grad()
        layer(torch.randn(BATCH, IN)).square().sum().backward()
        optimizer.step()
        method.step()

    step()  # makes the optimizer's state
    with Allocations() as allocations:
        step()
    assert method.churn[""] > 0
    return allocations


@pytest.mark.skipif(
    _library.LOAD_ERROR is not None, reason=f"needs the native kernels: {_library.LOAD_ERROR}"
)
@pytest.mark.parametrize("kind", [SET, RigL])
def test_a_step_with_an_update_stays_far_below_the_dense_weight(kind):
    allocations = measure(kind, "native")
    assert allocations.largest <= DENSE_BYTES / 8
    # All that lives at once, gradients and activations included: mostly int64 tensors of nnz elements, of
    # 8 bytes each, while the transposed index of the new pattern is made.
    assert allocations.peak <= 100 * round(OUT * IN * (1 - SPARSITY))


def test_the_measurement_sees_a_dense_weight():
    assert measure(RigL, "reference").largest >= DENSE_BYTES
