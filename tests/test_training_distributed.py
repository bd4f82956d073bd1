"""Two ranks with different data: they stay identical, and follow the gradient of the whole batch."""

import copy
import socket

import pytest
import sparsekern as sk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sparsekern.training import SET, RigL, drop_grow
from torch import nn
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
KINDS = {"set": SET, "rigl": RigL}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = sk.SparseLinear(30, 50, sparsity=0.8)
        self.b = sk.SparseLinear(50, 20, sparsity=0.8)
        self.sometimes = sk.SparseLinear(20, 20, sparsity=0.8)

    def forward(self, x, extra):
        y = self.b(self.a(x).relu())
        return self.sometimes(y) if extra else y


def run(rank, kind, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    check_patterns_are_compared(kind, rank)
    torch.manual_seed(0)
    net = Net()
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = KINDS[kind](model, optimizer, total_steps=100, update_every=2)
    generator = torch.Generator().manual_seed(100 + rank)
    for step in range(1, 7):
        x = torch.randn(8, 30, generator=generator)
        if kind == "rigl" and step == 2:
            check_first_update(net, method, model, optimizer, x, rank)
            continue
        optimizer.zero_grad()
        model(x, extra=rank == 0).square().mean().backward()  # the other rank never uses the last layer
        optimizer.step()
        method.step()
    assert all(method.churn.values())
    results[rank] = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    dist.destroy_process_group()


def check_patterns_are_compared(kind, rank):
    torch.manual_seed(1 + rank)
    net = Net()
    with pytest.raises(ValueError, match="every rank must have the same pattern in layer 'a', got different"):
        KINDS[kind](net, torch.optim.SGD(net.parameters()), total_steps=100)


def check_first_update(net, method, model, optimizer, x, rank):
    xs = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(xs, x)
    dense = sk.densify(copy.deepcopy(net))
    sum(dense(each, extra=owner == 0).square().mean() for owner, each in enumerate(xs)).backward()
    before = net.a.mask
    optimizer.zero_grad()
    model(x, extra=rank == 0).square().mean().backward()
    optimizer.step()
    weight = net.a.to_dense().weight.detach()
    method.step()
    expected = drop_grow(before, weight.abs(), dense.a.weight.grad.abs(), method.drop_fraction(2, 100))
    assert torch.equal(net.a.mask, expected)


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_stay_identical(kind):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(run, (kind, port, results), nprocs=RANKS)
        first, second = results[0], results[1]
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name] == second[name]).all(), name
