"""The Schedule-Free AdamW rule: what moves z of everything that is not a hidden matrix.

    v <- beta2 v + (1 - beta2) g*g         D = sqrt(v / (1 - beta2^u)) + eps         z <- z - eta_t (g / D + lambda z)

u counts the updates *that parameter* received. There is no first moment: the averaging plays its part. (The decay is
added by the base class, for every rule alike.) Source: Schedule-Free, arXiv 2405.15682, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anytimed.optim.averaging import settle_
from anytimed.optim.scratch import Scratch
from anytimed.optim.stacks import FlatStack


def denominator(stack: FlatStack, v: Tensor, updates: Tensor, beta2: float, eps: float, out: Tensor) -> Tensor:
    """D = sqrt(v / (1 - beta2^u)) + eps. v, out: (N,) and may be the same; updates: (k,), u of every parameter."""
    correction = (1.0 - torch.pow(beta2, updates.to(torch.float64))).to(torch.float32)
    return torch.div(v, stack.spread(correction), out=out).sqrt_().add_(eps)


def adamw_step(
    stack: FlatStack, g: Tensor, eta: Tensor, active: Tensor | None, scratch: Scratch, *, beta2: float, eps: float
) -> Tensor:
    """Takes g in and returns eta_t g / D, (N,), in g's memory.

    g: (N,) float32, may hold anything where not active. Changes `stack.v` and `stack.updates` where active.
    """
    work = torch.mul(stack.v, beta2, out=scratch.take("work", g.shape)).addcmul_(g, g, value=1.0 - beta2)
    settle_(stack.v, work, stack.mask(active))
    stack.updates.add_(1 if active is None else active)
    d = denominator(stack, stack.v, stack.updates, beta2, eps, work)
    return g.div_(d).mul_(eta)
