"""The two parts of a step on a CPU: matrix products, and everything that is elementwise.

`PolarClock` stands in for `polar` in our optimizers and times it where it is called, inside the measured steps: that is
the matrix part, and what remains of a step is the elementwise part. The one is held against torch.bmm doing the same
products, in the same dtype and batches, and nothing else; the other against the time its bytes need at the bandwidth of
a plain copy. Both references are timed in the same rounds as the contenders.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from anytimed.optim import orthogonal
from anytimed.optim.orthogonal import ITERATIONS, polar, working_dtype
from contest.rounds import Lane, Samples, spread
from contest.shapes import Weights

COPY_BYTES: Final = 2**28
"""Of each of the two float32 tensors of the copy: far beyond any cache."""

PARTED: Final = ("sf_normuon", "amuse")

# What a step has to read (r) and write (w) outside of `polar`, in bytes an element, whatever the implementation, if
# every tensor is touched as rarely as the order of the computation allows. For matrices two passes, before and after:
#     gradient r 4, momentum r 4 w 4, what the products start from w 2;
#     result of the products r 2, z r 4 w 4, x r 4 w 4, compensation r 2 w 2, y w 4
# SF-NorMuon needs the norms of all rows before it can scale the first, and reads the result of the products twice.
# Where the sweep is not in C, `polar` itself writes what the products start from: 2 bytes less are needed than said.
MATRIX_BYTES: Final = {"amuse": 14 + 2 + 8 + 8 + 4 + 4, "sf_normuon": 14 + 2 + 2 + 8 + 8 + 4 + 4}
# For the rest one pass: gradient r 4, second moment r 4 w 4, z r 4 w 4, x r 4 w 4, compensation r 2 w 2, y w 4
OTHER_BYTES: Final = 4 + 8 + 8 + 8 + 4 + 4


class PolarClock:
    """While entered, times every call of `polar` by our optimizers, and counts them by shape of the stack."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._calls: Counter[tuple[int, int, int]] = Counter()
        self._stand_in = patch.object(orthogonal, "polar", self._timed)

    def __enter__(self) -> PolarClock:
        self._stand_in.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stand_in.stop()

    def _timed(self, matrices: Tensor, **options: Any) -> Tensor:
        began = time.perf_counter()
        found = polar(matrices, **options)
        self._seconds += time.perf_counter() - began
        k, m, n = matrices.shape
        self._calls[k, m, n] += 1
        return found

    def take(self) -> float:
        """Seconds since the last call of this method."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def stacks_of(self, step: Callable[[], object]) -> Counter[tuple[int, int, int]]:
        """How often one step calls for stacks of each shape (k, m, n)."""
        self._calls.clear()
        step()
        return Counter(self._calls)


def newton_schulz_flops(stacks: Mapping[tuple[int, int, int], int]) -> int:
    """Of five iterations on k matrices of (m, n), m <= n: each 2 m m n for X X^T, 2 m^3 for its square, 2 m m n for the
    product with X."""
    total = 0
    for (k, *sides), count in stacks.items():
        m, n = sorted(sides)
        total += count * k * ITERATIONS * (4 * m * m * n + 2 * m**3)
    return total


class Products:
    """torch.bmm on one stack: the three products of an iteration, five times, into memory that is there already."""

    def __init__(self, k: int, m: int, n: int, dtype: torch.dtype) -> None:
        short = min(m, n)
        self.x = torch.randn(k, m, n).to(dtype)
        self.square = torch.randn(k, short, short).to(dtype)
        self.wide = m <= n
        self.out, self.square_out, self.second_out = (torch.empty_like(t) for t in (self.x, self.square, self.square))

    def run(self) -> None:
        x, square = self.x, self.square
        for _ in range(ITERATIONS):
            torch.bmm(*((x, x.mT) if self.wide else (x.mT, x)), out=self.square_out)
            torch.bmm(square, square, out=self.second_out)
            torch.bmm(*((square, x) if self.wide else (x, square)), out=self.out)


def lanes(stacks: Mapping[tuple[int, int, int], int], repeats: int, copy_bytes: int) -> list[Lane]:
    """The two references, to be timed in the rounds of the contenders. stacks: what a step orthogonalises."""
    products = [(Products(*shape, working_dtype(torch.device("cpu"))), count) for shape, count in stacks.items()]
    source, target = (torch.ones(copy_bytes // 4) for _ in range(2))

    def run_products() -> None:
        for each, count in products:
            for _ in range(count):
                each.run()

    def run_copy() -> None:
        target.copy_(source)

    return [Lane("bmm", run_products, repeats=repeats), Lane("copy", run_copy)]


def figures(
    samples: Mapping[str, Samples], stacks: Mapping[tuple[int, int, int], int], weights: Weights, copy_bytes: int
) -> dict[str, Any]:
    """The JSON entry. share: what the matrix part reaches of bmm's rate. factor: how many times the least time for its
    bytes the elementwise part takes. Both are medians of what was found within each round."""
    flops = newton_schulz_flops(stacks)
    copies, products = samples["copy"].wall, samples["bmm"].wall
    found: dict[str, Any] = {
        "dtype": str(working_dtype(torch.device("cpu"))).removeprefix("torch."),
        "newton_schulz_gflop": round(flops / 1e9, 1),
        "bmm_gflop_s": round(flops / statistics.median(products) / 1e9, 1),
        "copy_gb_s": round(2 * copy_bytes / statistics.median(copies) / 1e9, 2),
    }
    in_matrices = sum(p.numel() for p in weights.matrices)
    for key in (key for key in PARTED if key in samples):
        needed = in_matrices * MATRIX_BYTES[key] + (weights.elements - in_matrices) * OTHER_BYTES
        matrix = samples[key].inner
        rest = [step - part for step, part in zip(samples[key].wall, matrix, strict=True)]
        found[key] = {
            "matrix_ms": round(1e3 * statistics.median(matrix), 3),
            "matrix_gflop_s": round(flops / statistics.median(matrix) / 1e9, 1),
            "share": spread([bmm / part for bmm, part in zip(products, matrix, strict=True)], 3),
            "elementwise_ms": round(1e3 * statistics.median(rest), 3),
            "elementwise_bytes": needed,
            "factor": spread([r / (needed * c / (2 * copy_bytes)) for r, c in zip(rest, copies, strict=True)], 3),
        }
    return found
