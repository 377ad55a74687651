"""NorMuon's neuron-wise normalisation: every output neuron (row) of an orthogonalised update gets its own scale.

    v    <- beta2 v + (1 - beta2) mean over columns of P*P        v has shape (m,), one number a row
    Phat  = P / (sqrt(v) + eps)                                   row by row
    ehat  = length / |Phat|_F                                     0 where Phat is 0

`row_norms` and `second_moment` give v, `row_scale` the factors that turn P into ehat Phat; `NeuronNorm` is the whole
rule. Rows are output neurons, whichever side of the matrix is the longer. Sources: NorMuon, arXiv 2510.05491;
SF-NorMuon, arXiv 2605.23061, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anytimed.optim.adamw import root_
from anytimed.optim.rules import Scaled


def row_norms(p: Tensor) -> Tensor:
    """The Euclidean norm of every row. p: (k, m, n), any float dtype; returns (k, m) float32."""
    norms: Tensor = torch.linalg.vector_norm(p, dim=2, dtype=torch.float32)
    return norms


def second_moment(v: Tensor, norms: Tensor, columns: int, beta2: float) -> Tensor:
    """The new v, (k, m), from the old one and `row_norms`, whose squares over `columns` columns it takes in."""
    return torch.lerp(v, norms.square() / columns, 1.0 - beta2)


def row_scale(
    norms: Tensor, v: Tensor, lengths: Tensor, eps: float, row_splits: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """What every row of P is multiplied by, (k, m), so that the norm |P|_F of each block of rows becomes its length;
    and the squared norm of each whole update, (k,).

    norms, v: (k, m); lengths: (blocks,) float32, the norms wanted, one block where there are no `row_splits`. A block
    of zeros stays one. The norm of Phat follows from the row norms that v needed anyway: no matrix is read again.
    """
    inverse = (root_(v.clone()) + eps).reciprocal()
    rows = norms * inverse
    blocks = [rows] if row_splits is None else torch.split(rows, list(row_splits), dim=1)
    of_blocks = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks], dim=1)  # (k, blocks)
    positive = of_blocks > 0
    factors = torch.where(positive, lengths / of_blocks, torch.zeros_like(of_blocks))
    spread = factors if row_splits is None else _spread(factors, row_splits)
    return inverse * spread, (positive * lengths.square()).sum(dim=1)


def _spread(per_block: Tensor, row_splits: Sequence[int]) -> Tensor:
    """(k, blocks) to (k, m)."""
    parts = [per_block[:, i : i + 1].expand(-1, rows) for i, rows in enumerate(row_splits)]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True)
class NeuronNorm:
    """How far SF-NorMuon moves: `rules.Scales`. Every block of rows gets the length 0.2 eta sqrt(elements)."""

    beta2: float
    eps: float
    row_splits: tuple[int, ...] | None

    def lengths(self, m: int, n: int, eta: Tensor) -> Tensor:
        """The norm of the update of every block of rows of a matrix (m, n): (blocks,) float32."""
        return torch.stack([eta * (0.2 * (rows * n) ** 0.5) for rows in self.row_splits or (m,)])

    def rows(self, m: int, n: int, eta: Tensor) -> None:
        """P has its say."""

    def __call__(self, p: Tensor, v: Tensor, eta: Tensor) -> Scaled:
        _, m, n = p.shape
        norms = row_norms(p)
        v = second_moment(v, norms, n, self.beta2)
        scale, squares = row_scale(norms, v, self.lengths(m, n, eta), self.eps, self.row_splits)
        return Scaled(scale.unsqueeze(2), squares, v)
