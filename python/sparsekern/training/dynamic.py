"""Dynamic sparse training: now and then some weights are dropped and as many grown; nnz never changes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..formats import CSR
from ..nn import SparseLinear
from .gradients import GradientRecorder
from .method import Method, check_count
from .optimizer_state import carry_state
from .schedules import Schedule, check_point, cosine, steps
from .updater import RowScores, drop_grow_sparse


class SET(Method):
    """Drops the weights of smallest magnitude and grows random ones.

    After every ``update_every``-th optimizer step until ``stop``, each layer drops its ``int(nnz ·
    fraction)`` smallest ``|w|`` and grows as many of its other positions, at 0. A position that is dropped
    and grown at once keeps its value. The optimizer's state moves along with the weights.

    Args:
        model, optimizer, total_steps: as in :class:`Method`.
        drop_fraction: share of the weights that an update moves: a :class:`Schedule`, or a number in [0, 1]
            from which the share falls to 0 at ``stop`` on a cosine.
        update_every: optimizer steps between updates.
        stop: from when on the masks stay: a fraction of ``total_steps`` (float) or a step (int).
        seed: of the random choices; the same on every rank.
        seed_second_moment: see :func:`carry_state`.

    Raises:
        ValueError: an argument out of range; also what :class:`Method` raises.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", with the schedule of RigL.
    """

    needs_gradients: ClassVar[bool] = False
    """Whether :meth:`grow_scores` reads ``self.gradients``, recorded in steps that end in an update."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        drop_fraction: float | Schedule = 0.3,
        update_every: int = 100,
        stop: int | float = 0.75,
        seed: int = 0,
        seed_second_moment: bool = True,
    ) -> None:
        super().__init__(model, optimizer, total_steps=total_steps)
        check_point("stop", stop)
        if not isinstance(drop_fraction, (Schedule, int, float)):
            raise TypeError(f"drop_fraction must be a Schedule or a number in [0, 1], got {drop_fraction!r}")
        schedule = drop_fraction if isinstance(drop_fraction, Schedule) else cosine(drop_fraction, end=stop)
        if not (0.0 <= schedule.first <= 1.0 and 0.0 <= schedule.last <= 1.0):
            raise ValueError(f"drop_fraction must be in [0, 1], got {drop_fraction}")
        check_count("update_every", update_every)
        for name, layer in self.layers.items():
            if not isinstance(layer.pattern, CSR):
                raise ValueError(
                    f"{type(self).__name__} takes layers of format 'csr', got {layer.format!r} in {name!r}"
                )
        self.drop_fraction = schedule
        self.update_every = update_every
        self.stop = stop
        self.seed_second_moment = seed_second_moment
        self.generator = torch.Generator().manual_seed(seed)
        self.gradients = GradientRecorder(self.layers.values())
        self.churn = dict.fromkeys(self.layers, 0.0)
        """Share of each layer's positions that changed in the last update."""
        self._prepare()

    def grow_scores(self, layer: SparseLinear) -> RowScores | None:
        """Scores of the positions of ``layer``; the highest grow. None: leave the layer alone."""
        device = layer.values.device

        def scores(rows: slice) -> torch.Tensor:
            count = len(range(*rows.indices(layer.out_features)))
            return torch.rand((count, layer.in_features), generator=self.generator).to(device)

        return scores

    def metrics(self) -> dict[str, float]:
        """Numbers to log: ``sparsity/<layer>``, and ``churn/<layer>``: the share moved by the last update."""
        return super().metrics() | {f"churn/{name}": churn for name, churn in self.churn.items()}

    def state_dict(self) -> dict[str, Any]:
        """As in :class:`Method`; with the state of the random generator."""
        return super().state_dict() | {
            "generator": self.generator.get_state(),
            "churn": list(self.churn.values()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As in :class:`Method`."""
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())
        self.churn = dict(zip(self.layers, state["churn"], strict=True))
        self.gradients.disarm()
        self._prepare()

    def _check_state(self, state: dict[str, Any]) -> None:
        generator, churn = state["generator"], state["churn"]
        own = self.generator.get_state()
        if not isinstance(generator, Tensor) or (generator.dtype, generator.shape) != (own.dtype, own.shape):
            raise ValueError(
                f"generator must be a {own.dtype} tensor of {own.numel()}, got {generator!r:.60}"
            )
        if not isinstance(churn, list) or len(churn) != len(self.layers):
            raise ValueError(f"churn must be a list of {len(self.layers)} numbers, got {churn!r:.60}")

    def _is_due(self, step: int) -> bool:
        return step % self.update_every == 0 and step < steps(self.stop, self.total_steps)

    def _advance(self, stepped: bool) -> None:
        if not stepped:
            self.gradients.clear()
            return
        if self._is_due(self.step_count):
            self._update()
        self._prepare()

    def _prepare(self) -> None:
        if self.needs_gradients and self._is_due(self.step_count + 1):
            self.gradients.clear()
            self.gradients.arm()
        else:
            self.gradients.disarm()

    @torch.no_grad()
    def _update(self) -> None:
        fraction = self.drop_fraction(self.step_count, self.total_steps)
        for name, layer in self.layers.items():
            scores = self.grow_scores(layer)
            if scores is None:
                continue
            pattern = layer.pattern
            assert isinstance(pattern, CSR)
            count = int(pattern.nnz * fraction)
            if count == 0:
                self.churn[name] = 0.0
                continue
            try:
                move = drop_grow_sparse(pattern, layer.values.abs(), scores, count)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            carry_state(self.optimizer, layer.values, move, seed_second_moment=self.seed_second_moment)
            layer.set_pattern(move.pattern, move(layer.values))
            self.churn[name] = move.churn


class RigL(SET):
    """SET that grows the weights of largest gradient: ``|∂loss/∂W|`` over all positions of the dense weight.

    The dense gradient is never held. In a step that ends in an update the layers keep their inputs and output
    gradients (all of them, where gradients are accumulated over several backward passes), from which the
    scores are made a few rows at a time; with ``torch.distributed`` they are summed over the ranks. A layer
    that no backward pass went through is left alone. In these steps code under ``torch.compile`` runs
    eagerly.

    Arguments as in :class:`SET`. Unlike in the paper, an update comes after the optimizer's step and not in
    its place, so magnitudes are one step newer than gradients.

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", algorithm 1, with its
    defaults.

    >>> method = RigL(model, optimizer, total_steps=10_000)
    """

    needs_gradients = True

    def grow_scores(self, layer: SparseLinear) -> RowScores | None:
        """``|∂loss/∂W|`` of the last step."""
        gradient = self.gradients.gradient(layer, layer.pattern.shape, layer.values)
        return None if gradient is None else lambda rows: gradient(rows).abs_()
