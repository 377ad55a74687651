"""polar(M): the nearest (semi-)orthogonal matrix, roughly, by five odd quintic iterations on whole stacks at once.

X = M / (|M|_F + 1e-7); five times A = X X^T, X = a X + (b A + c A A) X. A tall matrix is not transposed: A = X^T X is
then the smaller square, and X = a X + X (b A + c A A), the same polynomial of the singular values (measured: as fast as
transposing first, and the output needs no transposing back).

`quintic`, the default, repeats (3.4445, -4.7750, 2.0315). It sends singular values to about [0.7, 1.2] and does not
converge to 1: steep at 0, so that small directions rise within five iterations (a factor of up to 3.4445^5 = 485),
which also amplifies their rounding. Source: Muon, Keller Jordan 2024. `polar_express` uses another triple at each
iteration, the best in the worst case for singular values above 1e-3: it comes closer to 1 (about [0.85, 1.15]) and
lifts the smallest more. Source: The Polar Express, arXiv 2505.16932, Algorithm 1.

`gram` iterates on the small square alone (X X^T and the polynomial so far) and touches the wide matrix twice instead of
ten times. Fewer products where one side is much longer than the other, and the error of small directions doubles in
bfloat16, because the squares of the singular values are what is rounded. Off unless asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from anytimed.optim.scratch import Scratch

Coefficients = Literal["quintic", "polar_express"]
Triple = tuple[float, float, float]

ITERATIONS: Final = 5
NORM_EPS: Final = 1e-7

POLAR_EXPRESS_SAFETY: Final = 1.01
"""Singular values may exceed 1 by this much after rounding; the polynomials are shrunk to stay stable there."""

_POLAR_EXPRESS: Final[tuple[Triple, ...]] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

COEFFICIENTS: Final[dict[str, tuple[Triple, ...]]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),) * ITERATIONS,
    "polar_express": tuple(
        (a / POLAR_EXPRESS_SAFETY, b / POLAR_EXPRESS_SAFETY**3, c / POLAR_EXPRESS_SAFETY**5)
        for a, b, c in _POLAR_EXPRESS
    ),
}

GRAM_ASPECT: Final = 1.5
"""From this ratio of the sides on, `gram` saves products: 34 m^3 + 4 m^2 n of them against 20 m^2 n + 10 m^3."""

SYMMETRIC_SIDE: Final = 256
"""Below this, half a square is too small a product to be quick."""


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32.

    CUDA: capability 8.0 or more. CPU: AVX512-BF16 or AMX (measured there: 4.6 times the rate of float32); without
    them bfloat16 is emulated, and slower than float32.
    """
    if device.type == "cuda":
        quick = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        quick = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    else:
        quick = False
    return torch.bfloat16 if quick else torch.float32


def safety_of(coefficients: Coefficients) -> float:
    """By how much norms are raised before the first iteration."""
    return POLAR_EXPRESS_SAFETY if coefficients == "polar_express" else 1.0


def normalised(matrices: Tensor, dtype: torch.dtype, safety: float, scratch: Scratch) -> Tensor:
    """Every matrix of (k, m, n) float32 by its norm, where the iterations expect it. The norm is taken over the norms
    of the rows: those are taken in parallel, and no sum gets long."""
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(matrices, dim=2), dim=1)
    factor = norm.mul_(safety).add_(NORM_EPS).reciprocal_().view(-1, 1, 1)
    return torch.mul(matrices, factor, out=beginning(matrices.shape, dtype, scratch))


