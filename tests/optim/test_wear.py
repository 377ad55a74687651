"""Wear: what a weight weighs after very many steps, with decay at z and without; and the metrics that show it.

Gradients of pure noise are the worst case: nothing but decay holds a weight. An update has the root mean square u;
those of S steps in a row agree, because momentum does. z then is a random walk of variance u^2 S a step, which decay
of eta lambda a step balances at

    rms(z)^2 = u^2 S / (2 eta lambda)            with a memory of 1 / (eta lambda) steps
    rms(z)^2 = u^2 S t                           without decay

For the matrices of SF-NorMuon u = 0.2 eta and S = (1 + mu) / (1 - mu) = 9, the sum of mu^|k| over all lags (polar
passes the correlations of momentum on almost as they are); for AdamW u = eta and S = 1. x, the mean of z_1 … z_t, has
a share of 2 / (eta lambda t) of the variance of z where z has a memory, and 1/3 where it wanders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from anytimed.optim import ScheduleFree, SFNorMuon

LR, AUX_LR, BETA, MU, DECAY = 0.01, 0.005, 0.9, 0.8, 0.05  # as published, and lr / 2 for the auxiliaries
SPECTRAL, ADAMW = "spectral", "adamw"
STEP = {SPECTRAL: 0.2 * LR * 3.0, ADAMW: AUX_LR}  # u sqrt(S)
RATE = {SPECTRAL: LR * DECAY, ADAMW: AUX_LR * DECAY}
SIZES = {SPECTRAL: (8, 24), ADAMW: (192,)}


def rms(t: Tensor) -> float:
    return float(t.norm()) / math.sqrt(t.numel())


def noise(steps: int, every: int, decay: float) -> Iterator[tuple[int, ScheduleFree, dict[str, nn.Parameter]]]:
    """A matrix and a vector that get noise for gradients; a look at them now and then."""
    generator = torch.Generator().manual_seed(0)
    params = {rule: nn.Parameter(0.02 * torch.randn(size, generator=generator)) for rule, size in SIZES.items()}
    optimizer = SFNorMuon(
        [{"rule": rule, "params": [p]} for rule, p in params.items()],
        lr=LR,
        aux_lr=AUX_LR,
        beta=BETA,
        mu=MU,
        weight_decay=decay,
        warmup_steps=1,
        orthogonal_dtype="float32",
    )
    for t in range(every, steps + 1, every):
        drawn = zip(*(torch.randn(every, *p.shape, generator=generator).unbind() for p in params.values()), strict=True)
        for given in drawn:
            for p, g in zip(params.values(), given, strict=True):
                p.grad = g
            optimizer.step()
        yield t, optimizer, params


@pytest.fixture(autouse=True)
def small_sizes() -> None:
    """Instead of the fixture that cuts small tensors into pieces, which takes half as long again: sizes as they are."""


@pytest.mark.timeout(900)  # 40 s on a free core
def test_decay_at_z_bounds_the_weights_over_a_hundred_thousand_steps() -> None:
    steps, settled = 100_000, 20_000  # ten and five times 1 / (eta lambda) = 2,000 and 4,000 steps
    balance = {rule: STEP[rule] / math.sqrt(2 * RATE[rule]) for rule in SIZES}  # 0.19 and 0.22
    seen: dict[str, list[float]] = {rule: [] for rule in SIZES}
    for t, optimizer, params in noise(steps, 1000, DECAY):
        z, x = optimizer.iterate(), optimizer.averaged()
        for rule, p in params.items():
            # 192 numbers of one variance: their rms is within 5 % of it at two looks in three, and never 30 % off.
            assert rms(z[p]) < 1.3 * balance[rule], f"z of {rule} after {t} steps"
            assert rms(x[p]) < balance[rule], f"x of {rule} after {t} steps"
            if t >= settled:
                seen[rule].append(rms(z[p]) ** 2)
    for rule, squares in seen.items():
        found = math.sqrt(sum(squares) / len(squares))
        # polar passes the correlations of momentum on a little weakened (found: 0.963 of the sum above; AdamW: 1.001).
        assert found == pytest.approx(balance[rule], rel=0.08), rule
        # No trend: 40 looks each, half of them independent (1,000 steps between them, a memory as long) at 5 % each
        # make 1 % by chance; the singular directions of a matrix turn more slowly than its numbers do (found: 5.5 %).
        half = len(squares) // 2
        halves = [math.sqrt(sum(part) / len(part)) for part in (squares[:half], squares[half:])]
        assert halves[0] == pytest.approx(halves[1], rel=0.12), rule
        # One look at 192 numbers: 5 %.
        assert rms(x[params[rule]]) == pytest.approx(balance[rule] * math.sqrt(2 / (RATE[rule] * steps)), rel=0.2), rule
        print(f"{rule}: rms(z) {found:.4f}, expected {balance[rule]:.4f}; halves {halves[0]:.4f}, {halves[1]:.4f}")
        told = optimizer.metrics()  # the same, for little: float32 norms, and z of both together
        assert float(told[f"{rule}_weight_norm"]) == pytest.approx(rms(x[params[rule]]) * 192**0.5, rel=1e-5)
        assert float(told["z_norm"]) == pytest.approx(math.hypot(*(float(t.norm()) for t in z.values())), rel=1e-5)
        if rule == SPECTRAL:
            assert float(told["spectral_update_rms"]) == pytest.approx(0.2 * LR, rel=1e-5)
        else:  # g / D has a mean square of 1 over time; one look at 192 numbers
            assert float(told["adamw_update_rms"]) == pytest.approx(AUX_LR, rel=0.2)


def test_without_decay_they_grow_like_the_root_of_the_steps() -> None:
    """The counterpart: what the test above allows is passed at once, and it can fail."""
    for t, optimizer, params in noise(10_000, 2500, 0.0):
        z, x = optimizer.iterate(), optimizer.averaged()
        for rule, p in params.items():
            # 5 % by chance, 5 % for what polar does to the correlations, and what comes before momentum has filled
            assert rms(z[p]) == pytest.approx(STEP[rule] * math.sqrt(t), rel=0.15), (rule, t)
            assert rms(x[p]) == pytest.approx(STEP[rule] * math.sqrt(t / 3), rel=0.15), (rule, t)
            if t == 10_000:
                assert rms(z[p]) > 2 * STEP[rule] / math.sqrt(2 * RATE[rule])
