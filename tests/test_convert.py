"""sparsify, densify: what they replace, what they leave alone, and what they refuse."""

import copy

import pytest
import sparsekern as sk
import torch
from cases import MASKS, free
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

formats = pytest.mark.parametrize("format", MASKS)


def mlp():
    return nn.Sequential(
        nn.Linear(40, 70), nn.LayerNorm(70), nn.ReLU(), nn.Linear(70, 33, bias=False), nn.Linear(33, 10)
    )


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}) for _ in range(2)
        )
        self.head = nn.Linear(16, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.head(x)


def sparse_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, sk.SparseLinear)]


@formats
def test_replaces_linear_layers_by_their_pruned_copies(format):
    model = mlp()
    dense = copy.deepcopy(model)
    sparsity = free(format, 0.6)  # of the 2 blocks of 32 x 32 that the head has, one stays
    assert sk.sparsify(model, sparsity=sparsity, format=format) is model
    assert sparse_names(model) == ["0", "3", "4"]
    for name in sparse_names(model):
        layer, before = model.get_submodule(name), dense.get_submodule(name)
        assert layer.format == format
        mask = sk.prune(before.weight, sparsity, format)
        assert torch.equal(layer.mask, mask)
        assert torch.equal(layer.to_dense().weight, before.weight * mask)
        assert (layer.bias is None) == (before.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, before.bias)
    assert torch.equal(model[1].weight, dense[1].weight)


def test_a_bare_linear_is_returned_sparse():
    layer = sk.sparsify(nn.Linear(20, 30), sparsity=0.75)
    assert isinstance(layer, sk.SparseLinear)
    assert layer.values.numel() == 150
    assert isinstance(sk.sparsify(nn.Linear(20, 30), distribution={"": 0.5}), sk.SparseLinear)
    assert isinstance(sk.densify(layer), nn.Linear)


@formats
def test_densify_computes_the_same(format):
    model = sk.sparsify(mlp(), sparsity=free(format, 0.6), format=format)
    x = torch.randn(5, 40)
    expected = model(x)
    assert sk.densify(model) is model
    assert sparse_names(model) == []
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_distribution_keeps_the_global_budget(distribution):
    model = sk.sparsify(mlp(), sparsity=0.9, distribution=distribution)
    weights = [m for m in model.modules() if isinstance(m, nn.Linear | sk.SparseLinear)]
    kept = sum(m.values.numel() if isinstance(m, sk.SparseLinear) else m.weight.numel() for m in weights)
    size = 40 * 70 + 70 * 33 + 33 * 10
    assert abs(kept - 0.1 * size) <= len(weights) / 2


def test_layers_that_erk_sets_dense_stay_linear():
    model = nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))
    sk.sparsify(model, sparsity=0.9, distribution="erk")
    assert sparse_names(model) == ["0", "1"]


def test_dict_names_the_layers_to_convert():
    model = sk.sparsify(Blocks(), distribution={"blocks.0.up": 0.5, "head": 0.75})
    assert sparse_names(model) == ["blocks.0.up", "head"]
    assert model.head.values.numel() == 44


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, ["head"], ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (None, "head", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (["blocks"], None, ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (["*.up"], ["blocks.0"], ["blocks.1.up"]),
        (["blocks.?.down", "head"], None, ["blocks.0.down", "blocks.1.down", "head"]),
    ],
)
def test_include_and_exclude(include, exclude, left):
    assert sparse_names(sk.sparsify(Blocks(), include=include, exclude=exclude)) == left


def test_shared_modules_stay_shared():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.append(model[0])
    model.add_module("again", nn.Sequential(model[0]))
    sk.sparsify(model, sparsity=0.5, include=["again"])
    assert isinstance(model[0], sk.SparseLinear)
    assert model[0] is model[2]
    assert model[0] is model.again[0]
    sk.densify(model)
    assert model[0] is model[2] is model.again[0]


def test_a_weight_shared_with_another_module_is_refused():
    model = Blocks()
    model.head.weight = model.embed.weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"layer 'head' must own its weight, but 'embed' shares it.*exclude=\['head'\]"
    ):
        sk.sparsify(model)
    assert sparse_names(model) == []
    sk.sparsify(model, exclude=["head"])
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, before["embed.weight"])


