"""Schedule-Free AdamW for every parameter: the baseline, and the rule of the other optimizers' auxiliaries.

    v     <- beta2 v + (1 - beta2) g*g                  g the gradient at y
    D      = sqrt(v / (1 - beta2^t)) + eps
    z     <- z - eta_t (g / D + lambda z)
    x     <- (1 - c_t) x + c_t z         y <- (1 - beta) z + beta x

    argument                the paper's value    what it does
    lr                      0.0025               eta
    beta                    0.9                  where between z (0) and x (1) gradients are taken; stands for momentum
    beta2                   0.999 (0.99 ours)    second moment
    weight_decay            0                    lambda (0.05 here, as for the spectral optimizers)
    eps                     1e-8
    warmup_steps            2000 (ours)          eta rises over these steps
    averaging_*                                  as in `sf_normuon`

Groups of any rule are accepted and all go by AdamW, so that the same `param_groups` serve a comparison; plain
parameters are accepted as well.

State: 14 bytes an element (z 4, x 4, v 4, compensation 2). When to use: as the baseline, and for models
without hidden matrices.

Source: Schedule-Free, arXiv 2405.15682, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from anytimed.optim.schedule_free import Group, ScheduleFree
from anytimed.optim.settings import adamw_options, averaging_options


class SFAdamW(ScheduleFree):
    """Schedule-Free AdamW. Arguments: this module's docstring."""

    rules: ClassVar[tuple[str, ...]] = ("adamw",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0025,
        beta: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0.05,
        eps: float = 1e-8,
        warmup_steps: int = 2000,
        *,
        averaging_power: float = 0.0,
        averaging_lr_power: float = 2.0,
        averaging_window_steps: int | None = None,
    ) -> None:
        super().__init__(
            params,
            options={
                "adamw": adamw_options(lr, beta2, weight_decay, eps, warmup_steps),
            },
            shared={
                "beta": beta,
                **averaging_options(averaging_power, averaging_lr_power, averaging_window_steps),
            },
            first_beta="beta",
            orthogonal_dtype=None,
        )

    def _rule_of(self, group: Group) -> str:
        return "adamw"
