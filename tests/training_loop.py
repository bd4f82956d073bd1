"""The model, data and training step that the tests of the training methods share."""

import sparsekern as sk
import torch
from torch import nn


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(37, 53), nn.ReLU(), nn.Linear(53, 41), nn.ReLU(), nn.Linear(41, 5))
    return sk.sparsify(model, sparsity=0.8, exclude=["4"])


def make_data(step, batch=16):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(batch, 37, generator=generator), torch.randint(5, (batch,), generator=generator)


def train_step(model, optimizer, method, step, micro_batches=1):
    optimizer.zero_grad()
    x, y = make_data(step)
    for xs, ys in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
        (nn.functional.cross_entropy(model(xs), ys) / micro_batches).backward()
    optimizer.step()
    method.step()
