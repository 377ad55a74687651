"""x, y and z of every optimizer against the slow float64 twins, for every kind of parameter; what beta_t does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anytimed.optim import AMUSE
from tests.optim.cases import ROLES, build, gradients, parameters, walk
from tests.reference.schedule_free import AMUSETwin, SFAdamWTwin, SFNorMuonTwin, Twin

TWINS: dict[str, type[Twin]] = {"sf_normuon": SFNorMuonTwin, "amuse": AMUSETwin, "sf_adamw": SFAdamWTwin}

LR = {"sf_normuon": 0.01, "amuse": 0.02, "sf_adamw": 0.0025}
AUX_LR = {"sf_normuon": 0.005, "amuse": 0.01, "sf_adamw": 0.0025}

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"warmup_steps": 40}, {"warmup": 40}),
    "no warm-up": ({"warmup_steps": 0}, {"warmup": 1}),
    "no decay": ({"warmup_steps": 40, "weight_decay": 0.0}, {"warmup": 40, "decay": 0.0}),
    "power": ({"warmup_steps": 40, "averaging_power": 1.5}, {"warmup": 40, "power": 1.5}),
    "window": ({"warmup_steps": 40, "averaging_window_steps": 60}, {"warmup": 40, "window": 60}),
}


def relative(found: Tensor, exact: Tensor, start: Tensor) -> float:
    """The error as a share of how far the parameter has come."""
    return float((found.double() - exact).norm() / (exact - start.double()).norm())


# The paper writes AMUSE's S_t for equal weights: no twin for it where weights are of another kind.
ROWS = [(kind, s) for kind in TWINS for s in SETTINGS if kind != "amuse" or s not in ("power", "window")]


@pytest.mark.parametrize(("kind", "settings"), ROWS)
def test_all_three_sequences_follow_the_twin(kind: str, settings: str) -> None:
    ours, theirs = SETTINGS[settings]
    params = parameters()
    start = {name: p.detach().clone() for name, p in params.items()}
    optimizer = build(kind, params, **ours)
    twin = TWINS[kind](
        [
            (p.detach().reshape(p.shape[0], -1) if is_matrix(kind, name) else p, is_matrix(kind, name))
            for name, p in params.items()
        ],
        **{"lr": LR[kind], "aux_lr": AUX_LR[kind], "decay": 0.05, "aux_beta2": 0.99, **theirs},
    )
    for given in gradients(params, 300 if settings == "plain" else 120):
        for name, p in params.items():
            p.grad = given[name]
        optimizer.step()
        twin.step([g.reshape(g.shape[0], -1) if is_matrix(kind, name) else g for name, g in given.items()])

    for (name, p), exact in zip(params.items(), twin.parameters, strict=True):
        # Gradients are given, so no error feeds back. z is rounded to 6e-8 of itself at each step, at random: sqrt(300)
        # of that over a distance of a tenth of |z| is 1e-5 (found: 3e-6). Newton-Schulz amplifies the rounding of the
        # smallest singular directions by up to 485 (a slope of 3.4445 at 0, five times): 485 * 6e-8 = 3e-5 at worst.
        bound = 3e-5 if is_matrix(kind, name) else 1e-5
        for found, expected in (
            (optimizer.state[p]["z"], exact.z),
            (optimizer.state[p]["x"], exact.x),
            (p.detach(), exact.y),
        ):
            assert relative(found, expected.reshape(p.shape), start[name]) < bound, name


def is_matrix(kind: str, name: str) -> bool:
    return kind != "sf_adamw" and ROLES[name] == "matrix"


@pytest.mark.parametrize("kind", TWINS)
def test_parameters_in_bfloat16_hold_the_rounded_y_of_a_float32_run(kind: str) -> None:
    low = parameters(torch.bfloat16)
    high = {name: torch.nn.Parameter(p.detach().float()) for name, p in low.items()}
    optimizers = build(kind, low), build(kind, high)
    for given in gradients(low, 100):
        for params, optimizer in zip((low, high), optimizers, strict=True):
            for name, p in params.items():
                p.grad = given[name].to(p.dtype)
            optimizer.step()
    for name, p in low.items():
        for key in ("z", "x"):
            assert torch.equal(optimizers[0].state[p][key], optimizers[1].state[high[name]][key]), (name, key)
        assert torch.equal(p, high[name].bfloat16()), name


def test_beta_follows_the_sums_and_the_paper_at_equal_weights() -> None:
    """S_t = (T0 - 1) / (t - 1) with equal weights, which no warm-up gives: T0 is then 2."""
    params = parameters()
    optimizer = build("amuse", params, warmup_steps=0, rho=0.8)
    betas = []
    for given in gradients(params, 50):
        for name, p in params.items():
            p.grad = given[name]
        optimizer.step()
        betas.append(optimizer.clock_state()[0]["beta"])
    expected = [0.6, 0.6, *(1 - (1 / (t - 1)) ** 0.8 * 0.4 for t in range(3, 51))]
    assert betas == pytest.approx(expected, rel=1e-12)  # float64 throughout
    assert betas == sorted(betas)


def test_amuse_keeps_beta_at_least_beta1_when_the_past_is_discounted() -> None:
    """A window of 5 put in later holds less than warm-up did: S_t is 1.235 unclamped, beta_t would be 0.506."""
    params = parameters()
    optimizer = build("amuse", params, warmup_steps=20, rho=1.0)
    walk(optimizer, params, 60)
    for group in optimizer.param_groups:
        group["averaging_window_steps"] = 5
    walk(optimizer, params, 2)
    assert optimizer.clock_state()[0]["beta"] == 0.6

    params = parameters()
    optimizer = build("amuse", params, warmup_steps=20, rho=1.0)
    walk(optimizer, params, 100)
    before = optimizer.clock_state()[0]["beta"]
    for _ in range(10):
        optimizer.forget(0.05)
    walk(optimizer, params, 1)
    after = optimizer.clock_state()[0]["beta"]
    # forget stops at the sum of T0, which is W_{T0-1} and one full weight: S_t follows to that ratio, in float64.
    at_last_warm = sum((t / 20) ** 2 for t in range(1, 20))
    assert after == pytest.approx(1 - at_last_warm / (at_last_warm + 1) * 0.4, rel=1e-12)
    assert 0.6 < after < before < 1.0


@pytest.mark.parametrize(("shape", "ratio"), [((8, 8), 1 / (0.2 * 8**0.5)), ((32, 2), 4 / (0.2 * 32**0.5))])
def test_the_scale_of_amuse_is_one_of_two(shape: tuple[int, int], ratio: float) -> None:
    steps = []
    for scale in ("spectral", "match_rms"):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer = AMUSE([{"rule": "spectral", "params": [p]}], warmup_steps=1, scale=scale)
        optimizer.step()
        steps.append(float(optimizer.iterate()[p].norm()))
    assert steps[0] / steps[1] == pytest.approx(ratio, rel=1e-6)  # float32
