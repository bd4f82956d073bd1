"""``SparseLinear``: how it is made, initialized, converted; pattern changes; what a step allocates."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import sparsekern as sk
import torch
from cases import MASKS, free, random_pattern
from sparsekern.formats import parse_format
from tolerance import assert_product
from torch import nn
from torch.profiler import ProfilerActivity, profile

formats = pytest.mark.parametrize("format", MASKS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- construction ---


# All of MASKS' blocks and groups divide these.
WHOLE_IN, WHOLE_OUT = 32 * 11 * 5, 128


@formats
def test_shapes_and_attributes(format):
    layer = sk.SparseLinear(WHOLE_IN, WHOLE_OUT, sparsity=free(format, 0.75), format=format)
    assert (layer.in_features, layer.out_features, layer.format) == (WHOLE_IN, WHOLE_OUT, format)
    sparsity = parse_format(format).fixed_sparsity or 0.75
    nnz = round(WHOLE_IN * WHOLE_OUT * (1 - sparsity))
    assert layer.values.shape == layer.pattern.values_shape
    assert layer.values.numel() == layer.pattern.nnz == nnz
    assert layer.density == pytest.approx(1 - sparsity)
    assert layer.mask.sum() == nnz
    assert layer.bias.shape == (WHOLE_OUT,)
    assert layer.values.dtype == layer.bias.dtype == torch.float32
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in layer.parameters())
    assert not list(layer.buffers())
    assert repr(layer) == (
        f"SparseLinear(in_features={WHOLE_IN}, out_features={WHOLE_OUT}, bias=True, "
        f"format={format}, sparsity={sparsity:.4g})"
    )
    assert sk.SparseLinear(70, 100, False, format=format).bias is None


@formats
def test_the_default_sparsity(format):
    layer = sk.SparseLinear(WHOLE_IN, WHOLE_OUT, format=format)
    assert layer.density == pytest.approx(1 - (parse_format(format).fixed_sparsity or 0.9))


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.4, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (100, 128)], ids=str)
def test_exact_nnz(shape, sparsity):
    size = shape[0] * shape[1]
    nnz = round(size * (1 - sparsity))
    if nnz == 0:
        with pytest.raises(ValueError, match=f"to keep one of {size} weights, got {sparsity}"):
            sk.SparseLinear(*shape, sparsity=sparsity)
        return
    layer = sk.SparseLinear(*shape, sparsity=sparsity)
    assert layer.values.numel() == nnz
    assert layer(torch.randn(3, shape[0])).shape == (3, shape[1])


@formats
def test_initial_values(format):
    """Uniform in ±1/√(density·in) and ±1/√in. Mean and variance are within 5 standard errors."""
    layer = sk.SparseLinear(WHOLE_IN, WHOLE_OUT, sparsity=free(format, 0.8), format=format)
    fans = (layer.values, layer.density * WHOLE_IN), (layer.bias, WHOLE_IN)
    for tensor, fan_in in ((parameter.detach(), fan_in) for parameter, fan_in in fans):
        bound, n = 1 / math.sqrt(fan_in), tensor.numel()
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() >= bound * (1 - 20 / n)  # missed with probability exp(-20)
        assert abs(tensor.mean()) <= 5 * bound / math.sqrt(3 * n)
        variance = bound**2 / 3
        assert abs(tensor.var() - variance) <= 5 * variance * math.sqrt(0.8 / n)  # kurtosis of a uniform: 1.8


@pytest.mark.parametrize("format", [f for f in MASKS if f.startswith("bsr")])
def test_padding_of_blocks_stays_zero(format):
    """Of blocks that reach past the edge of W; the optimizer sees it, so its gradient must be 0 as well."""
    layer = sk.SparseLinear(70, 101, sparsity=0.0, format=format)
    padding = layer.pattern.flat_index() == 70 * 101
    assert padding.any()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for backend in ("native", "dense", "reference", "auto"):
        assert not layer.values[padding].any()
        layer.backend = backend
        layer.zero_grad()
        layer(torch.randn(5, 70)).square().sum().backward()
        assert layer.values.grad.any()
        assert not layer.values.grad[padding].any()
        optimizer.step()
    again = sk.SparseLinear.from_dense(layer.to_dense(), mask=layer.mask, format=format)
    assert torch.equal(again.values, layer.values)


@pytest.mark.parametrize("format", [f for f in MASKS if free(f, 0.9) is not None])
def test_initial_positions_reach_the_edges(format):
    """Blocks that the edge cuts are as likely as others: no input or output may be left out for good."""
    masks = [sk.SparseLinear(130, 67, sparsity=0.8, format=format).mask.float() for _ in range(60)]
    edges = torch.tensor([[mask[-1].mean(), mask[:, -1].mean()] for mask in masks])
    # Of blocks of 32 a column has 3: its mean over all masks, 0.2, has a standard deviation below 0.036.
    assert edges.mean(0).min() > 0.02


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_initial_positions_are_spread_evenly(default):
    """Whatever the default dtype: scores of a short type would tie, and ties go to the first rows."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        layer = sk.SparseLinear(512, 512, sparsity=0.999)
    finally:
        torch.set_default_dtype(before)
    assert layer.values.dtype == default
    for axis in (0, 1):
        halves = layer.mask.sum(axis).view(2, 256).sum(1).tolist()
        # Binomial with standard deviation √262 / 2 = 8.
        assert min(halves) >= 131 - 50


