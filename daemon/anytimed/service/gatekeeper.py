"""What the next export is compared with: the newest published x that an evaluation has confirmed.

An export never evaluates, it goes by the latest evaluation. So a published x is a candidate at first; it becomes the
one to compare with when the next evaluation finds x no worse than the one before it. An x that was ruined between two
evaluations and published can therefore not lower the bar for what follows. Where export and evaluation fall on the same
step, the x that is judged is the x that was evaluated.

Losses are compared at equal hold-out only; when the hold-out changes, the published x, kept in the run directory, is
evaluated on the new one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from anytimed.contracts import Evaluation
from anytimed.service.requests import Published
from anytimed.storage.gate import Standing, Verdict, judge

LossAt = Callable[[Path], float | None]
"""The loss of the x in a folder on the hold-out in force, in nats per token; None where it cannot be told."""


class Gatekeeper:
    """One run's gate. `standing`: the published x at the start, `served`: where it is kept here."""

    def __init__(self, standing: Standing | None, served: Path | None) -> None:
        self._standing, self._folder = standing, served
        self._candidate: tuple[Standing, Path | None] | None = None

    @property
    def keeps(self) -> str | None:
        """The checkpoint whose files have to stay in the run directory, beside the newest."""
        return self._folder.name if self._folder is not None else None

    def published(self, done: Published) -> None:
        """A checkpoint was published."""
        if done.standing is None:
            return
        self._candidate = (done.standing, done.served)
        if self._standing is None:
            self._take()

    def evaluated(self, found: Evaluation, margin: float, loss_at: LossAt) -> None:
        """x was evaluated: a candidate is confirmed, or forgotten."""
        self._compare_on(found.holdout, loss_at)
        if self._candidate is not None and judge(found, self._standing, margin).refused is None:
            self._take()
            self._compare_on(found.holdout, loss_at)
        self._candidate = None

    def verdict(self, latest: Evaluation | None, margin: float) -> Verdict:
        """Over an export that goes out now."""
        return judge(latest, self._standing, margin)

    # --- within ---

    def _take(self) -> None:
        assert self._candidate is not None
        self._standing, self._folder = self._candidate

    def _compare_on(self, holdout: str, loss_at: LossAt) -> None:
        if self._standing is None or self._standing.holdout == holdout or self._folder is None:
            return
        loss = loss_at(self._folder)
        if loss is not None:
            self._standing = replace(self._standing, holdout=holdout, loss_x=loss)
