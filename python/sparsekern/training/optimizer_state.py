"""What an optimizer knows of each weight moves with the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .updater import Move


@torch.no_grad()
def carry_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, move: Move, *, seed_second_moment: bool = True
) -> None:
    """Move every state tensor of ``parameter`` that has its shape: momentum, Adam's moments, ...

    A surviving weight keeps its own state, that of a dropped one is lost, and a fresh one starts at 0. With
    ``seed_second_moment``, Adam's ``exp_avg_sq`` of a fresh weight starts at the mean of the layer instead:
    from m = v = 0, late in training when bias correction is over, the first update would be (1 − β₁) / √(1 −
    β₂) ≈ 3.2 times the learning rate.
    """
    for name, slot in optimizer.state.get(parameter, {}).items():
        if isinstance(slot, Tensor) and slot.shape == parameter.shape:
            seeded = seed_second_moment and name == "exp_avg_sq"
            slot.copy_(move(slot, slot.mean(dtype=torch.float32) if seeded else 0.0))
