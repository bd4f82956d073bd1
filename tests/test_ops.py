"""``sparsekern.linear`` and its gradients: shapes, backends, autocast, torch.func, opcheck."""

from functools import partial

import pytest
import sparsekern as sk
import torch
from cases import DTYPES, LAYOUTS, MASKS, op, random_pattern, where
from sparsekern.formats import parse_format
from tolerance import Exact, assert_product
from torch.library import opcheck

formats = pytest.mark.parametrize("format", MASKS)
one_per_op = pytest.mark.parametrize("format", {parse_format(f).kind: f for f in MASKS}.values())


def make(format, shape=(100, 70), density=0.3, dtype=torch.float32):
    """A pattern, values and bias."""
    pattern = random_pattern(format, shape, density)
    values = torch.randn(pattern.values_shape).to(dtype).requires_grad_()
    return pattern, values, torch.randn(shape[0]).to(dtype).requires_grad_()


def gradients(x, values, bias, grad, pattern, backend="native"):
    """y and the gradients of x, values and bias."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, values, bias)]
    y = sk.linear(*inputs[:2], pattern, inputs[2], backend=backend)
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 33])
@formats
def test_forward_and_gradients(format, batch, dtype, layout):
    pattern, values, bias = make(format, dtype=dtype)
    x, grad = (LAYOUTS[layout](torch.randn(batch, size).to(dtype)) for size in (70, 100))
    got = gradients(x, values, bias, grad, pattern, backend="native")
    assert_product(
        got,
        lambda x, v, b, g: (
            x @ pattern.scatter(v).t() + b,
            g @ pattern.scatter(v),
            pattern.gather(g.t() @ x),
            g.sum(0),
        ),
        *(x, values, bias, grad),
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (5, 70), (2, 3, 70), (4, 0, 70), (2, 1, 3, 70)], ids=str)
@formats
def test_leading_dimensions(format, shape, backend):
    pattern, values, bias = make(format)
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 100)
    flat = gradients(x.reshape(-1, 70), values, bias, grad.reshape(-1, 100), pattern, backend)
    y, grad_x, *rest = gradients(x, values, bias, grad, pattern, backend)
    assert y.shape == (*shape[:-1], 100)
    assert grad_x.shape == shape
    if backend == "native":
        assert torch.equal(y, flat[0].view(y.shape))
        assert torch.equal(grad_x, flat[1].view(shape))
        assert all(torch.equal(a, b) for a, b in zip(rest, flat[2:], strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("leading", [(3,), (40,), (), (2, 3)], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
@formats
def test_weights_without_elements(format, shape, leading, backend):
    pattern, values, bias = make(format, shape, 0.0)
    x, grad = torch.randn(*leading, shape[1]), torch.randn(*leading, shape[0])
    y, grad_x, _, grad_bias = gradients(x, values, bias, grad, pattern, backend)
    assert torch.equal(y, bias.expand(*leading, shape[0]))
    assert torch.equal(grad_x, torch.zeros_like(x))
    assert grad_bias.shape == bias.shape


def strange_strides():
    base = torch.randn(140, 140)
    return {
        "both above 1": base[:14:2, ::2],
        "rows reversed in memory": base[:7, :70].flip(0).t().t(),
        "one row repeated": base[:1, :70].expand(7, 70),
        "one column repeated": base[:7, :1].expand(7, 70),
        "overlapping rows": base.view(-1).as_strided((7, 70), (3, 1)),
        "overlapping columns": base.view(-1).as_strided((7, 70), (1, 3)),
        "every fifth column": base.view(-1).as_strided((7, 70), (400, 5)),
        "one number": base[:1, :1].expand(7, 70),
        "a batch of one, strided": base[:1, ::2],
    }


@pytest.mark.parametrize("name", strange_strides())
@formats
def test_any_strides(format, name):
    pattern, values, bias = make(format)
    x = strange_strides()[name]
    grad = torch.randn(x.shape[0], 100)
    got = gradients(x, values, bias, grad, pattern, "native")
    plain = gradients(x.contiguous().clone(), values, bias, grad, pattern, "native")
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "backward",
    [
        lambda y: y.sum(),  # stride 0 twice
        lambda y: y.sum(0)[3],
        lambda y: y.mean(1).sum(),
        lambda y: y[:, ::2].sum(),
        lambda y: y.t().reshape(-1)[5:500].sum(),
    ],
)
@formats
def test_gradients_with_any_strides(format, backward):
    pattern, values, bias = make(format)
    x = torch.randn(7, 70, requires_grad=True)
    y = sk.linear(x, values, pattern, bias, backend="native")
    (grad,) = torch.autograd.grad(backward(y), y, retain_graph=True)
    got = torch.autograd.grad(backward(y), (x, values, bias))
    expected = gradients(x, values, bias, grad.contiguous(), pattern, "native")[1:]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)], ids=str
)
@formats
def test_only_what_requires_grad_gets_one(format, needed):
    pattern, values, bias = make(format)
    inputs = [torch.randn(7, 70), values, bias]
    inputs = [t.detach().requires_grad_(bool(n)) for t, n in zip(inputs, needed, strict=True)]
    everything = gradients(*inputs, torch.ones(7, 100), pattern)[1:]
    sk.linear(inputs[0], inputs[1], pattern, inputs[2], backend="native").backward(torch.ones(7, 100))
    for tensor, n, grad in zip(inputs, needed, everything, strict=True):
        assert torch.equal(tensor.grad, grad) if n else tensor.grad is None


@pytest.mark.parametrize("backend", ["native", "dense", "reference"])
@formats
def test_no_grad(format, backend):
    pattern, values, bias = make(format)
    x = torch.randn(7, 70)
    y = sk.linear(x, values, pattern, bias, backend=backend)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            z = sk.linear(x, values, pattern, bias, backend=backend)
            assert torch.equal(y, z)
            assert not z.requires_grad
    assert not sk.linear(x, values.detach(), pattern).requires_grad


@pytest.mark.parametrize("bias", [True, False])
@formats
def test_gradcheck_of_the_reference(format, bias):
    pattern, *inputs = make(format, (6, 5), 0.5, torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def function(x, values, b=None):
        return sk.linear(x, values, pattern, b, backend="reference")

    inputs = (x, *inputs) if bias else (x, inputs[0])
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def second_derivatives(pattern, backend, *tensors):
    """Gradients of ``u·dx + v·dW + w·db`` with respect to grad, x and values."""
    x, values, bias, grad, u, v, w = (tensor.detach().requires_grad_() for tensor in tensors)
    y = sk.linear(x, values, pattern, bias, backend=backend)
    first = torch.autograd.grad(y, (x, values, bias), grad, create_graph=True)
    return torch.autograd.grad(first, (grad, x, values), (u, v, w))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 9, 70])
@formats
def test_second_derivatives(format, batch, layout):
    pattern, values, bias = make(format, (50, 40))
    lay = LAYOUTS[layout]
    x, grad, u = (lay(torch.randn(batch, size)) for size in (40, 50, 40))
    inputs = (x, values, bias, grad, u, torch.randn_like(values), torch.randn_like(bias))
    got = second_derivatives(pattern, "native", *inputs)
    assert_product(got, lambda *inputs: second_derivatives(pattern, "reference", *inputs), *inputs)


@formats
def test_gradients_of_the_gradients_own_ops(format):
    """With these, derivatives of any order are right."""
    pattern, values, _ = make(format)
    x, grad = torch.randn(9, 70), torch.randn(9, 100)

    def differentiate(function, u, *tensors):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(*tensors), tensors, u)

    u = torch.randn(9, 70)
    got = differentiate(
        lambda g, v: op(pattern, "linear_backward_input")(g, v, *where(pattern)), u, grad, values
    )
    expected = partial(differentiate, lambda g, v: g @ pattern.scatter(v))
    assert_product(got, expected, u, grad, values)

    u = torch.randn(pattern.values_shape)
    got = differentiate(lambda g, x: op(pattern, "linear_backward_weight")(g, x, *where(pattern)), u, grad, x)
    expected = partial(differentiate, lambda g, x: pattern.gather(g.t() @ x))
    assert_product(got, expected, u, grad, x)


@pytest.mark.parametrize(
    ("dtype", "layout", "batch"),
    [
        *((dtype, layout, 5) for dtype in DTYPES for layout in ("batch-major", "padded feature-major")),
        (torch.float32, "batch-major", 1),
        (torch.float32, "batch-major", 0),
    ],
)
@one_per_op
def test_opcheck(format, dtype, layout, batch):
    pattern, values, bias = make(format, dtype=dtype)
    x, grad = (LAYOUTS[layout](torch.randn(batch, size).to(dtype)).requires_grad_() for size in (70, 100))
    at = where(pattern)
    opcheck(op(pattern, "linear"), (x, values, bias, *at))
    opcheck(op(pattern, "linear"), (x, values, None, *at))
    detached = (x.detach(), values.detach(), bias.detach())
    opcheck(op(pattern, "linear"), (*detached, *at), {"activation": 2})
    opcheck(op(pattern, "linear_backward_input"), (grad, values, *at))
    opcheck(op(pattern, "linear_backward_weight"), (grad, x, *at))
    for need in ((True, True, True), (True, False, False), (False, True, True), (False, False, False)):
        opcheck(op(pattern, "linear_backward"), (grad, x, values, *at, *need))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@one_per_op
def test_opcheck_of_scatter_and_gather(format, dtype):
    pattern, values, _ = make(format, dtype=dtype)
    opcheck(op(pattern, "scatter"), (values, *where(pattern)))
    dense = torch.randn(100, 70).to(dtype).requires_grad_()
    opcheck(op(pattern, "gather"), (dense, *where(pattern)))


ACTIVATIONS = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("backend", ["native", "dense", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 5, 33, 130])
@pytest.mark.parametrize("name", ACTIVATIONS)
@formats
def test_activation(format, name, batch, dtype, backend):
    """Where no gradient is asked for it is fused into the product."""
    pattern, values, bias = make(format, dtype=dtype)
    x = torch.randn(batch, 70).to(dtype)
    y = sk.linear(x, values, pattern, bias, activation=name, backend=backend)
    with torch.no_grad():
        fused = sk.linear(x, values, pattern, bias, activation=name, backend=backend)
    exact = Exact(lambda x, v, b: x @ pattern.scatter(v).t() + b, x, values, bias)
    exact.check_activated(ACTIVATIONS[name], y, "not fused")
    exact.check_activated(ACTIVATIONS[name], fused, "fused")


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["native", "dense", "reference"])
@formats
def test_gradients_through_an_activation(format, backend, name):
    pattern, values, bias = make(format)
    x, grad = torch.randn(7, 70, requires_grad=True), torch.randn(7, 100)
    inputs = (x, values, bias)
    got = torch.autograd.grad(
        sk.linear(x, values, pattern, bias, activation=name, backend=backend), inputs, grad
    )
    y = ACTIVATIONS[name](sk.linear(x, values, pattern, bias, backend=backend))
    for a, b in zip(got, torch.autograd.grad(y, inputs, grad), strict=True):
        assert torch.equal(a, b)
