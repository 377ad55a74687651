"""The Schedule-Free AdamW rule: what moves z of everything that is not a hidden matrix.

    v <- beta2 v + (1 - beta2) g*g         D = sqrt(v / (1 - beta2^u)) + eps         z <- z - eta_t (g / D + lambda z)

u counts the updates *that parameter* received. There is no first moment: the averaging plays its part. `second_moment_`
and `direction` work on any piece of a stack; the sweep applies eta_t and the decay, for every rule alike. Source:
Schedule-Free, arXiv 2405.15682, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anytimed.optim.averaging import settle_
from anytimed.optim.scratch import Scratch


def second_moment_(v: Tensor, g: Tensor, beta2: float, active: Tensor | None, scratch: Scratch) -> None:
    """v <- beta2 v + (1 - beta2) g*g where active. v, g: float32, one shape; g may hold anything where not active."""
    if active is None:
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
    else:
        work = torch.mul(v, beta2, out=scratch.take("work", v.shape)).addcmul_(g, g, value=1.0 - beta2)
        settle_(v, work, active)


def correction(updates: Tensor, beta2: float) -> Tensor:
    """1 / (1 - beta2^u), float32, of every parameter. updates: u, int64; infinite only where a parameter never had a
    gradient. A factor, so that no element has to be divided by it."""
    return (1.0 - torch.pow(beta2, updates.to(torch.float64))).reciprocal_().to(torch.float32)


def denominator(v: Tensor, corrected_by: Tensor, eps: float, out: Tensor) -> Tensor:
    """D, of v's shape, into `out`. corrected_by: `correction`, broadcast over v."""
    return root_(torch.mul(v, corrected_by, out=out)).add_(eps)


def root_(x: Tensor) -> Tensor:
    """sqrt(x), in place, as 1 / rsqrt(x); 0 for 0.

    On a CPU torch.sqrt is another library's, which rounds otherwise from one processor to the next, and takes longer
    (measured); rsqrt and a reciprocal are torch's own.
    """
    return x.rsqrt_().reciprocal_()


def direction(v: Tensor, g: Tensor, corrected_by: Tensor, eps: float, scratch: Scratch) -> Tensor:
    """g / D, of v's shape, in scratch memory."""
    d = denominator(v, corrected_by, eps, scratch.take("direction", v.shape))
    return torch.div(g, d, out=d)
