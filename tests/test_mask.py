"""Products along a bit mask, against dense ones in float64."""

import random

import pytest
import sparsekern as sk
import torch
from cases import DENSITIES, DTYPES, LAYOUTS, MASKS, Case, cases, random_pattern
from sparsekern import _library, copies, cost, dense
from sparsekern.formats import mask, parse_format
from sparsekern.formats.products import ACTIVATION_CODES, ACTIVATIONS
from test_kernels import isas, run_on
from test_pattern_transfers import Waits
from tolerance import Exact, assert_product
from torch.library import opcheck

pytestmark = pytest.mark.skipif(
    _library.LOAD_ERROR is not None, reason=f"needs the native kernels: {_library.LOAD_ERROR}"
)

FORMATS = [format for format in MASKS if parse_format(format).kind.format != "bsr"]
SHAPES = [(1, 1), (5, 2), (7, 17), (48, 64), (49, 65), (13, 1040), (300, 130)]
BATCHES = (0, 1, 2, 3, 7, 8, 9, 16, 17, 40, 65, 260)


def framed(values):
    """The same values between NaNs, which no product may meet."""
    frame = torch.full((values.numel() + 16,), torch.nan, dtype=values.dtype)
    inside = frame[8:-8]
    inside.copy_(values.flatten())
    return inside.view(values.shape)


def check_mask(case):
    """All products of a case, with and without bias."""
    out_features, in_features = case.shape
    pattern = random_pattern(case.format, case.shape, case.density)
    at, lay = copies.mask_operands(pattern), LAYOUTS[case.layout]
    x = lay(torch.randn(case.batch, in_features).to(case.dtype))
    grad = lay(torch.randn(case.batch, out_features).to(case.dtype))
    values = framed(torch.randn(pattern.values_shape).to(case.dtype))
    bias = torch.randn(out_features).to(case.dtype)

    def linear(x, v, b):
        return x @ pattern.scatter(v).t() + b

    y = mask.linear(x, values, bias, *at)
    assert y.stride() == x.new_empty(y.shape).stride() or "feature-major" in case.layout
    assert_product(y, linear, x, values, bias, what=f"{case} y")
    assert_product(
        mask.linear(x, values, None, *at), linear, x, values, torch.zeros_like(bias), what=f"{case} y"
    )
    grad_x, grad_values, grad_bias = mask.linear_backward(grad, x, values, *at, True, True)
    assert_product(grad_x, lambda g, v: g @ pattern.scatter(v), grad, values, what=f"{case} grad_x")
    assert_product(
        grad_values.view(pattern.values_shape),
        lambda g, x: pattern.gather(g.t() @ x),
        grad,
        x,
        what=f"{case} grad_values",
    )
    assert_product(grad_bias, lambda g: g.sum(0), grad, what=f"{case} grad_bias")
    alone = mask.linear_backward(grad, x, values, *at, True, False)
    assert torch.equal(alone[0], grad_x)
    assert alone[1].numel() == alone[2].numel() == 0
    again = mask.linear_backward(grad, x, values, *at, False, True)
    assert torch.equal(again[1], grad_values)


def some_cases(count):
    chosen = random.Random(torch.initial_seed())
    for shape in SHAPES:
        for _ in range(count):
            yield Case(
                chosen.choice(FORMATS),
                shape,
                chosen.choice(BATCHES),
                chosen.choice(DENSITIES),
                chosen.choice(DTYPES),
                chosen.choice(list(LAYOUTS)),
            )


def test_products():
    for case in some_cases(12):
        check_mask(case)


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format):
    for case in cases([(65, 129), (40, 300)], [format], sample=3):
        check_mask(case)


@isas
def test_every_isa(isa):
    run_on(isa, "import test_mask\nfor case in test_mask.some_cases(6):\n    test_mask.check_mask(case)\n")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [3, 20])
