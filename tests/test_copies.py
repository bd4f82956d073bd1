"""Copies of layers: deepcopy, pickle, files, other dtypes and devices."""

import copy
import io
import pickle

import pytest
import torch
from cases import MASKS
from layers import assert_equal_layers, make_layer
from sparsekern.formats import parse_format
from tolerance import assert_product
from torch import nn

formats = pytest.mark.parametrize("format", MASKS)


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_torch_save]
)
@pytest.mark.parametrize("bias", [True, False])
@formats
def test_a_copy_is_equal_and_independent(format, bias, copied):
    layer = make_layer(format, bias=bias)
    layer.backend = "native"
    layer.eval()
    other = copied(layer)
    assert_equal_layers(layer, other)
    assert other.backend == "native"
    assert not other.training
    before = layer.to_dense().weight.clone()
    with torch.no_grad():
        other.values.zero_()
    other.set_pattern(MASKS[format](100, 70, 0.5))
    assert torch.equal(layer.to_dense().weight, before)


@formats
def test_a_copied_model_keeps_shared_layers(format):
    layer = make_layer(format)
    model = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert model[0] is model[1]
    assert model[0] is not layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@formats
def test_to_dtype(format, dtype):
    layer = make_layer(format)
    values, parameter = layer.values.detach().clone(), layer.values
    index = [tensor.dtype for tensor in layer.pattern.tensors()]
    assert layer.to(dtype) is layer
    assert layer.values is parameter
    assert torch.equal(layer.values, values.to(dtype))
    assert layer.bias.dtype == dtype
    assert [tensor.dtype for tensor in layer.pattern.tensors()] == index
    assert layer(torch.randn(3, 70, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer.type(torch.bfloat16),
        lambda layer: layer.bfloat16(),
        lambda layer: layer.double().float().bfloat16(),
    ],
)
@formats
def test_casts_leave_the_index_alone(format, convert):
    layer = make_layer(format)
    mask = layer.mask
    convert(layer)
    assert layer.values.dtype == torch.bfloat16
    assert torch.equal(layer.mask, mask)
    assert layer(torch.randn(3, 70, dtype=torch.bfloat16)).shape == (3, 100)


@formats
def test_double_runs_the_reference(format):
    layer = make_layer(format).double()
    x = torch.randn(5, 70, dtype=torch.float64)
    weight = layer.pattern.scatter
    assert_product(layer(x), lambda x, v, b: x @ weight(v).t() + b, x, layer.values, layer.bias)
    layer.backend = "native"
    with pytest.raises(
        ValueError, match=r"cannot run: it takes torch\.float32 or torch\.bfloat16, got torch\.float64"
    ):
        layer(x)


@formats
def test_an_optimizer_follows_a_cast(format):
    layer = make_layer(format)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.to(torch.bfloat16)
    layer(torch.randn(3, 70, dtype=torch.bfloat16)).sum().backward()
    before = layer.values.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.values)


@formats
def test_to_meta(format):
    layer = make_layer(format)
    parameter_count, nnz, text = sum(p.numel() for p in layer.parameters()), layer.pattern.nnz, repr(layer)
    layer.to("meta")
    assert layer.values.is_meta
    assert layer.pattern.device.type == "meta"
    assert layer.pattern.nnz == nnz
    assert sum(p.numel() for p in layer.parameters()) == parameter_count
    assert repr(layer) == text


@formats
def test_made_on_meta(format):
    """What large models do: build without memory, then load."""
    on_meta = make_layer(format, device="meta")
    assert on_meta.values.is_meta
    assert on_meta.pattern.device.type == "meta"
    with torch.device("meta"):
        on_meta = make_layer(format)
    assert on_meta.values.is_meta
    assert on_meta.pattern.device.type == "meta"


@pytest.mark.parametrize("start", ["cpu", "meta"])
@formats
def test_to_empty_leaves_no_random_positions(format, start):
    """Values may be anything after to_empty; positions may not, for the kernels trust them."""
    layer = make_layer(format).to(start)
    layer.to_empty(device="cpu")
    assert layer.values.device.type == "cpu"
    if layer.pattern.device.type == "meta":  # unknown, until a state_dict is loaded
        with pytest.raises((ValueError, RuntimeError), match=r"must be on cpu.*got .*meta"):
            layer(torch.randn(3, 70))
    else:
        parse_format(format).from_state((100, 70), dict(layer.pattern.state()))  # checks it
    source = make_layer(format)
    layer.load_state_dict(source.state_dict())
    assert_equal_layers(source, layer)


@formats
def test_share_memory(format):
    layer = make_layer(format)
    other = copy.deepcopy(layer)
    layer.share_memory()
    assert layer.values.is_shared()
    assert_equal_layers(layer, other)
