"""sk.summary: counts, bytes, the backend that runs each layer and what it is predicted to gain."""

import pytest
import sparsekern as sk
import torch
from cases import MASKS, free
from sparsekern import _library, cost
from test_convert import mlp
from torch import nn

formats = pytest.mark.parametrize("format", MASKS)
needs_kernels = pytest.mark.skipif(
    _library.LOAD_ERROR is not None, reason=f"needs the native kernels: {_library.LOAD_ERROR}"
)


def test_summary_counts():
    model = sk.sparsify(mlp(), sparsity=0.9, exclude=["4"])
    summary = sk.summary(model)
    first, second, head = summary.rows
    assert (first.name, first.format, first.shape, first.nnz) == ("0", "csr", (70, 40), 280)
    assert first.sparsity == pytest.approx(0.9)
    assert first.value_bytes == 1120
    assert first.index_bytes == model[0].pattern.nbytes
    assert (head.format, head.nnz, head.index_bytes, head.backend) == ("dense", 330, 0, "torch")
    index = first.index_bytes + second.index_bytes
    assert summary.model_bytes == sum(p.nbytes for p in model.parameters()) + index
    assert summary.dense_bytes == sum(p.nbytes for p in sk.densify(model).parameters())


@formats
def test_summary_of_every_format(format):
    model = sk.sparsify(mlp(), sparsity=free(format, 0.6), format=format, exclude=["4"])
    for row, name in zip(sk.summary(model).rows, ("0", "3"), strict=False):
        layer = model.get_submodule(name)
        assert (row.name, row.format, row.nnz) == (name, format, int(layer.mask.sum()))
        assert row.value_bytes == layer.values.nbytes  # with the padding of blocks
        assert row.index_bytes == layer.pattern.nbytes
        assert row.speedup > 0
        assert (row.reason is None) == (row.backend == "native")


def test_summary_table():
    model = sk.sparsify(nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 10)), sparsity=0.95, exclude=["1"])
    model[0].backend = "reference"
    lines = str(sk.summary(model)).splitlines()
    header = ["layer", "format", "shape", "sparsity", "values", "index", "vs", "dense", "backend"]
    assert lines[0].split() == header
    assert lines[2].split()[:8] == ["0", "csr", "300", "x", "400", "95.00%", "24", "kB"]
    assert lines[2].endswith("reference")
    assert lines[3].split()[:6] == ["1", "dense", "10", "x", "300", "0.00%"]
    assert lines[5].startswith("total")
    assert lines[6].startswith("model ")
    assert repr(sk.summary(model)) == str(sk.summary(model))


def test_summary_says_why_a_layer_is_not_native():
    model = sk.sparsify(mlp(), sparsity=0.5).double()
    text = str(sk.summary(model))
    assert text.count("dense [1]") == 3
    assert text.splitlines()[-1].startswith("[1] it takes")


def test_summary_of_a_model_without_linear_layers():
    assert sk.summary(nn.ReLU()).rows == ()
    assert "total" in str(sk.summary(nn.ReLU()))


def predicted(layer, batch, strategy, *parts, size=None):
    """The time of some parts, with as many numbers as the layer has values."""
    size = size or layer.values.numel()
    seconds = cost.current().seconds
    return sum(seconds(strategy, torch.float32, part, layer.pattern.shape, size, batch) for part in parts)


@needs_kernels
@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("format", ["csr", "bsr16", "2:8"])
def test_the_gain_is_that_of_the_backend_that_runs(format, batch):
    layer = sk.SparseLinear(300, 400, sparsity=free(format, 0.6), format=format)
    gains = {}
    for layer.backend in ("auto", "native", "dense", "reference"):
        (row,) = sk.summary(layer, batch=batch).rows
        assert row.backend == layer.backend or layer.backend == "auto"
        gains[layer.backend] = row.speedup
    family, size = cost.family(layer.pattern), 300 * 400
    linear, forward, gradients = (
        predicted(layer, batch, "dense", *parts, size=size)
        for parts in (["linear"], ["forward"], ["backward_input", "backward_weight"])
    )
    copies = predicted(layer, 1, family, "scatter", size=size) + predicted(layer, 1, family, "gather")
    native = predicted(layer, batch, family, "forward", "backward")
    assert gains["native"] == pytest.approx((linear + gradients) / native)
    assert gains["dense"] == pytest.approx((linear + gradients) / (forward + gradients + copies))
    assert gains["auto"] >= cost.MARGIN * max(gains["native"], gains["dense"]) * (1 - 1e-9)
    assert gains["reference"] is None


@needs_kernels
def test_the_note_on_auto_makes_no_promise(monkeypatch):
    """Where native kernels are slow a layer runs dense, and takes longer than nn.Linear all the same."""
    seconds = {key: 1.0 if key.startswith("dense/") else 10.0 for key in cost.all_keys()}
    seconds |= {key: 4.0 for key in seconds if "/scatter/" in key or "/gather/" in key}
    profile = cost.Profile({key: [second, 0.0, 0.0, 0.0] for key, second in seconds.items()}, "a test")
    monkeypatch.setattr(cost, "current", lambda: profile)
    layer = sk.SparseLinear(64, 64, sparsity=0.5)
    summary = sk.summary(layer, batch=1)
    (row,) = summary.rows
    assert row.backend == "dense"
    assert row.speedup == pytest.approx(3 / 11)
    assert row.reason == "at batch 1 the native kernels alone are not predicted to be faster"
    assert f"[1] {row.reason}" in str(summary)


def test_a_backend_that_does_not_exist():
    layer = sk.SparseLinear(64, 64)
    layer.backend = "cutlass"
    (row,) = sk.summary(layer).rows
    assert (row.backend, row.speedup) == ("cutlass", None)
    assert row.reason.startswith("cannot run: backend must be one of ('auto', ")


def test_kept_copies_are_counted():
    layer = sk.SparseLinear(300, 200, sparsity=0.9)
    before = sk.summary(layer)
    assert before.rows[0].copy_bytes == 0
    assert "copies" not in str(before)
    layer.backend = "dense"
    with torch.no_grad():
        layer(torch.randn(3, 300))
    after = sk.summary(layer)
    kept = 200 * 300 * 4 + 200 * 38  # W, and a bit per weight in rows of whole bytes
    assert after.rows[0].copy_bytes == kept
    assert after.model_bytes == before.model_bytes + kept
    assert after.dense_bytes == before.dense_bytes
    assert "with 248 kB of dense copies" in str(after)


@pytest.mark.parametrize("batch", [0, -1, 1.5, "x", None, True, float("nan")])
def test_bad_batch(batch):
    with pytest.raises(ValueError, match=rf"batch must be a whole number of 1 or more, got {batch!r}"):
        sk.summary(mlp(), batch=batch)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        sk.summary([mlp()])
