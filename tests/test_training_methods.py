"""Methods in a training loop: what moves and when, optimizer state, resuming, bad input."""

import copy
import io

import pytest
import sparsekern as sk
import torch
from cases import MASKS, free
from sparsekern.training import SET, RigL, Static, drop_grow, schedules
from torch import nn
from training_loop import make_data, make_model, train_step

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


def dense_gradients(model, step):
    """Of each sparse layer's dense weight, from a dense copy of the model."""
    names = [name for name, m in model.named_modules() if isinstance(m, sk.SparseLinear)]
    dense = sk.densify(copy.deepcopy(model))
    x, y = make_data(step)
    nn.functional.cross_entropy(dense(x), y).backward()
    return {name: dense.get_submodule(name).weight.grad for name in names}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_rigl_decides_as_on_dense_tensors(micro_batches):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = RigL(model, optimizer, total_steps=100, update_every=3)
    for step in range(1, 13):
        gradients = dense_gradients(model, step)
        before = {name: layer.mask for name, layer in method.layers.items()}
        weights = {}
        optimizer.register_step_post_hook(
            lambda *_, w=weights: w.update(
                {n: m.to_dense().weight.detach() for n, m in method.layers.items()}
            )
        )
        train_step(model, optimizer, method, step, micro_batches)
        for name, layer in method.layers.items():
            expected = before[name]
            if step % 3 == 0:
                fraction = method.drop_fraction(step, 100)
                expected = drop_grow(expected, weights[name].abs(), gradients[name].abs(), fraction)
                assert method.churn[name] > 0
            assert torch.equal(layer.mask, expected)
            # Survivors keep their value, grown weights start at 0.
            torch.testing.assert_close(layer.to_dense().weight, weights[name] * expected)


@pytest.mark.parametrize("kind", [SET, RigL])
def test_nnz_is_constant_and_parameters_stay_the_same_objects(kind):
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    method = kind(model, optimizer, total_steps=30, update_every=2)
    parameters = {name: (id(p), p.shape, p.data_ptr()) for name, p in model.named_parameters()}
    masks = {name: layer.mask for name, layer in method.layers.items()}
    for step in range(30):
        train_step(model, optimizer, method, step)
        assert {name: (id(p), p.shape, p.data_ptr()) for name, p in model.named_parameters()} == parameters
    for name, layer in method.layers.items():
        assert int(layer.mask.sum()) == int(masks[name].sum())
        assert not torch.equal(layer.mask, masks[name])


def test_updates_come_on_time():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SET(
        model, optimizer, total_steps=40, update_every=4, stop=0.5, drop_fraction=schedules.constant(0.2)
    )
    changed = []
    for step in range(1, 41):
        before = model[0].mask
        train_step(model, optimizer, method, step)
        if not torch.equal(model[0].mask, before):
            changed.append(step)
    assert changed == [4, 8, 12, 16]


