"""SF-NorMuon with its weight decay in another place: at y, where the gradient is taken, instead of at z.

    z <- z - eta_t lambda y - ehat Phat

Only the benchmark of long horizons has it. Source of the question: arXiv 2605.23061, which decays z for the sake of
long horizons; the Schedule-Free papers decay at y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anytimed.optim import SFNorMuon
from anytimed.training.optimizers import SFNorMuonRecipe


class DecayAtY(SFNorMuon):
    """Every group's decay is taken out of the step and applied before it, from the parameters, which hold y."""

    def __init__(self, params: Any, weight_decay: float, **options: Any) -> None:
        super().__init__(params, weight_decay=0.0, **options)
        self._lambda = weight_decay

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        gate: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> Any:
        assert closure is None, "the learner gives none"
        if gate is None or gate:
            for clock, _, members in self._by_clock():
                for _, group, _ in members:
                    decay = float(self._eta(clock, group)) * self._lambda
                    for p in group["params"]:
                        self.state[p]["z"].sub_(p, alpha=decay)
        return super().step(gate=gate, loss=loss)


class SFNorMuonDecayAtY(SFNorMuonRecipe):
    optimizer = DecayAtY
