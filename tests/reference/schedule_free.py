"""Slow float64 twins of the optimizers, a parameter at a time, straight from the papers; they share no code with them.

x is kept as what it is by definition, the weighted sum of z_1 … z_t over the sum of the weights, not by the recursion
that the optimizers use. AMUSE's S_t is the paper's formula in c_t, where the optimizer takes a ratio of weight sums.

Sources: SF-NorMuon, arXiv 2605.23061, Algorithm 1; AMUSE, arXiv 2605.22432; Schedule-Free, arXiv 2405.15682.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sequences:
    """x, y, z of one parameter, float64, and the moments of its rule."""

    z: Tensor
    matrix: bool
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    weighted_sum: Tensor = field(init=False)
    momentum: Tensor = field(init=False)
    v: Tensor = field(init=False)
    updates: int = 0

    def __post_init__(self) -> None:
        self.z = self.z.detach().double().clone()
        self.x, self.y = self.z.clone(), self.z.clone()
        self.weighted_sum = torch.zeros_like(self.z)
        self.momentum = torch.zeros_like(self.z)
        self.v = torch.zeros(self.z.shape[0], dtype=torch.float64) if self.matrix else torch.zeros_like(self.z)


def polar(m: Tensor) -> Tensor:
    """Five Newton-Schulz iterations of one float64 matrix, without transposing: X (X^T X) is (X X^T) X."""
    x = m / (math.sqrt(float((m * m).sum())) + 1e-7)
    for _ in range(5):
        small = x.T @ x
        x = 3.4445 * x - 4.7750 * (x @ small) + 2.0315 * (x @ small @ small)
    return x


class Twin:
    """The sequences of all parameters of a run on one clock. lr drives the clock; aux_lr is the auxiliaries'."""

    def __init__(
        self,
        parameters: list[tuple[Tensor, bool]],
        *,
        lr: float,
        aux_lr: float,
        warmup: int,
        decay: float,
        aux_beta2: float,
        power: float = 0.0,
        window: int | None = None,
    ) -> None:
        self.parameters = [Sequences(p, matrix) for p, matrix in parameters]
        self.lr, self.aux_lr, self.warmup, self.decay, self.aux_beta2 = lr, aux_lr, warmup, decay, aux_beta2
        self.power, self.window = power, window
        self.t = 0
        self.weight_sum = 0.0

    def step(self, gradients: list[Tensor | None]) -> None:
        self.t += 1
        ramp = min(1.0, self.t / self.warmup)
        for s, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            g, s.updates = gradient.double(), s.updates + 1
            if s.matrix:
                eta = self.lr * ramp
                s.z = s.z - eta * self.decay * s.z - self.matrix_step(s, g, eta)
            else:
                eta = self.aux_lr * ramp
                s.v = self.aux_beta2 * s.v + (1 - self.aux_beta2) * g * g
                d = (s.v / (1 - self.aux_beta2**s.updates)).sqrt() + 1e-8
                s.z = s.z - eta * (g / d + self.decay * s.z)
        weight = self.t**self.power * (self.lr * ramp) ** 2
        self.weight_sum += weight
        shrink = 1.0 if self.window is None else min(1.0, self.window * weight / self.weight_sum)
        self.weight_sum *= shrink
        # The window discounts the past only: the newest z keeps its weight.
        past = (self.weight_sum - weight) / (self.weight_sum / shrink - weight) if shrink < 1 else 1.0
        beta = self.beta(weight / self.weight_sum)
        for s in self.parameters:
            s.weighted_sum = past * s.weighted_sum + weight * s.z
            s.x = s.weighted_sum / self.weight_sum
            s.y = (1 - beta) * s.z + beta * s.x

    def matrix_step(self, s: Sequences, g: Tensor, eta: float) -> Tensor:
        raise NotImplementedError

    def beta(self, c: float) -> float:
        raise NotImplementedError


class SFNorMuonTwin(Twin):
    def matrix_step(self, s: Sequences, g: Tensor, eta: float) -> Tensor:
        m, n = g.shape
        s.momentum = 0.8 * s.momentum + 0.2 * g
        p = polar(s.momentum)
        s.v = 0.95 * s.v + 0.05 * (p * p).mean(dim=1)
        normed = p / (s.v.sqrt() + 1e-8).unsqueeze(1)
        length = float(normed.norm())
        return 0.2 * eta * math.sqrt(m * n) / length * normed if length else torch.zeros_like(p)

    def beta(self, c: float) -> float:
        return 0.9


class AMUSETwin(Twin):
    beta1, rho = 0.6, 0.8

    def matrix_step(self, s: Sequences, g: Tensor, eta: float) -> Tensor:
        s.momentum = 0.95 * s.momentum + 0.05 * g
        nesterov = 0.05 * g + 0.95 * s.momentum
        return eta * 0.2 * math.sqrt(max(g.shape)) * polar(nesterov)

    def beta(self, c: float) -> float:
        last_warm = max(2, self.warmup)
        if self.t <= last_warm:
            self.c_last_warm = c
            return self.beta1
        s = c * (1 - self.c_last_warm) / (self.c_last_warm * (1 - c))
        return 1 - min(1.0, s) ** self.rho * (1 - self.beta1)


class SFAdamWTwin(Twin):
    def beta(self, c: float) -> float:
        return 0.9
