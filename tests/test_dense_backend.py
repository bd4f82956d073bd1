"""The dense strategy: the same results and gradients, and a copy of W that is never out of date."""

import gc
import itertools
import weakref
from functools import partial

import pytest
import sparsekern as sk
import torch
from cases import DTYPES, LAYOUTS, MASKS, op, random_pattern, where
from sparsekern import copies, dense
from sparsekern.formats import parse_format
from tolerance import assert_product
from torch.utils.checkpoint import checkpoint

formats = pytest.mark.parametrize("format", MASKS)


def make(format, shape=(100, 70), dtype=torch.float32):
    pattern = random_pattern(format, shape, 0.5)
    return pattern, torch.randn(pattern.values_shape).to(dtype).requires_grad_()


NATIVE, DENSE, MASK = dense.By
# All without masks; with them, the three kinds in each order, masks alone, and pairs.
PLANS = [dense.Plan(*kinds) for kinds in itertools.product((NATIVE, DENSE), repeat=3)]
PLANS += [
    dense.Plan(*kinds)
    for kinds in itertools.product(dense.By, repeat=3)
    if MASK in kinds and len({*kinds}) != 2
]
PLANS += [dense.Plan(MASK, MASK, DENSE), dense.Plan(DENSE, MASK, MASK), dense.Plan(NATIVE, MASK, MASK)]


def name(plan):
    return "-".join(by.value for by in plan)


plans = pytest.mark.parametrize("plan", PLANS, ids=name)
plans_of_formats = pytest.mark.parametrize(
    ("format", "plan"),
    [  # blocks have no mask
        pytest.param(format, plan, id=f"{format}-{name(plan)}")
        for format, plan in itertools.product(MASKS, PLANS)
        if MASK not in plan or parse_format(format).kind.format != "bsr"
    ],
)


@plans_of_formats
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_plan(format, layout, plan):
    """Parts of all kinds side by side give y and the gradients, whichever are asked for."""
    pattern, values = make(format)
    x, grad = (LAYOUTS[layout](torch.randn(7, size)) for size in (70, 100))
    x, bias = x.requires_grad_(), torch.randn(100, requires_grad=True)
    inputs = (x, values, bias)

    def products(x, v, b, g):
        return x @ pattern.scatter(v).t() + b, g @ pattern.scatter(v), pattern.gather(g.t() @ x), g.sum(0)

    y = dense.planned_linear(x, values, bias, pattern, plan)
    assert y.stride() == ((1, 7) if "feature-major" in layout else (100, 1))
    got = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    assert_product((y, *got), products, *inputs, grad)
    for wanted in ([x], [values], [bias], [x, bias], [values, bias]):
        some = [tensor.detach().requires_grad_(any(tensor is w for w in wanted)) for tensor in inputs]
        y = dense.planned_linear(*some, pattern, plan)
        asked = [tensor for tensor in some if tensor.requires_grad]
        for gradient, tensor in zip(torch.autograd.grad(y, asked, grad), asked, strict=True):
            full = got[next(i for i, s in enumerate(some) if s is tensor)]
            torch.testing.assert_close(gradient, full)


@plans
def test_plans_under_checkpointing(plan):
    """There saved tensors may be asked for once."""
    pattern, values = make("csr")
    x = torch.randn(7, 70, requires_grad=True)
    expected = torch.autograd.grad(
        dense.planned_linear(x, values, None, pattern, plan).square().sum(), (x, values)
    )
    y = checkpoint(dense.planned_linear, x, values, None, pattern, plan, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), (x, values))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@plans_of_formats
def test_second_derivatives_of_every_plan(format, plan):
    pattern, values = make(format)
    x, grad, u = torch.randn(5, 70), torch.randn(5, 100), torch.randn(5, 70)
    inputs = (x, values.detach(), grad, u, torch.randn(pattern.values_shape))

    def second(linear, *inputs):
        x, values, grad, u, v = (tensor.detach().requires_grad_() for tensor in inputs)
        first = torch.autograd.grad(linear(x, values), (x, values), grad, create_graph=True)
        return torch.autograd.grad(first, (grad, x, values), (u, v))

    got = second(lambda x, v: dense.planned_linear(x, v, None, pattern, plan), *inputs)
    assert_product(got, lambda *exact: second(lambda x, v: x @ pattern.scatter(v).t(), *exact), *inputs)


def call(x, values, pattern, bias=None):
    return sk.linear(x, values, pattern, bias, backend="dense")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
