"""polar(M): the nearest (semi-)orthogonal matrix, roughly, by five Newton-Schulz iterations on whole stacks at once.

X = M / (|M|_F + 1e-7), transposed where M is tall so that X X^T is the smaller square; five times
A = X X^T, X = a X + (b A + c A A) X with (a, b, c) = (3.4445, -4.7750, 2.0315); transposed back.

The odd quintic sends singular values to about [0.7, 1.2] and does not converge to 1: steep at 0, so that small
directions rise within five iterations (a factor of up to 3.4445^5 = 485), which also amplifies their rounding. Source:
Muon, Keller Jordan 2024.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from anytimed.optim.scratch import Scratch

QUINTIC: Final = (3.4445, -4.7750, 2.0315)
ITERATIONS: Final = 5
NORM_EPS: Final = 1e-7


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware (CUDA capability 8.0 or more), else float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def polar(matrices: Tensor, *, dtype: torch.dtype | None = None, scratch: Scratch | None = None) -> Tensor:
    """Newton-Schulz polar factor of every matrix of a stack.

    matrices: (k, m, n) or (m, n), float32, not changed. Returns float32 of the same shape; a zero matrix gives exact
    zeros. dtype: in which the products are taken (`working_dtype` if None). With `scratch` the result lies in its
    memory and may be overwritten by the caller, until the next call.
    """
    if matrices.ndim == 2:
        return polar(matrices.unsqueeze(0), dtype=dtype, scratch=scratch).squeeze(0)
    k, m, n = matrices.shape
    dtype = working_dtype(matrices.device) if dtype is None else dtype
    scratch = Scratch(matrices.device) if scratch is None else scratch
    tall = m > n
    rows, columns = (n, m) if tall else (m, n)

    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).add_(NORM_EPS)
    x = scratch.take_aligned("polar.x", (k, rows, columns), dtype)
    spare = scratch.take_aligned("polar.spare", (k, rows, columns), dtype)
    gram = scratch.take_aligned("polar.gram", (k, rows, rows), dtype)
    mixed = scratch.take_aligned("polar.mixed", (k, rows, rows), dtype)
    torch.div(matrices.mT if tall else matrices, norm, out=x)

    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=mixed)
        torch.baddbmm(x, mixed, x, beta=a, alpha=1.0, out=spare)
        x, spare = spare, x

    if not tall and dtype == torch.float32:
        return x
    return scratch.take("polar.out", (k, m, n)).copy_(x.mT if tall else x)
