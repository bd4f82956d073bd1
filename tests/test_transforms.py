"""Layers under what torch wraps around modules: autocast, torch.func, checkpoints, hooks, forward AD."""

import pytest
import sparsekern as sk
import torch
from cases import MASKS, free
from tolerance import assert_product
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

formats = pytest.mark.parametrize("format", MASKS)


def make(format="csr", **options):
    return sk.SparseLinear(70, 100, sparsity=free(format, 0.7), format=format, **options)


# --- autocast ---


@formats
def test_autocast(format):
    layer = make(format)
    x = torch.randn(7, 70, requires_grad=True)
    with torch.autocast("cpu"):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, sk.linear(x.bfloat16(), layer.values.bfloat16(), layer.pattern, layer.bias.bfloat16())
    )
    y.float().square().sum().backward()
    for tensor in (x, layer.values, layer.bias):
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.shape == tensor.shape
    grad = 2 * y.detach().float()
    assert_product(
        (x.grad.bfloat16(), layer.bias.grad.bfloat16()),
        lambda g, v: (g @ layer.pattern.scatter(v), g.sum(0)),
        *(grad.bfloat16(), layer.values.bfloat16()),
    )


@pytest.mark.parametrize("inside", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@formats
def test_autocast_treats_dtypes_as_it_does_for_a_dense_layer(format, autocast, inside):
    sparse = make(format).to(inside)
    dense = sparse.to_dense()
    with torch.autocast("cpu", dtype=autocast):
        x = torch.randn(3, 70, dtype=inside)
        assert sparse(x).dtype == dense(x).dtype
    with torch.autocast("cpu", dtype=autocast, enabled=False):
        assert sparse(x).dtype == inside


@formats
def test_autocast_in_a_model(format):
    model = nn.Sequential(make(format), nn.LayerNorm(100), nn.ReLU(), nn.Linear(100, 70), make(format))
    with torch.autocast("cpu"):
        loss = nn.functional.mse_loss(model(torch.randn(5, 70)).float(), torch.randn(5, 100))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


# --- torch.func ---


@formats
def test_func_grad(format):
    layer = make(format)
    x = torch.randn(7, 70)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, x).sum()

    got = torch.func.grad(loss)(dict(layer.named_parameters()))
    layer(x).sum().backward()
    ones = torch.ones(7, 100)
    assert_product(
        (got["values"], got["bias"]), lambda g, x: (layer.pattern.gather(g.t() @ x), g.sum(0)), ones, x
    )
    assert_product(layer.values.grad, lambda g, x: layer.pattern.gather(g.t() @ x), ones, x)


@formats
def test_vmap_jvp_and_jacrev(format):
    layer = make(format, bias=False)
    weight = layer.pattern.scatter
    x, tangent = torch.randn(7, 70), torch.randn(7, 70)

    def product(x, v):
        return x @ weight(v).t()

    assert_product(torch.vmap(layer)(x), product, x, layer.values)
    _, got = torch.func.jvp(layer, (x,), (tangent,))
    assert_product(got, product, tangent, layer.values)
    assert torch.equal(torch.func.jacrev(layer)(x[0]), weight(layer.values))


@formats
def test_func_says_why_native_kernels_cannot_run(format):
    layer = make(format)
    layer.backend = "native"
    with pytest.raises(ValueError, match=r'backend="native" cannot run: torch\.func transforms'):
        torch.vmap(layer)(torch.randn(7, 70))


@formats
def test_batched_gradients_are_right_or_refused(format):
    layer = make(format)
    x = torch.randn(2, 70, requires_grad=True)
    grads = torch.randn(4, 2, 100)
    try:
        (got,) = torch.autograd.grad(layer(x), x, grads, is_grads_batched=True)
    except RuntimeError as error:
        refusal = str(error)
    else:
        assert_product(got, lambda g, v: g @ layer.pattern.scatter(v), grads, layer.values)
        return
    assert "Batching rule not implemented" in refusal


@pytest.mark.parametrize("grad_mode", [True, False])
@formats
def test_forward_ad_is_right_or_refused(format, grad_mode):
    """Under no_grad too: torch computes tangents there as well."""
    layer = make(format)
    x, tangent = torch.randn(2, 70), torch.randn(2, 70)
    with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
        try:
            y = layer(forward_ad.make_dual(x, tangent))
        except NotImplementedError:
            return
        got = forward_ad.unpack_dual(y).tangent
    assert got is not None, "the tangent is lost"
    assert_product(got, lambda t, v: t @ layer.pattern.scatter(v).t(), tangent, layer.values)


# --- others ---


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", ["native", "dense"])
@formats
def test_activation_checkpointing(format, backend, use_reentrant):
    """The backward pass runs the forward pass again: torch's own ops between the layers must record it.

    "auto" may choose other kernels for a forward pass without gradients, as it is the first time.
    """
    model = nn.Sequential(make(format), nn.ReLU(), nn.Linear(100, 70), nn.Tanh(), make(format))
    model[0].backend = model[-1].backend = backend
    x = torch.randn(7, 70, requires_grad=True)
    parameters = (x, *model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(parameters, expected, strict=True))


@formats
def test_saved_tensor_hooks(format):
    layer = make(format)
    x = torch.randn(7, 70, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@formats
def test_a_saved_tensor_that_changed_is_noticed(format):
    layer = make(format)
    y = layer(torch.randn(7, 70, requires_grad=True))
    with torch.no_grad():
        layer.values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@formats
def test_meta_tensors(format):
    layer = make(format).to("meta")
    x = torch.randn(3, 7, 70, device="meta", requires_grad=True)
    y = layer(x)
    assert y.shape == (3, 7, 100)
    assert y.device.type == "meta"
    y.sum().backward()
    assert layer.values.grad.shape == layer.values.shape
    assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@formats
def test_anomaly_mode_and_hooks(format):
    layer = make(format)
    seen = []
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append((grad_in, grad_out)))
    layer.values.register_post_accumulate_grad_hook(lambda values: seen.append(values.grad.shape))
    with torch.autograd.detect_anomaly(check_nan=True):
        layer(torch.randn(2, 70, requires_grad=True)).sum().backward()
    assert len(seen) == 2