@formats
def test_results_and_gradients(format, dtype):
    pattern, values = make(format, dtype=dtype)
    x, bias = torch.randn(7, 70).to(dtype).requires_grad_(), torch.randn(100).to(dtype).requires_grad_()
    grad = torch.randn(7, 100).to(dtype)
    y = call(x, values, pattern, bias)
    got = (y, *torch.autograd.grad(y, (x, values, bias), grad))

    def products(x, v, b, g):
        return x @ pattern.scatter(v).t() + b, g @ pattern.scatter(v), pattern.gather(g.t() @ x), g.sum(0)

    assert_product(got, products, x, values, bias, grad)


@formats
def test_second_derivatives(format):
    pattern, values = make(format, (6, 5), torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    function = partial(call, pattern=pattern)
    assert torch.autograd.gradcheck(function, (x, values), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, values), fast_mode=True)


@formats
def test_scatter_and_gather(format):
    """The ops against torch's indexing, at ragged edges too."""
    for shape in ((1, 1), (100, 70), (333, 129), (64, 128)):
        pattern, values = make(format, shape)
        values = pattern.zero_padding_(values.detach())
        again = pattern.zero_padding_(torch.randn_like(values))
        assert torch.equal(copies.scatter(again, pattern, None), pattern.scatter(again))
        assert torch.equal(copies.gather(pattern.scatter(again), pattern), again)
        dense_weight = op(pattern, "scatter")(values, *where(pattern))
        assert torch.equal(dense_weight, pattern.scatter(values))
        other = torch.randn(shape)
        assert torch.equal(op(pattern, "gather")(other, *where(pattern)), pattern.gather(other))


def copy_of(values, pattern, dtype=torch.float32, whole=False):
    if whole:
        return copies.leased_weight_of(values, pattern, dtype)[0]
    return copies.weight_of(values, pattern, dtype)


def count_scatters(monkeypatch):
    """A list that grows with each time that W is made."""
    made, expand = [], copies.scatter
    monkeypatch.setattr(copies, "scatter", lambda *args: (made.append(1), expand(*args))[1])
    return made


@pytest.mark.parametrize("whole", [False, True])
@formats
def test_the_copy_is_kept_while_values_stay(format, whole, monkeypatch):
    pattern, values = make(format)
    x = torch.randn(3, 70)
    first = call(x, values, pattern)
    call(x, values, pattern)  # the second time, what to compare is taken down
    copy = copy_of(values, pattern, whole=whole)
    scatters = count_scatters(monkeypatch)
    assert torch.equal(call(x, values, pattern), first)
    assert copy_of(values, pattern, whole=whole) is copy
    assert copy_of(values.detach(), pattern, whole=whole) is copy  # another tensor, the same memory
    assert not scatters
    bits = 0 if format.startswith("bsr") else 100 * 9  # of 70 columns
    assert copies.kept_bytes(pattern) == copy.nbytes + bits
    with torch.no_grad():
        values.mul_(2.0)
    assert torch.equal(copy_of(values, pattern, whole=whole), pattern.scatter(values))
    assert len(scatters) == 1
    assert_product(call(x, values, pattern), lambda x, v: x @ pattern.scatter(v).t(), x, values)


