"""What a step does to every element once the rule has said where z goes: z moves, x averages, y is computed.

One function, `sweep_` (`compiled` has it for a compiler), on views of one shape, so that a caller may hand it a whole
stack or a piece that fits the cache. In order: z <- z - eta lambda z - scale * direction; x <- (1 - c) x + c z,
compensated; y <- (1 - beta) z + beta x. A lean caller has no x: it is recovered from y and z before z moves, averaged,
and goes back into y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from anytimed.optim.averaging import average_, gradient_point, recover, settle_
from anytimed.optim.scratch import Scratch


@dataclass(frozen=True, slots=True)
class Pace:
    """The scalars of a step, 0-d float32 on the device.

    minus_decay     -eta_t lambda; None where lambda is 0
    c               c_t
    beta            beta_t, which encodes the new y
    last_beta       beta_{t-1}, which decodes x from the old y; None unless lean
    gate            0-d bool: where False nothing changes; None: always
    """

    minus_decay: Tensor | None
    c: Tensor
    beta: Tensor
    last_beta: Tensor | None
    gate: Tensor | None


Averages = tuple[Tensor, Tensor | None, Tensor | None]
"""z, x and comp of `Elements`."""


class Elements(NamedTuple):
    """Views of one shape, changed in place. z, x: float32; comp: bfloat16; y: float32, which gets the new y. x and comp
    None: lean, and y holds the old one."""

    z: Tensor
    x: Tensor | None
    comp: Tensor | None
    y: Tensor


class Move(NamedTuple):
    """What z moves against: scale * direction, where active. direction: of z's shape, float32 or bfloat16; scale
    (float32) and active (bool; None: everywhere) broadcast over it."""

    direction: Tensor
    scale: Tensor
    active: Tensor | None


def sweep_(elements: Elements, move: Move | None, pace: Pace, scratch: Scratch) -> None:
    """One step of z, x and y, in place. move None: z stays, x averages all the same."""
    z, x, comp, y = elements
    if x is None and pace.last_beta is not None:
        recovered = recover(z, y, pace.last_beta, scratch.take("recovered", z.shape))
    if move is not None:
        direction, scale, active = move
        if active is None:
            if pace.minus_decay is not None:
                z.addcmul_(z, pace.minus_decay)
            z.addcmul_(direction, scale, value=-1)
        else:
            moved = scratch.take("moved", z.shape).copy_(z)
            if pace.minus_decay is not None:
                moved.addcmul_(moved, pace.minus_decay)
            settle_(z, moved.addcmul_(direction, scale, value=-1), active)
    if x is not None and comp is not None:
        average_(x, comp, z, pace.c, pace.gate, scratch)
        gradient_point(z, x, pace.beta, y)  # z, x and beta stand where the gate is False: y gets the bits it had
    else:
        point = gradient_point(z, recovered.lerp_(z, pace.c), pace.beta, recovered)
        settle_(y, point, pace.gate)