def test_activations(batch, activation):
    pattern = random_pattern("csr", (50, 70), 0.5)
    x, values, bias = torch.randn(batch, 70), torch.randn(pattern.values_shape), torch.randn(50)
    exact = Exact(lambda x, v, b: x @ pattern.scatter(v).t() + b, x, values, bias)
    at = copies.mask_operands(pattern)
    y = mask.linear(x, values, bias, *at, activation=ACTIVATION_CODES[activation])
    exact.check_activated(ACTIVATIONS[activation], y)
    pattern.memo[cost.remembered_at(batch, x.dtype, False, False)] = dense.MASK
    with torch.no_grad():
        assert torch.equal(sk.linear(x, values, pattern, bias, activation=activation), y)


def test_bad_arguments():
    pattern = random_pattern("csr", (50, 70), 0.5)
    x, grad, values = torch.randn(3, 70), torch.randn(3, 50), torch.randn(pattern.values_shape)
    bits, row_ptr = copies.mask_operands(pattern)
    for call, message in (
        (lambda: mask.linear(x.double(), values, None, bits, row_ptr), "mask_linear: x must be float32 or"),
        (lambda: mask.linear(x[0], values, None, bits, row_ptr), r"x must be \[batch, in\]"),
        (lambda: mask.linear(x[:, :60], values, None, bits, row_ptr), "bits must be contiguous uint8"),
        (lambda: mask.linear(x, values[::2], None, bits, row_ptr), "values must be contiguous"),
        (lambda: mask.linear(x, values, grad[0, :9], bits, row_ptr), "bias must be contiguous float32"),
        (lambda: mask.linear(x, values, None, bits, row_ptr, activation=4), "activation must be 0 to 3"),
        (
            lambda: mask.linear_backward(grad[:2], x, values, bits, row_ptr, True, True),
            r"x must be \[2, in\]",
        ),
        (
            lambda: mask.linear_backward(x, x, values, bits, row_ptr, True, True),
            r"grad must be \[batch, 50\]",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, batch):
    pattern = random_pattern("csr", (50, 70), 0.5)
    x, grad = (LAYOUTS[layout](torch.randn(batch, size)) for size in (70, 50))
    at, values = copies.mask_operands(pattern), torch.randn(pattern.values_shape)
    opcheck(mask.linear, (x, values, torch.randn(50), *at), {"activation": 2})
    opcheck(mask.linear, (x, values, None, *at))
    for need in ((True, True), (True, False), (False, True), (False, False)):
        opcheck(mask.linear_backward, (grad, x, values, *at, *need))


@pytest.mark.parametrize(
    ("format", "shape"),
    [  # random_pattern() makes empty ones of free sparsity alone
        (format, shape)
        for format in FORMATS
        for shape in ((0, 5), (3, 0), (1, 1), (7, 128), (40, 129), (65, 700))
        if all(shape) or parse_format(format).fixed_sparsity is None
    ],
    ids=str,
)
def test_masks_for_gpus(format, shape):
    pattern = random_pattern(format, shape, 0.5 if all(shape) else 0.0)
    where = pattern.flat_index().view(-1)
    with Waits() as waits:
        bits, starts = mask.mask_on_gpu(shape, where)
    assert not waits.found
    out_features, spans = shape[0], -(-shape[1] // mask.SPAN)
    assert bits.shape == (out_features, spans * mask.SPAN // 8)
    positions = torch.arange(8, dtype=torch.uint8)
    columns = (bits[..., None] >> positions & 1).view(out_features, spans * mask.SPAN).bool()
    assert torch.equal(columns[:, : shape[1]], pattern.to_mask())
    assert not columns[:, shape[1] :].any()
    counts = columns.view(-1, mask.SPAN).sum(1)
    assert starts.dtype == torch.int32
    assert torch.equal(starts[1:], counts.cumsum(0).int())
    assert starts[0] == 0


def test_a_profile_without_masks_chooses_none():
    built_in = cost.read(cost._BUILT_IN / "generic.json")
    assert not built_in.has_masks
    assert cost.read(cost._BUILT_IN / "avx2.json").has_masks
