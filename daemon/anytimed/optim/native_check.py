"""Whether `native` computes the bits of torch: every function of the library beside what it stands for, on noise.

`differing` is asked once a process, before the library is used (a tenth of a second). Sizes leave remainders in every
loop, weights lie on both sides of one half, numbers spread over many orders of magnitude.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from anytimed.optim import adamw, native
from anytimed.optim.averaging import settle_
from anytimed.optim.neuron_norm import NeuronNorm
from anytimed.optim.orthogonal import NewtonSchulz, normalised
from anytimed.optim.rules import AdamW, MatrixBatch, Momentum
from anytimed.optim.scratch import Scratch
from anytimed.optim.sweep import Elements, Move, Pace, sweep_

CASES: Final = 12
SHAPES: Final = ((3, 5, 67), (2, 21, 40), (1, 9, 1031))


class _Case:
    """One case: its options follow from its number, its values from the generator."""

    def __init__(self, number: int, generator: torch.Generator) -> None:
        self.number, self.generator = number, generator
        self.shape = SHAPES[number % 3]
        self.lean, self.y16 = number % 4 == 1, number % 4 == 2
        self.products = torch.bfloat16 if number % 2 == 0 else torch.float32
        self.scratch = Scratch(torch.device("cpu"))
        decay, c, beta, last_beta = torch.rand(4, generator=generator).unbind()
        self.eta = 1e-2 * decay
        self.corrected_by = 1.0 + last_beta
        self.pace = Pace(-0.1 * decay if number % 3 != 2 else None, c, beta, last_beta if self.lean else None, None)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator) * torch.randn(shape, generator=self.generator).exp()

    def elements(self, *shape: int) -> Elements:
        y = self.noise(*shape).to(torch.bfloat16 if self.y16 else torch.float32)
        x, comp = (None, None) if self.lean else (self.noise(*shape), (1e-8 * self.noise(*shape)).to(torch.bfloat16))
        return Elements(self.noise(*shape), x, comp, y)

    def sweep_(self, elements: Elements, move: Move | None) -> None:
        """torch's, y rounded as the parameter has it."""
        y = elements.y.to(torch.float32)
        sweep_(elements._replace(y=y), move, self.pace, self.scratch)
        elements.y.copy_(y)


def differing(made: ctypes.CDLL) -> str | None:
    """The first thing that the library computes otherwise than torch, None if there is none."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number in range(CASES):
            case = _Case(number, generator)
            for same in (_matrices, _momentum, _flat, _still):
                if not same(case, made):
                    return f"{same.__name__[1:]}, case {number}"
    return None


def _matrices(case: _Case, made: ctypes.CDLL) -> bool:
    b, m, n = case.shape
    p = case.noise(b, m, n).to(case.products)
    p[0, 0] = 0.0
    v, elements = case.noise(b, m).square(), case.elements(b, m, n)
    scales = NeuronNorm(0.95 if case.number % 4 else 0.3, 1e-8, (1, m - 3, 2) if case.number % 2 else None)
    expected, expected_v = _copy(elements), v.clone()
    told = native.told(case.pace)
    native.matrices_(list(elements.y), elements[:3], p, v, scales, case.eta, told, case.scratch, made)
    wide = p.to(torch.float32)
    scale, _, new_v = scales(wide, expected_v, case.eta)
    assert new_v is not None
    settle_(expected_v, new_v, None)
    case.sweep_(expected, Move(wide, scale, None))
    return _equal((*elements, v), (*expected, expected_v))


def _momentum(case: _Case, made: ctypes.CDLL) -> bool:
    b, m, n = case.shape
    rule = Momentum(0.8 if case.number % 3 else 0.3, nesterov=case.number % 2 == 0)
    polar = NewtonSchulz(case.products, "quintic" if case.number % 4 else "polar_express", False, None, case.scratch)
    momentum, gs = case.noise(b, m, n), case.noise(b, m, n)
    expected = momentum.clone()
    out = native.momentum_(momentum, list(gs), rule, polar, case.scratch, made).clone()
    ahead = rule(MatrixBatch(expected, iter([(slice(None), gs, None)]), None), case.scratch)
    return _equal((momentum, out), (expected, normalised(ahead, polar.dtype, polar.safety, case.scratch)))


def _flat(case: _Case, made: ctypes.CDLL) -> bool:
    _, m, n = case.shape
    elements, g, v = case.elements(m * n), case.noise(m * n), case.noise(m * n).square()
    rule = AdamW(case.eta, 0.99, 1e-8, moved=case.number % 5 == 4)
    expected, expected_v = _copy(elements), v.clone()
    native.flat_(elements, v, g, case.corrected_by, rule, native.told(case.pace), made)
    if not rule.moved:
        adamw.second_moment_(expected_v, g, rule.beta2, None, case.scratch)
    direction = adamw.direction(expected_v, g, case.corrected_by, rule.eps, case.scratch)
    case.sweep_(expected, Move(direction, case.eta, None))
    return _equal((*elements, v), (*expected, expected_v))


def _still(case: _Case, made: ctypes.CDLL) -> bool:
    elements = case.elements(case.shape[1] * case.shape[2])
    expected = _copy(elements)
    rule = AdamW(case.eta, 0.99, 1e-8)
    native.flat_(elements, elements.z, None, case.corrected_by, rule, native.told(case.pace), made)
    case.sweep_(expected, None)
    return _equal(elements, expected)


def _copy(elements: Elements) -> Elements:
    z, x, comp, y = elements
    return Elements(z.clone(), None if x is None else x.clone(), None if comp is None else comp.clone(), y.clone())


def _equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(
        a is None or b is None or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in pairs
    )
