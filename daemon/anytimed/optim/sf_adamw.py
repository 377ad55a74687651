"""Schedule-Free AdamW for every parameter: the baseline, and the rule of the other optimizers' auxiliaries. The page is
the class's docstring. Source: Schedule-Free, arXiv 2405.15682, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from anytimed.optim.averaging import Clock, settle_
from anytimed.optim.polyak import gamma, take_in
from anytimed.optim.schedule_free import Group, Member, ScheduleFree
from anytimed.optim.settings import POLYAK, LearningRate, adamw_options, averaging_options
from anytimed.optim.stacks import FlatStack


class SFAdamW(ScheduleFree):
    """Schedule-Free AdamW for every parameter.

        optimizer = SFAdamW(model.parameters(), lr=0.0025)

        v     <- beta2 v + (1 - beta2) g*g                  g the gradient at y
        D      = sqrt(v / (1 - beta2^u)) + eps              u counts the updates that this parameter received
        z     <- z - eta_t (g / D + lambda z)
        x     <- (1 - c_t) x + c_t z         y <- (1 - beta) z + beta x

        argument                the paper's value    what it does
        lr                      0.0025               eta: a number, a 0-d tensor, a function of t, or "polyak"
        beta                    0.9                  where between z (0) and x (1) gradients are taken; its momentum
        beta2                   0.999 (0.99 ours)    second moment
        weight_decay            0                    lambda (0.05 here)
        eps                     1e-8
        warmup_steps            2000 (ours)          eta rises over these steps
        polyak_lower_bound      0                    l*, what the loss stays above
        polyak_floor            1e-8                 G_min, the least squared gradient norm it divides by

    `lr="polyak"` measures eta at every step, and then steps weigh alike (c_t = 1 / t):

        eta_t  = max(0, f(y) - l* + beta <g, z - x>) / max(|g|^2_{D^-1}, G_min)      times the warm-up's ramp

    It needs f(y): a closure that returns it, or step(loss=loss); and gradients as they are, for a clipped one is a
    smaller measure and makes the step longer. Source: arXiv 2511.07767.

    averaging_power, averaging_lr_power, averaging_window_steps, lean, compiled: `ScheduleFree`, common to all three.

    Groups of any rule are accepted and all go by AdamW, so that the same `param_groups` serve a comparison; plain
    parameters are accepted as well.

    State: 14 bytes an element (z 4, x 4, v 4, compensation 2). When to use: as the baseline, and for models without
    hidden matrices.

    Source: Schedule-Free, arXiv 2405.15682, Algorithm 1.
    """

    rules: ClassVar[tuple[str, ...]] = ("adamw",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate | Literal["polyak"] = 0.0025,
        beta: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0.05,
        eps: float = 1e-8,
        warmup_steps: int = 2000,
        *,
        polyak_lower_bound: float = 0.0,
        polyak_floor: float = 1e-8,
        averaging_power: float = 0.0,
        averaging_lr_power: float = 2.0,
        averaging_window_steps: int | None = None,
        lean: bool = False,
        compiled: bool | None = None,
    ) -> None:
        self._gamma: Tensor | None = None  # the last Polyak step's, for `metrics`
        super().__init__(
            params,
            options={
                "adamw": adamw_options(lr, beta2, weight_decay, eps, warmup_steps),
            },
            shared={
                "beta": beta,
                "polyak_lower_bound": polyak_lower_bound,
                "polyak_floor": polyak_floor,
                **averaging_options(averaging_power, averaging_lr_power, averaging_window_steps),
            },
            first_beta="beta",
            lean=lean,
            compiled=compiled,
        )

    def _rule_of(self, group: Group) -> str:
        return "adamw"

    def _measured_eta(
        self,
        clock: Clock,
        members: list[Member],
        gate: Tensor | None,
        grad_scale: Tensor | None,
        loss: Tensor | float | None,
    ) -> Tensor | None:
        polyak = [isinstance(group["lr"], str) for _, group, _ in members]
        if not any(polyak):
            return None
        if not all(polyak):
            raise ValueError(
                f"SFAdamW: groups of one clock have lr {[g['lr'] for _, g, _ in members]}, expected "
                f'"{POLYAK}" in all or in none: there is one Polyak step for all of them'
            )
        if loss is None:
            raise ValueError(f'SFAdamW: lr="{POLYAK}" needs the loss: step(loss=loss), or a closure that returns it')
        beta = clock.beta.to(torch.float32)
        sums = [
            told
            for _, group, stacks in members
            for stack in stacks
            if isinstance(stack, FlatStack)
            and (
                told := take_in(
                    stack,
                    gate,
                    grad_scale,
                    beta,
                    self._walk.scratch,
                    beta2=group["beta2"],
                    eps=group["eps"],
                )
            )
            is not None
        ]
        _, driver, _ = members[0]
        if self._gamma is None:
            self._gamma = torch.zeros_like(clock.beta)
        if not sums:
            settle_(self._gamma, torch.zeros_like(clock.beta), gate)
            return torch.zeros_like(clock.beta)
        at_y = loss.detach().reshape(()) if isinstance(loss, Tensor) else clock.beta.new_full((), loss)
        step = gamma(
            at_y.to(clock.beta.device),
            clock.beta,
            sums,
            lower_bound=driver["polyak_lower_bound"],
            floor=driver["polyak_floor"],
        )
        eta = clock.eta(step, driver["warmup_steps"])
        settle_(self._gamma, eta, gate)
        return eta

    def _last_eta(self, clock: Clock, driver: Group) -> Tensor:
        if not isinstance(driver["lr"], str):
            return super()._last_eta(clock, driver)
        return torch.zeros_like(clock.beta) if self._gamma is None else self._gamma
