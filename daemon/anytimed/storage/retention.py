"""What may go. Pure functions: they are given what exists and the time, and answer names; others delete.

A commit may go once K newer ones are verified. A checkpoint may go when it is neither among the newest N, nor the one
kept for its period, nor named by latest.json or best.json, nor so young that a pull may still be reading it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint as retention sees it: `order` is (term, seq), `created_s` seconds since 1970."""

    id: str
    order: tuple[int, int]
    created_s: float


def superseded(
    orders: Iterable[tuple[int, int]], verified: AbstractSet[tuple[int, int]], keep: int
) -> list[tuple[int, int]]:
    """The commits, by (term, seq), that are older than the `keep` newest verified ones; unverified ones are never
    counted.

    Fewer than `keep` verified: nothing may go. keep >= 2, so that one damaged commit is never the last.
    """
    if keep < 2:
        raise ValueError(f"keep is {keep}; expected 2 or more, or one damaged commit would be the end of the run")
    kept = sorted(verified, reverse=True)[:keep]
    return [] if len(kept) < keep else sorted(order for order in orders if order < kept[-1])


def retirable(
    published: Sequence[Published],
    *,
    now_s: float,
    keep: int,
    keep_every_s: float | None,
    longest_pull_s: float,
    named: AbstractSet[str],
) -> list[str]:
    """Ids that may go, oldest first. `keep_every_s`: also keep the first checkpoint of every such period of time."""
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected 1 or more")
    ordered = sorted(published, key=lambda p: p.order)
    kept = {p.id for p in ordered[-keep:]} | set(named)
    kept |= {p.id for p in ordered if now_s - p.created_s < longest_pull_s}
    if keep_every_s is not None:
        # The first of a period, not the last: it stays the choice while the period fills, so nothing is kept, then
        # dropped.
        first: dict[int, str] = {}
        for p in ordered:
            first.setdefault(int(p.created_s // keep_every_s), p.id)
        kept |= set(first.values())
    return [p.id for p in ordered if p.id not in kept]
