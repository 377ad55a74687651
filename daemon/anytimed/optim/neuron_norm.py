"""NorMuon's neuron-wise normalisation: every output neuron (row) of an orthogonalised update gets its own scale.

    v    <- beta2 v + (1 - beta2) mean over columns of P*P        v has shape (m,), one number a row
    Phat  = P / (sqrt(v) + eps)                                   row by row
    ehat  = length / |Phat|_F                                     0 where Phat is 0

`row_squares` and `second_moment` give v, `rescale_` turns P into ehat Phat. Rows are output neurons whichever side
Newton-Schulz transposed. Sources: NorMuon, arXiv 2510.05491; SF-NorMuon, arXiv 2605.23061, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_squares(p: Tensor) -> Tensor:
    """Sum over columns of P*P. p: (k, m, n); returns (k, m)."""
    norms: Tensor = torch.linalg.vector_norm(p, dim=2)
    return norms.square()


def second_moment(v: Tensor, squares: Tensor, columns: int, beta2: float) -> Tensor:
    """The new v, (k, m), from the old one and `row_squares`, whose mean over `columns` columns it takes in."""
    return torch.lerp(v, squares / columns, 1.0 - beta2)


def rescale_(p: Tensor, squares: Tensor, v: Tensor, length: Tensor, eps: float) -> Tensor:
    """P <- length Phat / |Phat|_F, in place. p: (k, m, n); squares, v: (k, m); length: 0-d, the Frobenius norm wanted.

    |Phat|_F follows from the row sums that v needed anyway; the matrices are read once more, not twice.
    """
    inverse = (v.sqrt() + eps).reciprocal_()
    norm = (squares * inverse.square()).sum(dim=1, keepdim=True).sqrt_()
    scale = torch.where(norm > 0, length.to(torch.float32) / norm, torch.zeros_like(norm))
    return p.mul_((inverse * scale).unsqueeze(2))
