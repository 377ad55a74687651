"""AMUSE: Muon with Nesterov momentum under Schedule-Free averaging whose gradient point moves from z towards x.

The page is the class's docstring. Source: arXiv 2605.22432.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from anytimed.optim.neuron_norm import row_norms
from anytimed.optim.orthogonal import Coefficients
from anytimed.optim.rules import Momentum, Scaled, Scales
from anytimed.optim.schedule_free import Group, ScheduleFree
from anytimed.optim.settings import LearningRate, adamw_options, averaging_options, half, orthogonal_options


@dataclass(frozen=True, slots=True)
class SpectralScale:
    """How far AMUSE moves: `rules.Scales`. Every block of rows by eta s, with s from its own shape; no v."""

    scale: Literal["match_rms", "spectral"]
    row_splits: tuple[int, ...] | None

    def of(self, m: int, n: int) -> float:
        """s of a matrix (m, n)."""
        return float(0.2 * max(m, n) ** 0.5 if self.scale == "match_rms" else max(1.0, m / n) ** 0.5)

    def rows(self, m: int, n: int, eta: Tensor) -> Tensor:
        """What every row of P is multiplied by: (m,)."""
        return torch.cat([(eta * self.of(rows, n)).expand(rows) for rows in self.row_splits or (m,)])

    def __call__(self, p: Tensor, v: Tensor, eta: Tensor) -> Scaled:
        b, m, n = p.shape
        scale = self.rows(m, n, eta)
        return Scaled(scale.view(1, -1, 1).expand(b, -1, -1), (row_norms(p) * scale).square().sum(dim=1), None)


class AMUSE(ScheduleFree):
    """AMUSE for hidden matrices, Schedule-Free AdamW for the rest.

        optimizer = AMUSE(param_groups(model), lr=0.02)

    For a hidden matrix W, (m, n), with g the gradient at y:

        M     <- mu M + (1 - mu) g            U = (1 - mu) g + mu M
        O      = s polar(U)                   s = 0.2 sqrt(max(m, n)), or sqrt(max(1, m / n))
        z     <- (1 - eta_t lambda) z - eta_t O
        x     <- (1 - c_t) x + c_t z          y <- (1 - beta_t) z + beta_t x
        beta_t = beta1                                    while t <= T0, T0 = warm-up length, at least 2
        beta_t = 1 - S_t^rho (1 - beta1)                  afterwards, S_t = min(1, W_{T0-1} / W_{t-1})

    With equal weights S_t = (T0 - 1) / (t - 1): gradients are first taken near z (fast), later near x (calm). The ratio
    of sums is the paper's S_t at a constant learning rate; it also stands where w_t dips to 0, and the clamp keeps
    beta_t >= beta1 when the past is discounted (`forget`). x is stored, so no beta ever decodes it (a lean one is
    decoded with the beta that encoded it).

    Everything else goes by Schedule-Free AdamW (`SFAdamW`) on the same clock.

        argument                default     the paper's   what it does
        lr                      0.02                      eta: a number, a 0-d tensor or a function of t
        aux_lr                  lr / 2                    eta of everything that is not a hidden matrix
        beta1                   0.6         0.6           where between z (0) and x (1) gradients are taken in warm-up
        mu                      0.7         0.95          momentum
        rho                     0.2         0.8 at 124M   0 keeps beta_t at beta1, 1 keeps the averaging window of T0
        weight_decay            0.1                       lambda; the auxiliaries' too unless aux_weight_decay is given
        warmup_steps            2000                      eta rises over these steps
        scale                   match_rms                 s: "match_rms" 0.2 sqrt(max(m, n)), AdamW's update RMS, as the
                                                          auxiliaries have here; "spectral" sqrt(max(1, m / n))
        aux_beta2               0.99        0.999         AdamW's second moment
        orthogonal_*                                      as in `SFNorMuon`

    One set for every length of the run. The defaults of mu and rho are ours, chosen for 250 and 1,000 steps together of
    a byte model of 0.5 M parameters, 1,024 tokens a step (benchmarks/sensitivity.py); the paper's mu cost 0.16 nats
    after 1,000 and its rho 0.20, each alone. Its authors' own, for 124 M and 720 M, are in configs/llama-*.toml.

    averaging_power, averaging_lr_power, averaging_window_steps, lean, compiled: `ScheduleFree`, common to all three.

    State: 14 bytes an element everywhere (z 4, x 4, momentum or v 4, compensation 2). When to use: to compare with
    SF-NorMuon; its gradients are taken nearer the fast iterate at first, and it keeps no second moment for matrices.

    Source: arXiv 2605.22432.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 0.02,
        aux_lr: LearningRate | None = None,
        beta1: float = 0.6,
        mu: float = 0.7,
        rho: float = 0.2,
        weight_decay: float = 0.1,
        warmup_steps: int = 2000,
        *,
        scale: Literal["match_rms", "spectral"] = "match_rms",
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
                    "scale": scale,
                    "weight_decay": weight_decay,
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
                "beta1": beta1,
                "rho": rho,
                **averaging_options(averaging_power, averaging_lr_power, averaging_window_steps),
            },
            first_beta="beta1",
            lean=lean,
            compiled=compiled,
        )

    def _momentum(self, group: Group) -> Momentum:
        return Momentum(group["mu"], nesterov=True)

    def _scales(self, group: Group) -> Scales:
        splits = group.get("row_splits")
        return SpectralScale(group["scale"], None if splits is None else tuple(splits))

    def _next_beta(self, group: Group, t: Tensor, weight_sum: Tensor, reference_sum: Tensor, last_warm: int) -> Tensor:
        # W_{t-1} is 0 only where every learning rate was: nothing has been averaged, and S_t is 1.
        share = torch.where(weight_sum > 0, reference_sum / weight_sum, torch.ones_like(weight_sum)).clamp(max=1.0)
        moving = 1.0 - share.pow(group["rho"]) * (1.0 - group["beta1"])
        return torch.where(t <= last_warm, torch.full_like(moving, group["beta1"]), moving)