@formats
def test_generator_makes_it_reproducible(format):
    a, b, c = (
        sk.SparseLinear(70, 100, sparsity=free(format, 0.7), format=format, generator=seeded(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.bias, b.bias)
    assert not torch.equal(a.mask, c.mask)
    state = torch.get_rng_state()
    sk.SparseLinear(70, 100, sparsity=free(format, 0.7), format=format, generator=seeded(5))
    assert torch.equal(torch.get_rng_state(), state), "a generator was given, yet the global one was used"


@formats
def test_global_seed_makes_it_reproducible(format):
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layers.append(sk.SparseLinear(70, 100, sparsity=free(format, 0.7), format=format))
    assert torch.equal(layers[0].to_dense().weight, layers[1].to_dense().weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@formats
def test_dtype(format, dtype):
    layer = sk.SparseLinear(70, 100, dtype=dtype, format=format)
    assert layer.values.dtype == layer.bias.dtype == dtype
    assert layer(torch.randn(2, 70, dtype=dtype)).dtype == dtype


# --- to and from dense ---


@pytest.mark.parametrize("bias", [True, False])
@formats
def test_from_dense_by_magnitude(format, bias):
    dense = nn.Linear(70, 100, bias)
    before = dense.weight.detach().clone()
    layer = sk.SparseLinear.from_dense(dense, sparsity=free(format, 0.7), format=format)
    mask = sk.prune(before, free(format, 0.7), format)
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.pattern.scatter(layer.values), before * mask)
    assert torch.equal(layer.bias, dense.bias) if bias else layer.bias is None
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(dense.weight, before), "the copy shares memory with the dense layer"


@formats
def test_from_dense_with_a_mask(format):
    dense = nn.Linear(70, 100)
    mask = MASKS[format](100, 70, 0.2)
    layer = sk.SparseLinear.from_dense(dense, mask=mask, format=format)
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.to_dense().weight, dense.weight * mask)
    x = torch.randn(5, 70)
    assert_product(layer(x), lambda x, w, b: x @ (w * mask).t() + b, x, dense.weight, dense.bias)


@formats
def test_round_trip_is_exact(format):
    layer = sk.SparseLinear(70, 100, sparsity=free(format, 0.7), format=format)
    layer.values.requires_grad_(False)
    layer.eval()
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert (dense.in_features, dense.out_features) == (70, 100)
    assert not dense.weight.requires_grad
    assert dense.bias.requires_grad
    again = sk.SparseLinear.from_dense(dense, mask=layer.mask, format=format)
    assert torch.equal(again.values, layer.values)
    assert torch.equal(again.bias, layer.bias)
    assert not again.values.requires_grad
    assert not again.training
    assert not dense.training
    dense.bias.data.zero_()
    assert layer.bias.any()


@formats
def test_from_dense_keeps_dtype_and_requires_grad_of_the_bias(format):
    dense = nn.Linear(70, 100, dtype=torch.bfloat16)
    dense.bias.requires_grad_(False)
    layer = sk.SparseLinear.from_dense(dense, sparsity=free(format, 0.5), format=format)
    assert layer.values.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.values.requires_grad
    assert not layer.bias.requires_grad


# --- set_pattern ---


@pytest.mark.parametrize("as_mask", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 1.0])
@formats
def test_set_pattern_keeps_the_survivors(format, density, as_mask):
    layer = sk.SparseLinear(70, 100, sparsity=free(format, 0.7), format=format)
    before, values = layer.to_dense().weight.detach(), layer.values
    mask = MASKS[format](100, 70, density)
    layer(torch.randn(3, 70)).sum().backward()
    layer.set_pattern(mask if as_mask else parse_format(format).from_mask(mask))
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.to_dense().weight, before * mask)
    assert layer.values is values
    assert values.requires_grad
    assert values.grad is None
    x = torch.randn(3, 70)
    y = layer(x)
    assert_product(y, lambda x, w, b: x @ w.t() + b, x, before * mask, layer.bias)
    y.sum().backward()
    assert values.grad.shape == values.shape


@formats
def test_set_pattern_of_equal_nnz_keeps_the_memory(format):
    layer = sk.SparseLinear(70, 100, sparsity=free(format, 0.7), format=format)
    address = layer.values.data_ptr()
    layer.set_pattern(parse_format(format).prune(torch.rand(100, 70), free(format, 0.7)))
    assert layer.values.data_ptr() == address