def test_set_grows_every_position_alike():
    layer = sk.SparseLinear(20, 10, sparsity=0.9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    method = SET(
        layer, optimizer, total_steps=10**6, update_every=1, drop_fraction=schedules.constant(1.0), seed=3
    )
    counts = torch.zeros(10, 20)
    for _ in range(500):
        layer(torch.randn(2, 20)).sum().backward()
        optimizer.step()
        method.step()
        counts += layer.mask
    # Binomial(500, 0.1): mean 50, standard deviation 6.7; 200 positions stay within 5 of them.
    assert counts.sum() == 500 * 20
    assert counts.sub(50).abs().max() < 34


def test_static_changes_nothing():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    method = Static(model, optimizer, total_steps=10)
    masks = [layer.mask for layer in method.layers.values()]
    for step in range(5):
        train_step(model, optimizer, method, step)
    assert all(
        torch.equal(layer.mask, mask) for layer, mask in zip(method.layers.values(), masks, strict=True)
    )
    assert method.step_count == 5
    assert method.metrics() == {f"sparsity/{n}": pytest.approx(0.8, abs=1e-3) for n in ("0", "2")}


# --- optimizer state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed_second_moment", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_moves_with_the_weights(name, seed_second_moment):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    method = RigL(model, optimizer, total_steps=100, update_every=5, seed_second_moment=seed_second_moment)
    seen = {}

    def look(*_):
        for layer in method.layers.values():
            state = optimizer.state[layer.values]
            slots = {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == layer.values.shape}
            seen[layer] = layer.mask, {k: (layer.pattern.scatter(v), v.mean(), v) for k, v in slots.items()}

    optimizer.register_step_post_hook(look)
    for step in range(1, 6):
        train_step(model, optimizer, method, step)
    for layer in method.layers.values():
        old_mask, slots = seen[layer]
        mask = layer.mask
        assert slots
        assert (mask & ~old_mask).any()
        for key, (dense, mean, slot) in slots.items():
            start = mean if key == "exp_avg_sq" and seed_second_moment else 0.0
            expected = torch.where(old_mask, dense, start) * mask
            torch.testing.assert_close(layer.pattern.scatter(slot), expected)
            assert optimizer.state[layer.values][key] is slot


def test_weight_decay_leaves_fresh_weights_at_zero():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    method = RigL(model, optimizer, total_steps=100, update_every=1)
    old = model[0].mask
    train_step(model, optimizer, method, 0)
    fresh = model[0].mask & ~old
    assert fresh.any()
    assert (model[0].to_dense().weight[fresh] == 0).all()


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [4, 5, 7])  # before, after and between updates
@pytest.mark.parametrize("kind", [SET, RigL])
@pytest.mark.parametrize("name", ["sgd", "adamw-fused"])
def test_resumes_bit_for_bit(kind, name, stop_at):
    def start(seed):
        model = make_model(seed)
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer, kind(model, optimizer, total_steps=20, update_every=5, seed=7)

    model, optimizer, method = start(0)
    for step in range(20):
        if step == stop_at:
            file = io.BytesIO()
            torch.save([part.state_dict() for part in (model, optimizer, method)], file)
        train_step(model, optimizer, method, step)

    parts = start(1)
    file.seek(0)
    for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for step in range(stop_at, 20):
        train_step(*parts, step)

    for (key, ours), theirs in zip(parts[0].state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    for ours, theirs in zip(parts[0].parameters(), model.parameters(), strict=True):
        for key, slot in optimizer.state[theirs].items():
            assert torch.equal(torch.as_tensor(parts[1].state[ours][key]), torch.as_tensor(slot)), key
    assert parts[2].metrics() == method.metrics()


def test_seeds_decide():
    def masks(seed):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = SET(model, optimizer, total_steps=10, update_every=1, seed=seed)
        train_step(model, optimizer, method, 0)
        return model[0].mask

    assert torch.equal(masks(0), masks(0))
    assert not torch.equal(masks(0), masks(1))


def test_the_state_of_another_method_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    static, rigl = (kind(model, optimizer, total_steps=10) for kind in (Static, RigL))
    with pytest.raises(ValueError, match=r"state must be that of RigL, with .*generator.*got"):
        rigl.load_state_dict(static.state_dict())


@pytest.mark.parametrize(
    ("entry", "value"),
    [("step_count", -3), ("step_count", "x"), ("generator", torch.zeros(3)), ("generator", 1), ("churn", [])],
)
def test_a_state_that_cannot_be_changes_nothing(entry, value):
    model = make_model()
    method = RigL(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
    before = method.state_dict()
    with pytest.raises(ValueError, match=f"{entry} must be"):
        method.load_state_dict(before | {"step_count": 5} | {entry: value})
    after = method.state_dict()
    assert after["step_count"] == 0
    assert torch.equal(after["generator"], before["generator"])
    assert after["churn"] == before["churn"]


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number of 1 or more, got 0"),
        ({"total_steps": 1.5}, "total_steps must be a whole number of 1 or more, got 1.5"),
        ({"drop_fraction": 1.5}, r"drop_fraction must be in \[0, 1\], got 1.5"),
        ({"drop_fraction": schedules.linear(2.0)}, r"drop_fraction must be in \[0, 1\], got Schedule"),
        ({"update_every": 0}, "update_every must be a whole number of 1 or more, got 0"),
        ({"update_every": 1.5}, "update_every must be a whole number of 1 or more, got 1.5"),
        ({"stop": "x"}, "stop must be a fraction .*, got 'x'"),
        ({"stop": 1.5}, "stop must be a fraction .*, got 1.5"),
        ({"stop": 1}, "stop must be a fraction .*, got 1"),
    ],
)
def test_bad_input(options, message):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        RigL(model, optimizer, **{"total_steps": 100} | options)


def test_a_model_without_sparse_layers_is_refused():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"model must hold a SparseLinear .*got none in Linear"):
        Static(model, optimizer, total_steps=10)
    frozen = sk.SparseLinear(3, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        Static(frozen, optimizer, total_steps=10)


@pytest.mark.parametrize("kind", [SET, RigL])
@pytest.mark.parametrize("format", [f for f in MASKS if f != "csr"])
def test_methods_that_move_single_weights_take_csr(format, kind):
    model = nn.Sequential(sk.SparseLinear(37, 53, sparsity=free(format, 0.5), format=format))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=f"{kind.__name__} takes layers of format 'csr', got '{format}' in '0'"
    ):
        kind(model, optimizer, total_steps=10)


@pytest.mark.parametrize("format", MASKS)
def test_static_takes_every_format(format):
    model = nn.Sequential(
        sk.SparseLinear(37, 53, sparsity=free(format, 0.3), format=format), nn.Linear(53, 5)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = Static(model, optimizer, total_steps=3)
    mask, values = model[0].mask, model[0].values.detach().clone()
    for step in range(3):
        train_step(model, optimizer, method, step)
    assert torch.equal(model[0].mask, mask)
    assert not torch.equal(model[0].values, values)
    assert method.metrics()["sparsity/0"] == pytest.approx(1 - mask.double().mean().item())


def test_an_optimizer_without_the_values_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sk.sparsify(model, exclude=["1"])
    with pytest.raises(ValueError, match=r"optimizer must train the values .* not those of \['0'\]"):
        Static(model, optimizer, total_steps=10)


def test_nan_weights_name_their_layer():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=float("nan"))
    method = RigL(model, optimizer, total_steps=100, update_every=1)
    with pytest.raises(ValueError, match="layer '0': scores must not hold NaN"):
        train_step(model, optimizer, method, 0)