def beginning(shape: torch.Size, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Where the iterations expect the normalised matrices (k, m, n)."""
    k, m, n = shape
    return scratch.take_aligned("polar.x", (k, m, n), dtype)


@dataclass(frozen=True, slots=True)
class NewtonSchulz:
    """`polar` with its options; normalised: see there, `is_normalised`."""

    dtype: torch.dtype
    coefficients: Coefficients
    gram: bool
    row_splits: tuple[int, ...] | None
    scratch: Scratch

    @property
    def safety(self) -> float:
        return safety_of(self.coefficients)

    def __call__(self, matrices: Tensor, *, normalised: bool = False) -> Tensor:
        return polar(
            matrices,
            dtype=self.dtype,
            coefficients=self.coefficients,
            gram=self.gram,
            row_splits=self.row_splits,
            scratch=self.scratch,
            is_normalised=normalised,
        )


def polar(
    matrices: Tensor,
    *,
    dtype: torch.dtype | None = None,
    coefficients: Coefficients = "quintic",
    gram: bool = False,
    row_splits: Sequence[int] | None = None,
    scratch: Scratch | None = None,
    is_normalised: bool = False,
) -> Tensor:
    """Newton-Schulz polar factor of every matrix of a stack.

    matrices: (k, m, n) or (m, n), float32, not changed. Returns the same shape in the dtype of the products; a zero
    matrix gives exact zeros. dtype: in which the products are taken (`working_dtype` if None). row_splits: the rows of
    every projection of a fused matrix, which are orthogonalised each for itself. With `scratch` the result lies in its
    memory and may be overwritten by the caller, until the next call. is_normalised: matrices are what `normalised` gave
    (no row_splits), and are overwritten.
    """
    assert not (is_normalised and row_splits), "a projection is normalised for itself"
    stack = matrices if matrices.ndim == 3 else matrices.unsqueeze(0)
    dtype = working_dtype(stack.device) if dtype is None else dtype
    scratch = Scratch(stack.device) if scratch is None else scratch
    safety = safety_of(coefficients)

    def iterated(part: Tensor) -> Tensor:
        x = part if is_normalised else normalised(part, dtype, safety, scratch)
        return _iterate(x, COEFFICIENTS[coefficients], gram, scratch)

    if row_splits is None:
        out = iterated(stack)
    else:
        out = scratch.take("polar.out", stack.shape, dtype)
        if len(set(row_splits)) == 1 and stack.is_contiguous():
            blocks = stack.view(-1, row_splits[0], stack.shape[2])
            out.view(blocks.shape).copy_(iterated(blocks))
        else:
            for block, target in zip(*(torch.split(t, list(row_splits), dim=1) for t in (stack, out)), strict=True):
                target.copy_(iterated(block))
    return out if matrices.ndim == 3 else out.squeeze(0)


def _iterate(x: Tensor, polynomials: Sequence[Triple], gram: bool, scratch: Scratch) -> Tensor:
    """The five iterations, in scratch memory. x: (k, m, n), normalised, in the dtype of the products; overwritten."""
    k, m, n = x.shape
    short, dtype = min(m, n), x.dtype
    spare = scratch.take_aligned("polar.spare", (k, m, n), dtype)
    a_matrix = scratch.take_aligned("polar.gram", (k, short, short), dtype)
    mixed = scratch.take_aligned("polar.mixed", (k, short, short), dtype)
    if gram and max(m, n) >= GRAM_ASPECT * short:
        return _iterate_gram(x, spare, a_matrix, mixed, polynomials, scratch)
    for a, b, c in polynomials:
        _square(x, a_matrix)
        torch.baddbmm(a_matrix, a_matrix, a_matrix, beta=b, alpha=c, out=mixed)
        if m <= n:
            torch.baddbmm(x, mixed, x, beta=a, out=spare)
        else:
            torch.baddbmm(x, x, mixed, beta=a, out=spare)
        x, spare = spare, x
    return x


def _square(x: Tensor, out: Tensor) -> None:
    """X X^T, of the shorter side, into `out`.

    It is symmetric: on a CPU, three quarters of it are multiplied out and the rest is copied, with the same bits, where
    that is quicker (measured: 7 % of the whole iteration at 384 x 1024 and more, nothing for squares).
    """
    wide = x.shape[1] <= x.shape[2]
    short, long = sorted(x.shape[1:])
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or short < SYMMETRIC_SIDE or long < 2 * short:
        torch.bmm(*((x, x.mT) if wide else (x.mT, x)), out=out)
        return
    half = short // 2
    for matrix, square in zip(x.unbind(0), out.unbind(0), strict=True):
        rows = matrix if wide else matrix.mT
        torch.mm(rows[:half], rows.mT, out=square[:half])
        torch.mm(rows[half:], rows[half:].mT, out=square[half:, half:])
        square[half:, :half] = square[:half, half:].mT


def _iterate_gram(
    x: Tensor, out: Tensor, square: Tensor, poly: Tensor, polynomials: Sequence[Triple], scratch: Scratch
) -> Tensor:
    """The same polynomial by its factor: X_i = Q_i X_0 with Q_i a polynomial in G_0 = X_0 X_0^T.

    P = a I + b G + c G G;  Q <- P Q;  G <- P G P. All of them are symmetric and commute.
    """
    k, s, _ = square.shape
    wide = x.shape[1] <= x.shape[2]
    q, next_q = (scratch.take_aligned(name, (k, s, s), x.dtype) for name in ("polar.q", "polar.next"))
    _square(x, square)
    for i, (a, b, c) in enumerate(polynomials):
        torch.baddbmm(square, square, square, beta=b, alpha=c, out=poly)
        poly.diagonal(dim1=1, dim2=2).add_(a)
        if i == 0:
            q.copy_(poly)
        else:
            torch.bmm(poly, q, out=next_q)
            q, next_q = next_q, q
        if i + 1 < len(polynomials):
            torch.bmm(poly, square, out=next_q)
            torch.bmm(next_q, poly, out=square)
    return torch.bmm(q, x, out=out) if wide else torch.bmm(x, q, out=out)
