"""The learning rate that is best for one horizon: a grid of factors of two that grows until its best lies inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from anytimed.contracts import Json

Of = TypeVar("Of")

MOST: Final = 9
"""Learning rates that are tried before an edge is taken for the best."""


def tuned(centre: float, losses: Callable[[Sequence[float]], Sequence[float | None]]) -> dict[float, float | None]:
    """Every learning rate that was tried, ascending, with its loss (None: it diverged). losses: of several rates, which
    may train at once."""
    tried = dict(zip(first := [centre / 2, centre, centre * 2], losses(first), strict=True))
    while len(tried) < MOST:
        rates = sorted(tried)
        best = best_of(tried)
        if best == rates[0]:
            further = rates[0] / 2
        elif best == rates[-1]:
            further = rates[-1] * 2
        else:
            break
        tried[further] = losses([further])[0]
    return {lr: tried[lr] for lr in sorted(tried)}


def best_of(tried: Mapping[Of, float | None]) -> Of:
    """The rate, or whatever else was tried, of the lowest loss."""
    return min(tried, key=lambda it: math.inf if (loss := tried[it]) is None else loss)


def inside(tried: dict[float, float | None]) -> bool:
    """Whether the best lies between two that are worse."""
    rates = sorted(tried)
    return best_of(tried) not in (rates[0], rates[-1])


def told(tried: Mapping[float, float | None], lr: float, losses: Sequence[float | None]) -> Json:
    """What a result tells of a rival at a horizon. losses: nats per byte with the rate that was taken, by seed."""
    return {"tried": {f"{rate:g}": loss for rate, loss in tried.items()}, "lr": lr, "losses": [*losses]}
