"""SF-NorMuon: Muon's orthogonalised momentum, scaled neuron by neuron, under Schedule-Free averaging. The page is the
class's docstring. Source: arXiv 2605.23061, Algorithm 1; NorMuon, arXiv 2510.05491; Schedule-Free, arXiv 2405.15682.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from anytimed.optim.neuron_norm import NeuronNorm
from anytimed.optim.orthogonal import Coefficients
from anytimed.optim.rules import Momentum, Scales
from anytimed.optim.schedule_free import Group, ScheduleFree
from anytimed.optim.settings import LearningRate, adamw_options, averaging_options, half, orthogonal_options


class SFNorMuon(ScheduleFree):
    """SF-NorMuon for hidden matrices, Schedule-Free AdamW for the rest.

        optimizer = SFNorMuon(param_groups(model), lr=0.01)

    For a hidden matrix W, (m, n), rows = output neurons, with g the gradient at y:

        M     <- mu M + (1 - mu) g
        P      = polar(M)                                     five Newton-Schulz iterations
        v     <- beta2 v + (1 - beta2) mean over columns of P*P         (m,)
        Phat   = P / (sqrt(v) + eps)                          row by row
        ehat   = 0.2 eta_t sqrt(m n) / |Phat|_F               the update's RMS is 0.2 eta_t, AdamW's scale
        z     <- z - eta_t lambda z - ehat Phat               decay at z, never at y
        x     <- (1 - c_t) x + c_t z         y <- (1 - beta) z + beta x

    Everything else (embeddings, head, norms, biases) goes by Schedule-Free AdamW (`SFAdamW`) on the same clock.

        argument                default    the paper's    what it does
        lr                      0.01       0.008 to 0.01  eta: a number, a 0-d tensor or a function of t
        aux_lr                  lr / 2                    eta of everything that is not a hidden matrix
        beta                    0.8        0.9            where between z (0) and x (1) gradients are taken
        mu                      0.6        0.8            momentum; more is worse here: 0.95 cost 0.12 nats
        beta2                   0.95       0.95           memory of v
        weight_decay            0.1        0.05           lambda; the auxiliaries' too unless aux_weight_decay is given
        eps                     1e-8       1e-8
        warmup_steps            2000       2000           eta rises over these steps (and the decay with it: ours)
        aux_beta2               0.99                      AdamW's second moment
        orthogonal_dtype        by hardware               of the matrix products: bfloat16 where quick, else float32
        orthogonal_coefficients quintic                   or "polar_express" (arXiv 2505.16932): closer to orthogonal
        orthogonal_gram         False                     fewer products for long matrices, twice the error in bfloat16

    One set for every length of the run. The defaults of beta and mu are ours: 0.07 nats ahead of the paper's after
    1,000 steps of a byte model of 0.5 M parameters, 1,024 tokens a step (benchmarks/sensitivity.py); decay 0.05 was
    0.05 behind 0.1 there. With five times the steps, one seed and a smaller model beta 0.9 was 0.015 and no decay 0.04
    ahead (benchmarks/long_horizon.py). The paper found its own at 124 M to 772 M parameters; configs/llama-124m.toml
    has those.

    averaging_power, averaging_lr_power, averaging_window_steps, lean, compiled: `ScheduleFree`, common to all three.

    State: 14 bytes an element (z 4, x 4, momentum 4, compensation 2) and 4 a row for matrices; 14 an element (v for
    momentum) elsewhere. When to use: the default; served at any step.

    Source: arXiv 2605.23061, Algorithm 1; NorMuon, arXiv 2510.05491; Schedule-Free, arXiv 2405.15682.
    """

    row_moments: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 0.01,
        aux_lr: LearningRate | None = None,
        beta: float = 0.8,
        mu: float = 0.6,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        eps: float = 1e-8,
        warmup_steps: int = 2000,
        *,
        aux_beta2: float = 0.99,
        aux_weight_decay: float | None = None,
        aux_eps: float = 1e-8,
        averaging_power: float = 0.0,
        averaging_lr_power: float = 2.0,
        averaging_window_steps: int | None = None,
        orthogonal_dtype: torch.dtype | str | None = None,
        orthogonal_coefficients: Coefficients = "quintic",
        orthogonal_gram: bool = False,
        lean: bool = False,
        compiled: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            options={
                "spectral": {
                    "lr": lr,
                    "mu": mu,
                    "beta2": beta2,
                    "weight_decay": weight_decay,
                    "eps": eps,
                    "warmup_steps": warmup_steps,
                    **orthogonal_options(orthogonal_dtype, orthogonal_coefficients, orthogonal_gram),
                },
                "adamw": adamw_options(
                    half(lr) if aux_lr is None else aux_lr,
                    aux_beta2,
                    weight_decay if aux_weight_decay is None else aux_weight_decay,
                    aux_eps,
                    warmup_steps,
                ),
            },
            shared={
                "beta": beta,
                **averaging_options(averaging_power, averaging_lr_power, averaging_window_steps),
            },
            first_beta="beta",
            lean=lean,
            compiled=compiled,
        )

    def _momentum(self, group: Group) -> Momentum:
        return Momentum(group["mu"], nesterov=False)

    def _scales(self, group: Group) -> Scales:
        splits = group.get("row_splits")
        return NeuronNorm(group["beta2"], group["eps"], None if splits is None else tuple(splits))
