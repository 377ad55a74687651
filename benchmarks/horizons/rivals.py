"""What a run is compared with: optimizers whose learning rate follows a schedule that knows the horizon.

    AdamWCosine      AdamW, linear warm-up, cosine to zero
    NorMuonCosine    NorMuon (arXiv 2510.05491) for the hidden matrices, AdamW for the rest, the same schedule
    MuonWSD          Muon for the hidden matrices, AdamW for the rest; warm-up, constant, and over the last fifth
                     1 - sqrt down to zero (arXiv 2405.18392)

They are not ours, and only the benchmark has them. AdamW is torch's own. NorMuon is `SFNorMuon`, and Muon is `AMUSE`,
with a memory of one step, so that x = y = z: then rule, kernels and roles are those of the runs they are compared with,
and averaging is all that differs. (A test compares it with torch's Muon, which always iterates in bfloat16: a step of
the model here takes that 0.55 s on a processor without such instructions, and this 0.1 s.)

Each is a recipe that the daemon builds from a table, `type = "horizons.rivals:AdamWCosine"`, and a learner trains with
it as with any other; there is no x beside the weights, so averaged and fast iterate are the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim import AdamW, Optimizer

from anytimed.optim import AMUSE, ScheduleFree, SFNorMuon
from anytimed.training.optimizers import Recipe

DECAYED_SHARE: Final = 0.2
"""Of the horizon, over which warmup-stable-decay lets the learning rate fall."""


def cosine(step: int, horizon: int, warmup: int) -> float:
    """The factor on the learning rate at a step, from 1: linear warm-up, then half a cosine, zero at horizon + 1."""
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (horizon + 1 - warmup)))


def stable_then_decay(step: int, horizon: int, warmup: int) -> float:
    """Linear warm-up, constant, then 1 - sqrt over the last fifth, zero at horizon + 1."""
    since = step - (horizon - round(DECAYED_SHARE * horizon))
    if since > 0:
        return 1 - math.sqrt(since / (round(DECAYED_SHARE * horizon) + 1))
    return min(1.0, step / warmup) if warmup else 1.0


class Scheduled:
    """Optimizers that share the parameters between them, under one schedule: what a `Learner` asks of an optimizer.

    schedule: from the number of the step, from 1, the factor on every learning rate. State tensors are told by
    parameter, the weights among them as `z`: a commit holds them and a resume puts them back."""

    lean: ClassVar[bool] = False

    def __init__(self, optimizers: Sequence[Optimizer], schedule: Callable[[int], float]) -> None:
        self._optimizers, self._schedule = list(optimizers), schedule
        self._groups = [(g, g["lr"]) for optimizer in self._optimizers for g in optimizer.param_groups]
        self._params = [p for g, _ in self._groups for p in g["params"]]
        self._taken = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, *, gate: Tensor, loss: Tensor | None = None) -> None:
        """One step; none where the gate is False: it is looked at, which waits for a device."""
        if not gate:
            return
        self._taken += 1
        factor = self._schedule(self._taken)
        for group, lr in self._groups:
            group["lr"] = lr * factor
        for optimizer in self._optimizers:
            optimizer.step()

    @property
    def state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        found: dict[Tensor, dict[str, Tensor]] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    kept = {name: value for name, value in optimizer.state[p].items() if isinstance(value, Tensor)}
                    found[p] = {**kept, "z": p.detach()}
        return found

    def averaged(self) -> dict[Tensor, Tensor]:
        return {p: p.detach() for p in self._params}

    iterate = averaged

    def metrics(self) -> dict[str, Tensor]:
        return {"c": torch.ones(()), "eta": torch.tensor(self._groups[0][0]["lr"])}

    def memory_steps(self) -> Tensor:
        return torch.ones(())

    def forget(self, factor: float) -> None:
        """There is nothing to forget."""

    def begin(self) -> None:
        """The weights are the parameters; what ours keep of their own has to follow them."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, ScheduleFree):
                optimizer.begin()

    def restore_y(self) -> None:
        """Nothing is derived from the state."""

    def clock_state(self) -> list[dict[str, int | float]]:
        return [{"t": self._taken}]

    def load_clock_state(self, clocks: Sequence[Mapping[str, int | float]]) -> None:
        if int(clocks[0]["t"]):
            raise ValueError("a scheduled run is taken from its start: its moments are made at its first step")

    def arithmetic(self) -> dict[str, str]:
        return {}

    def load_arithmetic(self, arithmetic: Mapping[str, str]) -> None:
        """Nothing was decided."""


class _Settings(BaseModel):
    """No defaults: the table of a run says all that decides it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    horizon: int = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    lr: float = Field(gt=0)
    weight_decay: float
    beta1: float
    beta2: float
    lean: ClassVar[bool] = False


class _MatrixSettings(_Settings):
    aux_lr: float = Field(gt=0)
    mu: float


class _Rival(Recipe):
    """A recipe of the entry points `anytimed.optimizers`; `parts` are its optimizers, one after the other."""

    shape: ClassVar[Callable[[int, int, int], float]] = staticmethod(cosine)
    parts: ClassVar[Callable[[Any, list[dict[str, Any]], list[Tensor]], list[Optimizer]]]

    @classmethod
    def optimizer(cls, groups: list[dict[str, Any]], **numbers: Any) -> Scheduled:
        """From groups as `param_groups` makes them, and the settings."""
        told, shape = cls.Settings(**numbers), cls.shape
        matrices = [group for group in groups if group["rule"] == "spectral"]
        others = [p for group in groups if group["rule"] == "adamw" for p in group["params"]]
        return Scheduled(cls.parts(told, matrices, others), lambda t: shape(t, told.horizon, told.warmup_steps))


def _adamw(told: _Settings, params: list[Tensor], lr: float) -> AdamW:
    return AdamW(params, lr=lr, betas=(told.beta1, told.beta2), weight_decay=told.weight_decay)


def _all_adamw(told: _Settings, matrices: list[dict[str, Any]], others: list[Tensor]) -> list[Optimizer]:
    return [_adamw(told, [*(p for group in matrices for p in group["params"]), *others], told.lr)]


WITHOUT_MEMORY: Final[dict[str, Any]] = {
    "warmup_steps": 0,
    "averaging_window_steps": 1,
    "averaging_lr_power": 0.0,
}
"""x is z, and the schedule is all that moves the learning rate."""


def _spectral(made: Callable[..., Optimizer]) -> Callable[..., list[Optimizer]]:
    """The parts of a rival whose hidden matrices go by `made`, at z, and whose other parameters by AdamW."""

    def parts(told: _MatrixSettings, matrices: list[dict[str, Any]], others: list[Tensor]) -> list[Optimizer]:
        numbers = {"lr": told.lr, "mu": told.mu, "weight_decay": told.weight_decay}
        return [made(matrices, **numbers, **WITHOUT_MEMORY), _adamw(told, others, told.aux_lr)]

    return parts


class AdamWCosine(_Rival):
    Settings = _Settings
    parts = staticmethod(_all_adamw)


class NorMuonCosine(_Rival):
    Settings = _MatrixSettings
    parts = staticmethod(_spectral(partial(SFNorMuon, beta=0.0)))


class MuonWSD(_Rival):
    Settings = _MatrixSettings
    shape = staticmethod(stable_then_decay)
    parts = staticmethod(_spectral(partial(AMUSE, beta1=0.0, rho=0.0)))
