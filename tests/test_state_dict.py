"""``state_dict`` round trips: into the same pattern and others, through files, from meta, in part."""

import copy

import pytest
import torch
from cases import MASKS
from layers import assert_equal_layers, detached, make_layer
from torch import nn

formats = pytest.mark.parametrize("format", MASKS)


@formats
def test_names(format):
    layer = make_layer(format)
    names = ["values", "bias", "shape", *layer.pattern.state_names]
    assert list(layer.state_dict()) == names
    assert list(nn.Sequential(nn.ReLU(), layer).state_dict()) == [f"1.{name}" for name in names]
    assert layer.state_dict()["shape"].tolist() == [100, 70]
    assert not any(tensor.requires_grad for tensor in layer.state_dict().values())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparsity", [0.7, 0.9, 0.2], ids=["equal nnz", "more nnz", "less nnz"])
@formats
def test_into_another_pattern(format, sparsity, bias, assign):
    source, target = make_layer(format, bias=bias), make_layer(format, sparsity, bias=bias)
    parameters = list(target.parameters())
    result = target.load_state_dict(detached(source.state_dict()), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_equal_layers(source, target)
    if not assign:
        assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))
    y = target(torch.randn(5, 70))
    y.sum().backward()
    assert target.values.grad.shape == target.values.shape


@formats
def test_into_the_same_layer(format):
    layer = make_layer(format)
    before, address = copy.deepcopy(layer), layer.values.data_ptr()
    layer.load_state_dict(layer.state_dict())
    assert_equal_layers(layer, before)
    assert layer.values.data_ptr() == address


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@formats
def test_an_optimizer_made_before_goes_on(format, kind):
    source, target = make_layer(format), make_layer(format, 0.9)
    target(torch.randn(5, 70)).sum().backward()
    optimizer = kind(target.parameters(), lr=0.1)
    target.load_state_dict(source.state_dict())
    grad = target.values.grad  # kept where nnz is the same, as where the format fixes it
    assert grad is None or grad.shape == target.values.shape, "a gradient of the old shape is left"
    target(torch.randn(5, 70)).sum().backward()
    optimizer.step()
    assert not torch.equal(source.values, target.values)


@formats
def test_models(format):
    source, target = (
        nn.Sequential(
            nn.Linear(70, 70), make_layer(format, s), nn.ModuleDict({"in": make_layer(format, s, bias=False)})
        )
        for s in (0.7, 0.5)
    )
    target.load_state_dict(source.state_dict())
    assert_equal_layers(source[1], target[1])
    assert_equal_layers(source[2]["in"], target[2]["in"])


@formats
def test_through_a_file(format, tmp_path):
    source, target = make_layer(format), make_layer(format, 0.9)
    torch.save(source.state_dict(), tmp_path / "layer.pt")
    target.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert_equal_layers(source, target)


@formats
def test_a_memory_mapped_file_may_change_later(format, tmp_path):
    """Index tensors are checked when loaded, so they must be the layer's own from then on."""
    source, target = make_layer(format), make_layer(format, 0.9)
    torch.save(source.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True, mmap=True)
    target.load_state_dict(state)
    for tensor in state.values():
        tensor.fill_(99)  # out of range for every index tensor
    assert_equal_layers(source, target)


@formats
def test_safetensors(format, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    source, target, other = make_layer(format), make_layer(format, 0.9), make_layer(format, 0.9)
    path = tmp_path / "layer.safetensors"
    safetensors.save_file(source.state_dict(), path)
    target.load_state_dict(safetensors.load_file(path))
    assert_equal_layers(source, target)
    model = nn.Sequential(source, nn.ReLU())
    safetensors.save_model(model, path)
    safetensors.load_model(nn.Sequential(other, nn.ReLU()), path)
    assert_equal_layers(source, other)


@formats
def test_values_are_cast_to_the_layer_s_dtype(format):
    source, target = make_layer(format), make_layer(format, 0.9).to(torch.bfloat16)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.values, source.values.bfloat16())
    assert torch.equal(target.mask, source.mask)


@formats
def test_assign_takes_the_tensors(format):
    source, target = make_layer(format).double(), make_layer(format, 0.9)
    state = detached(source.state_dict())
    target.load_state_dict(state, assign=True)
    assert target.values.dtype == torch.float64
    assert target.values.data_ptr() == state["values"].data_ptr()
    assert isinstance(target.values, nn.Parameter)
    assert target.values.requires_grad


@formats
def test_into_a_layer_on_meta(format):
    source, target = make_layer(format), make_layer(format, 0.7).to("meta")
    target.load_state_dict(source.state_dict(), assign=True)
    assert_equal_layers(source, target)


@formats
def test_the_shape_of_a_layer_on_meta(format):
    """Shapes are known there too."""
    with torch.device("meta"):
        assert make_layer(format).state_dict()["shape"].tolist() == [100, 70]


@formats
def test_keep_vars(format):
    layer = make_layer(format)
    assert layer.state_dict(keep_vars=True)["values"] is layer.values


# --- not strict ---


@formats
def test_strict_false_without_the_layer(format):
    layer = make_layer(format)
    before = copy.deepcopy(layer)
    result = layer.load_state_dict({}, strict=False)
    assert_equal_layers(layer, before)
    assert set(result.missing_keys) >= {"values", "bias"}


@formats
def test_strict_false_with_unexpected_keys(format):
    source, target = make_layer(format), make_layer(format, 0.9)
    result = target.load_state_dict({**source.state_dict(), "extra": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["extra"]
    assert result.missing_keys == []
    assert_equal_layers(source, target)


@pytest.mark.parametrize("nnz", ["equal", "other"])
@formats
def test_strict_false_with_part_of_a_pattern(format, nnz):
    """Values belong to the pattern that they were saved with, and to no other one."""
    source, target = make_layer(format), make_layer(format, 0.7 if nnz == "equal" else 0.9)
    before = copy.deepcopy(target)
    for name in ("shape", *source.pattern.state_names):
        state = detached(source.state_dict())
        del state[name]
        try:
            result = target.load_state_dict(state, strict=False)
        except RuntimeError as error:
            text = str(error)
        else:
            text = str(result.missing_keys)
        assert name in text
        assert torch.equal(target.values, before.values)
        assert torch.equal(target.mask, before.mask)
