"""Recording what dense gradients are made of: when, of which layers, under AMP and torch.compile."""

import copy
import pickle

import pytest
import sparsekern as sk
import torch
from sparsekern.training import SET, RigL, drop_grow
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_loop import make_data, make_model, train_step


def test_nothing_is_recorded_outside_update_steps():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RigL(model, optimizer, total_steps=100, update_every=3)
    for step in range(1, 10):
        assert bool(model[0]._forward_hooks) == (step % 3 == 0)
        train_step(model, optimizer, method, step)
        assert not any(method.gradients._pairs.values())


def test_a_dropped_method_leaves_no_hook():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RigL(model, optimizer, total_steps=100, update_every=1)
    assert model[0]._forward_hooks
    assert optimizer._optimizer_step_post_hooks
    del method
    assert not model[0]._forward_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_model_is_copied_and_pickled_while_gradients_are_recorded():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RigL(model, optimizer, total_steps=100, update_every=1)
    model(make_data(0)[0]).sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(make_data(1)[0]).sum().backward()
    assert [len(pairs) for pairs in method.gradients._pairs.values()] == [1, 1]


def test_evaluation_before_an_update_does_not_count():
    results = []
    for evaluate in (False, True):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = RigL(model, optimizer, total_steps=100, update_every=1)
        if evaluate:
            with torch.no_grad():
                model(torch.randn(4, 37))
            model(torch.randn(4, 37))  # no backward pass
        train_step(model, optimizer, method, 0)
        results.append(model[0].mask)
    assert torch.equal(*results)


class Shared(nn.Module):
    """Uses one layer twice, another never, in 3 dimensions, by keyword."""

    def __init__(self):
        super().__init__()
        self.twice = sk.SparseLinear(24, 24, sparsity=0.7)
        self.never = sk.SparseLinear(24, 24, sparsity=0.7)

    def forward(self, x):
        return self.twice(x=self.twice(x).relu_())


@pytest.mark.parametrize("how", ["plain", "reentrant", "non-reentrant"])
def test_shared_unused_and_checkpointed_layers(how):
    torch.manual_seed(0)
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = RigL(model, optimizer, total_steps=100, update_every=1)
    x = torch.randn(2, 3, 24, requires_grad=True)
    dense = model.twice.to_dense()
    dense(dense(x).relu_()).square().sum().backward()
    before = {name: layer.mask for name, layer in method.layers.items()}
    y = model(x) if how == "plain" else checkpoint(model, x, use_reentrant=how == "reentrant")
    y.square().sum().backward()
    optimizer.step()
    method.step()
    expected = drop_grow(
        before["twice"], dense.weight.abs(), dense.weight.grad.abs(), method.drop_fraction(1, 100)
    )
    assert torch.equal(model.twice.mask, expected)
    assert torch.equal(model.never.mask, before["never"])


def test_bfloat16_and_autocast():
    for autocast in (False, True):
        model = make_model() if autocast else make_model().bfloat16()
        optimizer = torch.optim.AdamW(model.parameters())
        method = RigL(model, optimizer, total_steps=100, update_every=1)
        nnz = model[0].values.numel()
        for step in range(3):
            x, y = make_data(step)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(x if autocast else x.bfloat16()).float(), y)
            loss.backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()
        assert model[0].values.numel() == nnz
        assert method.churn["0"] > 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [SET, RigL])
def test_no_update_where_the_scaler_skipped_the_step(kind, fused):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    method = kind(model, optimizer, total_steps=100, update_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = model[0].mask
    for step, overflows in enumerate([False, True, True, False, False]):
        optimizer.zero_grad()
        x, y = make_data(step)
        scaler.scale(nn.functional.cross_entropy(model(x), y) * (1e38 if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        method.step()
        # The second step that really happens is the fourth attempt.
        assert torch.equal(model[0].mask, start) == (step < 3)
        assert torch.isfinite(model[0].values).all()
    assert method.step_count == 3


def test_compiled_model_is_recorded_and_not_compiled_again():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_model()

        def forward(self, x):
            return self.net(x)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset() leaves what earlier tests counted
    model, plain = Net(), Net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    runs = []
    for forward, module in ((compiled, model), (plain, plain)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        method = RigL(module, optimizer, total_steps=100, update_every=4)
        runs.append((forward, optimizer, method))
    for step in range(14):
        for run in runs:
            train_step(*run, step)
        if step == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert graphs == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(model.net[0].mask, plain.net[0].mask)
    assert runs[0][2].churn["net.0"] > 0


def test_compiler_stance_is_set_back_after_the_last_recorder():
    from torch._dynamo.eval_frame import _stance as before

    methods = []
    for _ in range(2):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        methods.append((model, optimizer, RigL(model, optimizer, total_steps=2, update_every=1)))
    for step, run in enumerate(methods):
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        train_step(*run, step)
    assert torch._dynamo.eval_frame._stance == before