def test_subclasses_of_linear_are_left_alone():
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(16, 2), "fc": nn.Linear(16, 16), "q": orthogonal(nn.Linear(4, 4))}
    )
    sk.sparsify(model)
    assert sparse_names(model) == ["fc"]
    assert type(model["attention"].out_proj) is not nn.Linear
    x = torch.randn(3, 2, 16)
    assert model["attention"](x, x, x)[0].shape == x.shape


def test_transformer_encoder_runs_in_eval_mode():
    # There torch would call a fused kernel with linear1.weight.
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    sk.sparsify(model, sparsity=0.5).eval()
    dense = sk.densify(copy.deepcopy(model))
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=1e-5)
        ours, theirs = (m(x, src_key_padding_mask=padding)[~padding] for m in (model, dense))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_keeps_mode_and_requires_grad():
    model = mlp().eval()
    model[0].weight.requires_grad_(False)
    sk.sparsify(model)
    assert not model[0].training
    assert not model[0].values.requires_grad
    assert model[4].values.requires_grad


def test_a_layer_that_would_be_dead_is_refused():
    """The head is one block, of which 0.9 leaves none."""
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    message = (
        r"layer '2': sparsity must be at most 0 to keep one of 1 blocks of 128 x 128, got 0\.9: "
        r"leave so small a layer dense \(exclude=\.\.\.\), or take a finer format"
    )
    with pytest.raises(ValueError, match=message):
        sk.sparsify(model, sparsity=0.9, format="bsr128")
    assert sparse_names(model) == []
    sk.sparsify(copy.deepcopy(model), sparsity=0.9, format="bsr8")
    sk.sparsify(model, sparsity=0.9, format="bsr128", exclude="2")
    assert sparse_names(model) == ["0"]


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_a_dead_layer_is_refused_whatever_the_distribution(distribution):
    model = nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 4))
    with pytest.raises(ValueError, match=r"layer '1': sparsity must be at most .* of 3 blocks of 128 x 128"):
        sk.sparsify(model, sparsity=0.995, format="bsr128", distribution=distribution, exclude="0")


def test_a_failed_call_changes_nothing():
    model = mlp()
    with torch.no_grad():
        model[4].weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layer '4': .*NaN"):
        sk.sparsify(model)
    assert sparse_names(model) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"format": "coo"}, "format must be .*got 'coo'"),
        ({"distribution": "global"}, "distribution must be one of .*got 'global'"),
        ({"distribution": {"nose": 0.5}}, r"distribution must name layers among .*got \['nose'\]"),
        (
            {"distribution": {"head": 0.5}, "exclude": ["head"]},
            r"distribution must name layers .*got \['head'\]",
        ),
        ({"include": ["nose"]}, "include must name nn.Linear layers among .*got 'nose'"),
        ({"exclude": ["embed"]}, "exclude must name nn.Linear layers among .*got 'embed'"),
        ({"exclude": ["*"]}, "include and exclude must leave a layer"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        sk.sparsify(Blocks(), **options)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"model must hold an nn.Linear .*got none in ReLU"):
        sk.sparsify(nn.ReLU())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        sk.sparsify([nn.Linear(2, 2)])


@pytest.mark.parametrize("distribution", ["uniform", {"0": 0.5}])
def test_a_format_that_fixes_the_sparsity_takes_it_from_a_distribution(distribution):
    model = sk.sparsify(mlp(), sparsity=0.5, format="2:4", distribution=distribution)
    assert sparse_names(model) == (["0"] if isinstance(distribution, dict) else ["0", "3", "4"])
    with pytest.raises(ValueError, match=r"layer '3': sparsity must be 0.5 or None, .* got 0.75"):
        sk.sparsify(mlp(), format="2:4", distribution={"3": 0.75})


def test_prune():
    weight = torch.tensor([[1.0, -3.0, 0.5], [2.0, 0.0, -2.0]])
    assert sk.prune(weight, 0.5).tolist() == [[False, True, False], [True, False, True]]
    with pytest.raises(ValueError, match=r"weight must be a matrix \[out, in\], got shape \[3\]"):
        sk.prune(weight[0], 0.5)
    with pytest.raises(ValueError, match="NaN"):
        sk.prune(weight * float("nan"), 0.5)
