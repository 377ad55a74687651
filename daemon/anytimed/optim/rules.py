"""What an optimizer tells the walk through its stacks: by which rule parameters move.

A rule for hidden matrices has three parts, taken in this order for every batch of matrices: `momentum` takes in the
gradients and says what to orthogonalise; `polar` orthogonalises it; `scales` says, from the outcome and v, how far each
row moves. All three are values, equal where their numbers are: what carries them out (torch's operations, `compiled`,
`native`) is the walk's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from anytimed.optim.averaging import blend_
from anytimed.optim.orthogonal import NewtonSchulz
from anytimed.optim.scratch import Scratch

Parts = Iterator[tuple[int | slice, Tensor, Tensor | None]]
"""Where in the batch, its gradient (float32, of momentum's shape there), and who is active (None: all)."""


@dataclass(frozen=True, slots=True)
class MatrixBatch:
    """Some matrices of one shape whose turn it is. momentum: (b, m, n) float32, to be changed where active: (b,), 0-d
    or None (all); where it is (b,), there are matrices without a gradient among them."""

    momentum: Tensor
    gradients: Parts
    active: Tensor | None


@dataclass(frozen=True, slots=True)
class Momentum:
    """M <- mu M + (1 - mu) g. What is orthogonalised is M or, under Nesterov, (1 - mu) g + mu M."""

    mu: float
    nesterov: bool

    def __call__(self, batch: MatrixBatch, scratch: Scratch) -> Tensor:
        """M takes in the gradients; returns what to orthogonalise, (b, m, n) float32."""
        momentum = batch.momentum
        ahead = scratch.take("nesterov", momentum.shape) if self.nesterov else momentum
        if self.nesterov and batch.active is not None and batch.active.ndim:
            ahead.zero_()  # of a matrix without a gradient: what comes of it is not used, but must not be NaN
        for at, g, here in batch.gradients:
            blend_(momentum[at], g, 1.0 - self.mu, here)
            if self.nesterov:
                torch.lerp(g, momentum[at], self.mu, out=ahead[at])
        return ahead


class Scaled(NamedTuple):
    """How far a batch moves. scale: (b, m, 1) or (b, 1, 1) float32, what P is multiplied by; squares: (b,), the squared
    norm of each update; v: the new one, (b, m), None where the rule keeps none."""

    scale: Tensor
    squares: Tensor
    v: Tensor | None


class Scales(Protocol):
    """How far orthogonalised matrices move. It only reads, and is equal to, and hashed as, one of the same numbers."""

    def __call__(self, p: Tensor, v: Tensor, eta: Tensor) -> Scaled:
        """P (b, m, n); v (b, m), (b, 0) where none is kept; eta 0-d float32."""

    def rows(self, m: int, n: int, eta: Tensor) -> Tensor | None:
        """What every row is multiplied by, (m,) float32, if P has no say in it; else None."""


@dataclass(frozen=True, slots=True)
class Spectral:
    """The rule of one group of matrices at one step. eta: 0-d float32."""

    eta: Tensor
    momentum: Momentum
    polar: NewtonSchulz
    scales: Scales


@dataclass(frozen=True, slots=True)
class AdamW:
    """The AdamW rule of one group at one step. eta: 0-d float32; moved: whether v has this step's gradient already."""

    eta: Tensor
    beta2: float
    eps: float
    moved: bool = False
