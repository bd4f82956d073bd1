"""One training run: a model, its optimizer, schedule and sparse-training method, and its history."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from typing import Any

import sparsekern as sk
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from vision.data import Dataset, Split

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Recipe:
    """All that decides the numbers of a session: a resumed one must have the same."""

    dataset: str
    data: str | None
    method: list[str]
    hidden: list[int]
    sparsity: float
    format: str
    distribution: str
    drop_fraction: float
    update_every: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Epoch:
    """Mean training loss, test accuracy in [0, 1] after it, and seconds of training (not of evaluation)."""

    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Memory:
    """Bytes that a run keeps between two steps: all that grows with the number of weights."""

    weights: int
    gradients: int
    optimizer: int
    indices: int

    @property
    def total(self) -> int:
        """The sum of the four."""
        return self.weights + self.gradients + self.optimizer + self.indices


def _rigl(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, recipe: Recipe) -> sk.training.RigL:
    return sk.training.RigL(
        model,
        optimizer,
        total_steps=steps,
        drop_fraction=recipe.drop_fraction,
        update_every=recipe.update_every,
    )


def _static(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, recipe: Recipe
) -> sk.training.Static:
    return sk.training.Static(model, optimizer, total_steps=steps)


# name -> how to make its sparse-training method; "dense" trains the model as it is.
METHODS: dict[str, Callable[[nn.Module, torch.optim.Optimizer, int, Recipe], Any] | None] = {
    "dense": None,
    "rigl": _rigl,
    "static": _static,
}


class Run:
    """A model in training by one method. All runs of a recipe start from the same dense weights.

    Args:
        name: a key of `METHODS`.
        recipe: the options of the session.
        data: the image set, on the device to train on.

    Raises:
        ValueError: the recipe asks for a sparsity, format or distribution that does not exist.
    """

    def __init__(self, name: str, recipe: Recipe, data: Dataset) -> None:
        self.name = name
        self.recipe = recipe
        self.data = data
        self.history: list[Epoch] = []
        torch.manual_seed(recipe.seed)
        model: nn.Module = mlp([data.train.images.shape[1], *recipe.hidden, data.classes])
        make_method = METHODS[name]
        if make_method is not None:
            model = sk.sparsify(
                model,
                sparsity=recipe.sparsity,
                format=recipe.format,
                distribution=recipe.distribution,
                exclude=["head"],
            )
        self.model = model.to(data.train.images.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        steps = recipe.epochs * self.steps_per_epoch
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=recipe.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        self.method = make_method and make_method(self.model, self.optimizer, steps, recipe)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in the training set, the smaller last one too."""
        return -(-len(self.data.train) // self.recipe.batch_size)

    def train_epoch(self) -> Epoch:
        """Trains one epoch, evaluates, appends to `history`.

        The randomness of an epoch comes from (seed, epoch) alone: all runs see one batch order, and an epoch
        is the same whether the session was interrupted before it or not.

        Raises:
            FloatingPointError: the loss or the weights are no longer finite.
        """
        torch.manual_seed(self.recipe.seed * 1_000_003 + len(self.history))
        device = self.data.train.labels.device
        self.model.train()
        total = torch.zeros((), device=device)
        start = _now(device)
        order = torch.randperm(len(self.data.train)).to(device)
        for x, y in self._bar(self.data.train, self.recipe.batch_size, order):
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            if self.method is not None:
                try:
                    self.method.step()
                except ValueError:  # scores that are no numbers
                    self._check_finite(*(p.sum() for p in self.model.parameters()))
                    raise
            self.scheduler.step()
            total += loss.detach() * len(y)
        seconds = _now(device) - start
        epoch = Epoch(total.item() / len(self.data.train), self.accuracy(self.data.test), seconds)
        self._check_finite(total)
        self.history.append(epoch)
        return epoch

    def _check_finite(self, *sums: Tensor) -> None:
        if not all(bool(torch.isfinite(each)) for each in sums):
            raise FloatingPointError(
                f"{self.name}: training must stay finite, got inf or NaN; try a smaller --lr"
            )

    @torch.no_grad()
    def accuracy(self, split: Split) -> float:
        """The share of `split` that the model labels correctly."""
        self.model.eval()
        batches = self.data.batches(split, EVALUATION_BATCH)
        correct = sum((self.model(x).argmax(1) == y).sum() for x, y in batches)
        return int(correct) / len(split)

    def memory(self) -> Memory:
        """Counts the bytes of the run's tensors; every trainable weight has a gradient of its own size."""
        parameters = list(self.model.parameters())
        slots = chain.from_iterable(state.values() for state in self.optimizer.state.values())
        return Memory(
            weights=_bytes(parameters),
            gradients=_bytes([p for p in parameters if p.requires_grad]),
            optimizer=_bytes([slot for slot in slots if isinstance(slot, Tensor)]),
            indices=sum(m.pattern.nbytes for m in self.model.modules() if isinstance(m, sk.SparseLinear)),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to continue to the same bits."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "method": None if self.method is None else self.method.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.method is not None:
            self.method.load_state_dict(state["method"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]

    def _bar(self, split: Split, batch: int, order: Tensor) -> tqdm[tuple[Tensor, Tensor]]:
        """The batches of an epoch behind a progress bar, which is there only on a terminal."""
        return tqdm(
            self.data.batches(split, batch, order),
            total=self.steps_per_epoch,
            desc=f"epoch {len(self.history) + 1}/{self.recipe.epochs} {self.name}",
            unit="step",
            leave=False,
            disable=None,
        )


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them: ``fc1``, ``fc2``, ... and last ``head``."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (inputs, outputs) in enumerate(pairwise(widths[:-1]), start=1):
        layers[f"fc{i}"] = nn.Linear(inputs, outputs)
        layers[f"relu{i}"] = nn.ReLU()
    layers["head"] = nn.Linear(widths[-2], widths[-1])
    return nn.Sequential(layers)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
