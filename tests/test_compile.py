"""torch.compile and torch.export: whole graphs, any batch, no recompilation by mask updates."""

import io

import pytest
import sparsekern as sk
import torch
from cases import MASKS, free
from sparsekern.formats import parse_format
from tolerance import assert_product
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

formats = pytest.mark.parametrize("format", MASKS)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset() leaves them


def make(format, bias=True, size=(70, 100)):
    """Native in both worlds: ``"auto"`` may choose otherwise for an eager call than for a graph."""
    layer = sk.SparseLinear(*size, bias, sparsity=free(format, 0.7), format=format)
    layer.backend = "native"
    return layer


def step(layer, x):
    """y and all gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]


def assert_same(compiled, eager, x):
    assert all(torch.equal(a, b) for a, b in zip(step(compiled, x), step(eager, x), strict=True))


@pytest.mark.parametrize("bias", [True, False])
@formats
def test_one_graph_serves_every_batch(format, bias):
    layer = make(format, bias)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch in (37, 2, 17, 64, 200):  # 37 is no size of a pattern: torch takes equal sizes for one
        assert_same(compiled, layer, torch.randn(batch, 70))
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(70,), (1, 70), (0, 70), (3, 4, 70)], ids=str)
@formats
def test_other_shapes(format, shape):
    layer = make(format)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(compiled, layer, torch.randn(shape))


@formats
def test_feature_major(format):
    layer = make(format)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (5, 17):
        x = torch.randn(70, batch).t()
        assert_same(compiled, layer, x)
        assert compiled(x).stride() == layer(x).stride() == (1, batch)


@formats
def test_a_new_pattern_of_equal_size_compiles_nothing(format):
    layer = make(format)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(8, 70)
    for _ in range(3):
        mask = parse_format(format).prune(torch.rand(100, 70), free(format, 0.7))
        layer.set_pattern(mask)
        with torch.no_grad():
            layer.values.normal_()
        assert_same(compiled, layer, x)
    assert counter.frame_count == 1


@formats
def test_a_new_pattern_of_another_size(format):
    layer = make(format)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 70)
    for sparsity in (0.7, 0.5, 0.0):
        layer.set_pattern(parse_format(format).prune(torch.rand(100, 70), free(format, sparsity)))
        assert_same(compiled, layer, x)


@formats
def test_several_layers_share_one_graph(format):
    model = nn.Sequential(make(format), nn.ReLU(), make(format, size=(100, 10)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (37, 59):
        assert_same(compiled, model, torch.randn(batch, 70))
    assert counter.frame_count == 1


@formats
def test_autocast(format):
    layer = make(format)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu"):
        assert_same(compiled, layer, torch.randn(6, 70))
        assert compiled(torch.randn(6, 70)).dtype == torch.bfloat16


@formats
def test_inductor(format):
    """The layer alone: what a g++ at run time would compile around it is torch's own."""
    layer = make(format)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (37, 59):
        assert_same(compiled, layer, torch.randn(batch, 70))
        assert_same(compiled, layer, torch.randn(70, batch).t())


@formats
def test_float64_compiles_to_the_dense_product(format):
    layer = make(format).double()
    layer.backend = "auto"
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(compiled, layer, torch.randn(6, 70, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@formats
def test_auto(format, dtype):
    """The choice depends on the number of values, which torch compiles once more for; never on the batch."""
    layer = make(format).to(dtype)
    layer.backend = "auto"
    weight = layer.pattern.scatter
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch in (37, 2, 64):
        x, grad = torch.randn(batch, 70).to(dtype).requires_grad_(), torch.randn(batch, 100).to(dtype)
        y = compiled(x)
        assert_product(y, lambda x, v, b: x @ weight(v).t() + b, x, layer.values, layer.bias)
        assert_product(
            torch.autograd.grad(y, (x, layer.values, layer.bias), grad),
            lambda g, x, v: (g @ weight(v), layer.pattern.gather(g.t() @ x), g.sum(0)),
            *(grad, x, layer.values),
        )
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [True, False])
@formats
def test_export(format, strict):
    layer = make(format)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(4, 70),), dynamic_shapes=({0: batch},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 33):
        x = torch.randn(size, 70)
        assert torch.equal(program.module()(x), layer(x))
        assert torch.equal(loaded(x), layer(x))