@formats
def test_set_pattern_with_values(format):
    layer = sk.SparseLinear(70, 100, sparsity=free(format, 0.7), format=format)
    for density in (0.3, 0.1):
        pattern = random_pattern(format, (100, 70), density)
        values = torch.randn(pattern.values_shape)
        given = values.clone()
        layer.set_pattern(pattern, values)
        assert torch.equal(layer.to_dense().weight, pattern.scatter(values))
        before = copy.deepcopy(layer)
        with pytest.raises(ValueError, match=r"values must have shape .*, got"):
            layer.set_pattern(random_pattern(format, (100, 70), 0.7), values[None])
        assert torch.equal(layer.to_dense().weight, before.to_dense().weight)
        layer.values.data.zero_()
        assert torch.equal(values, given), "the layer shares memory with the given values"


@pytest.mark.parametrize("format", [f for f in MASKS if f.startswith("bsr")])
def test_set_pattern_with_values_past_the_edge(format):
    layer = sk.SparseLinear(70, 101, sparsity=0.0, format=format)
    values = torch.ones(layer.values.shape)
    layer.set_pattern(layer.pattern, values)
    assert layer.values.sum() == 70 * 101
    assert values.all(), "the caller's values were changed"


# --- in use ---


@formats
def test_layers_in_a_model_train(format):
    model = nn.Sequential(
        sk.SparseLinear(70, 64, sparsity=free(format, 0.5), format=format),
        nn.ReLU(),
        sk.SparseLinear(64, 70, sparsity=free(format, 0.5), format=format, bias=False),
    )
    twin = copy.deepcopy(model)
    for layer in (twin[0], twin[2]):
        layer.backend = "reference"
    x = torch.randn(64, 70)
    losses = []
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (net(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    # How far a random mask gets is its own affair: as far as the same mask in torch's own operations.
    assert losses[59] < 0.98 * losses[0]
    assert losses[:60] == pytest.approx(losses[60:], rel=1e-3)


@formats
def test_frozen_parameters(format):
    layer = sk.SparseLinear(70, 100, sparsity=free(format, 0.5), format=format)
    layer.values.requires_grad_(False)
    layer(torch.randn(3, 70)).sum().backward()
    assert layer.values.grad is None
    assert layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not layer(torch.randn(3, 70)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 1024), (1024,), (4, 16, 1024)], ids=str)
@pytest.mark.parametrize("format", [*(f for f in MASKS if free(f, 0.95) is not None), "1:16", "16:2:32"])
def test_a_step_makes_no_tensor_of_the_dense_size(format, shape, dtype):
    """At a density of a few percent, which 2:4 has not."""
    layer = sk.SparseLinear(1024, 1024, sparsity=free(format, 0.95), format=format, dtype=dtype)
    layer.backend = "native"
    x = torch.randn(shape, dtype=dtype, requires_grad=True)

    def largest_allocation(layer):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            layer(x).float().square().sum().backward()
        events = profiler.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    dense_bytes = 1024 * 1024 * dtype.itemsize
    assert largest_allocation(layer) <= dense_bytes / 4
    assert largest_allocation(layer.to_dense()) >= dense_bytes


# Patterns of a few percent at most, made without a mask.
LARGE_PATTERNS = {
    "csr": "CSR.from_flat_index((size, size), torch.randint(size * size, (size * size // 500,)).unique())",
    "bsr": """BSR.from_state((size, size), {
        "block_row_ptr": torch.arange(size // 32 + 1, dtype=torch.int32) * 8,
        "block_col_idx": torch.arange(8, dtype=torch.int32).repeat(size // 32) * 60}, block=(32, 32))""",
    "nm": """NM.from_state((size, size), {
        "index": torch.randint(16, (size, size // 16), dtype=torch.uint8)}, n=1, m=16)""",
    "vnm": """VNM.from_state((size, size), {
        "columns": torch.tensor([3, 50, 100, 255], dtype=torch.uint8).repeat(size // 64, size // 256, 1),
        "index": torch.tensor([0, 2], dtype=torch.uint8).repeat(size, size // 256)}, v=64, n=2, m=256)""",
}


@pytest.mark.parametrize("format", LARGE_PATTERNS)
def test_kernels_need_no_memory_of_the_dense_size(format):
    """What the kernels allocate themselves no profiler sees: the peak of a process of its own does.

    The gradient of the values and the threads' parts of it are O(nnz), which is 1/16 of W for N:M.
    """
    code = f"""
import resource, torch
from cases import op, where
from sparsekern import BSR, CSR, NM, VNM
torch.set_num_threads(2)
size = 16384
pattern = {LARGE_PATTERNS[format]}
x, values = torch.randn(64, size), torch.randn(pattern.values_shape)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = op(pattern, "linear")(x, values, None, *where(pattern))
op(pattern, "linear_backward")(y, x, values, *where(pattern), True, True, True)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) - 4 * values.nbytes)
"""
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert int(result.stdout) <= 4 * 16384**2 / 8