@pytest.mark.parametrize("recorded", [False, True])
@formats
def test_the_copy_follows_what_counts_no_version(format, recorded):
    """``.data`` and another pattern change W, and not the version of the values."""
    pattern, values = make(format)
    x = torch.randn(3, 70)

    def check(pattern):
        with torch.set_grad_enabled(recorded):
            assert_product(call(x, values, pattern), lambda x, v: x @ pattern.scatter(v).t(), x, values)

    check(pattern)
    values.data.mul_(2.0)
    check(pattern)
    values.data = torch.randn_like(values)
    check(pattern)
    if format == "csr":
        check(sk.CSR.from_mask(pattern.to_mask().flip(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@formats
def test_a_single_value_is_noticed_where_gradients_are_recorded(format, dtype):
    pattern, values = make(format, (64, 130), dtype)
    values = values.detach()
    x = torch.randn(3, 130).to(dtype).requires_grad_()
    index = pattern.flat_index().reshape(-1)
    real = (index < 64 * 130).nonzero().flatten()
    for at in (real[0], real[-1], real[torch.randint(len(real), ())]):
        call(x, values, pattern)
        values.data.view(-1)[at] += 100.0
        assert_product(call(x, values, pattern), lambda x, v: x @ pattern.scatter(v).t(), x, values)


@pytest.mark.parametrize("format", ["csr", "2:4"])
def test_values_that_are_the_whole_weight_are_not_copied(format):
    pattern = sk.CSR.from_mask(torch.ones(9, 8, dtype=torch.bool))
    if format != "csr":
        pattern = parse_format("8:8").from_mask(torch.ones(9, 8, dtype=torch.bool))
    values = torch.randn(pattern.values_shape, requires_grad=True)
    assert copy_of(values, pattern).data_ptr() == values.data_ptr()
    x, grad = torch.randn(5, 8, requires_grad=True), torch.randn(5, 9)
    y = call(x, values, pattern)
    got = (y, *torch.autograd.grad(y, (x, values), grad))

    def products(x, v, g):
        return x @ pattern.scatter(v).t(), g @ pattern.scatter(v), pattern.gather(g.t() @ x)

    assert_product(got, products, x, values, grad)


@pytest.mark.parametrize("backend", ["dense", "native"])
@formats
def test_autocast_keeps_one_copy(format, backend):
    pattern, values = make(format)
    x = torch.randn(5, 70, requires_grad=True)
    grad = torch.randn(5, 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = sk.linear(x, values, pattern, backend=backend)
        assert y.dtype == torch.bfloat16
        if backend == "dense":
            copy = copy_of(values, pattern, torch.bfloat16)
            sk.linear(x, values, pattern, backend=backend)
            assert copy_of(values, pattern, torch.bfloat16) is copy
    got = (y, *torch.autograd.grad(y, (x, values), grad))
    assert got[1].dtype == got[2].dtype == torch.float32

    def products(x, v, g):
        return x @ pattern.scatter(v).t(), g @ pattern.scatter(v), pattern.gather(g.t() @ x)

    halves = [tensor.detach().bfloat16() for tensor in (x, values)]
    assert_product([t.bfloat16() for t in got], products, *halves, grad)


def test_a_step_that_is_still_to_go_back_keeps_its_copy():
    """W is written into memory that is kept, but not under a graph that will read it."""
    pattern, values = make("csr")
    x, grad = torch.randn(3, 70, requires_grad=True), torch.randn(3, 100)

    def gradient():
        return torch.autograd.grad(call(x, values.detach().clone(), pattern), x, grad)[0]

    call(x, values, pattern)
    memory = copy_of(values, pattern, whole=True).data_ptr()
    with torch.no_grad():
        values.mul_(2.0)
    assert copy_of(values, pattern, whole=True).data_ptr() == memory
    y = call(x, values.detach(), pattern)
    expected = gradient()
    values.data.zero_()
    assert not call(x, values.detach(), pattern).any()
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)


@formats
def test_a_call_that_was_looked_at_is_looked_at_again_where_anything_changed(format):
    """Inference goes on with what it knows of an equal call before: other tensors and modes are none."""
    pattern, values = make(format)
    values, bias, x = values.detach(), torch.randn(100), torch.randn(3, 70)
    pad = pattern.zero_padding_

    def check(x=x, values=values, bias=bias):
        for _ in range(2):
            y = call(x, values, pattern, bias)
            assert_product(y, lambda x, v, b: x @ pattern.scatter(v).t() + b, x, values, bias)

    with torch.no_grad():
        check()
        assert pattern.memo["ready", "dense"].serves(x, values, bias, pattern)
        check(values=pad(torch.randn_like(values)))
        check()  # W's memory held other values in between
        check(bias=torch.randn(100))
        check(x=torch.randn(5, 70).t().contiguous().t())
        check(*(tensor.bfloat16() for tensor in (x, values, bias)))
        values.mul_(2.0)
        check()
        values.data = pad(torch.randn_like(values))
        check()
        values.data.mul_(3.0)
        check()
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x, values, pattern, bias).dtype == torch.bfloat16
        check()
        for wrong in (x[:, 1:], x.double(), x.long()):
            with pytest.raises(ValueError, match="must"):
                call(wrong, values, pattern, bias)
    check(x=x.requires_grad_())


def test_the_copy_goes_with_the_pattern():
    pattern, values = make("csr")
    call(torch.randn(3, 70), values, pattern)
    copy = weakref.ref(copy_of(values, pattern))
    assert copy() is not None
    del pattern
    gc.collect()
    assert copy() is None


def test_a_training_step_after_another():
    layer = sk.SparseLinear(70, 100, sparsity=0.3)
    layer.backend = "dense"
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    other = sk.SparseLinear.from_dense(layer.to_dense(), mask=layer.mask)
    other.backend = "reference"
    twin = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(8, 70)
        for model, steps in ((layer, optimizer), (other, twin)):
            steps.zero_grad()
            model(x).square().mean().backward()
            steps.step()
        assert torch.equal(layer.values, other.values)


def test_inference_mode():
    with torch.inference_mode():
        pattern, values = make("csr")
        x = torch.randn(3, 70)
        assert_product(call(x, values, pattern), lambda x, v: x @ pattern.scatter(v).t(), x, values)


@pytest.mark.parametrize("backend", ["dense", "native"])
@formats
def test_compiled(format, backend):
    pattern, values = make(format)

    def function(x, values):
        return sk.linear(x, values, pattern, backend=backend, activation="relu")

    x = torch.randn(5, 70, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(x, values)
    assert torch.equal(y, function(x, values))
