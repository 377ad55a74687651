"""Whether the training goes well: steps that were not finite, and losses that jump.

The guard reads the reports of steps in their order and keeps a window of losses, which is part of every commit, so that
a resume judges as the undisturbed run did. A step that was not finite changed nothing (`learner`) and is told; so is a
spike, a loss beyond `sigma` standard deviations above the mean of a full window. Where too many bad steps stand in one
window, the span of their batches is to be gone around: `span` says which.

A spike enters the window like any other loss: when the data changes for good, the first steps are told and the window
soon takes the new level for what is usual.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from anytimed.contracts import Json, StepReport

LEAST_DEVIATION = 1e-3
"""Of the mean: what a loss may always move by. A loss that stands still has no deviation at all."""


@dataclass(frozen=True, slots=True)
class Span:
    """Batches to go around, by number, both included; `step` is the first bad one; why, for people."""

    first_batch: int
    last_batch: int
    step: int
    why: str


class Guard:
    """window_steps: of the losses and of bad steps. skipped_steps, spike_steps: so many in one window are too many;
    0: never."""

    def __init__(self, *, window_steps: int, sigma: float, skipped_steps: int, spike_steps: int) -> None:
        self._sigma = sigma
        self._most = {"skipped": skipped_steps, "spike": spike_steps}
        self._losses: deque[float] = deque(maxlen=window_steps)
        self._bad: deque[tuple[str, int, int]] = deque()
        self._window = window_steps

    def look(self, report: StepReport) -> Json | None:
        """Take a step in; an entry for the journal where it was bad."""
        while self._bad and self._bad[0][1] <= report.step - self._window:
            self._bad.popleft()
        at = {"step": report.step, "batch": report.batch}
        if report.skipped:
            self._bad.append(("skipped", report.step, report.batch))
            return {"kind": "skipped", **at}
        limit = self._limit()
        self._losses.append(report.loss)
        if report.loss <= limit:
            return None
        self._bad.append(("spike", report.step, report.batch))
        return {"kind": "spike", **at, "loss": report.loss, "limit": limit}

    @property
    def span(self) -> Span | None:
        """The batches to go around, if there are too many bad steps."""
        for kind, most in self._most.items():
            bad = [(step, batch) for what, step, batch in self._bad if what == kind]
            if most and len(bad) >= most:
                why = f"{len(bad)} {kind} steps within {self._window}"
                return Span(bad[0][1], bad[-1][1], bad[0][0], why)
        return None

    def state(self) -> Json:
        """What a resume needs, as JSON."""
        return {"losses": list(self._losses), "bad": [list(bad) for bad in self._bad]}

    def restore(self, state: Json) -> None:
        """The inverse of `state`; a window that is shorter now keeps the newest."""
        self._losses.clear()
        self._losses.extend(float(loss) for loss in state["losses"])
        self._bad = deque((str(kind), int(step), int(batch)) for kind, step, batch in state["bad"])

    def _limit(self) -> float:
        if len(self._losses) < self._window:
            return math.inf
        mean, deviation = _moments(self._losses)
        return mean + self._sigma * max(deviation, LEAST_DEVIATION * abs(mean))


def _moments(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Mean and standard deviation; sums without rounding, so that a resume finds the same bits."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
