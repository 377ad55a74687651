"""The daemon's own loop in segments of ten steps that take turns: with something beside it, and without.

`Segments` counts, keeps the clock and ends the run; a benchmark says by its hooks what happens in a segment of each
kind. `compared` makes of the times what a result tells.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from anytimed.contracts import Batch
from anytimed.service.loop import Daemon

STEPS: Final = 10


class Segments(Daemon):
    """`times`: seconds of the measured segments, by kind. kinds: in the order in which they take turns."""

    def take_turns(self, kinds: Sequence[Any], segments: int, *, warmup: int) -> None:
        """segments: measured ones, after `warmup` that are not."""
        self._kinds, self._measured, self._warmup = kinds, segments, warmup
        self.times: dict[Any, list[float]] = {kind: [] for kind in kinds}
        self.segment = self.taken = 0
        self.since = 0.0
        """When the segment began; a hook that does what is not measured puts it off."""

    @property
    def kind(self) -> Any:
        return self._kinds[self.segment % len(self._kinds)]

    def begins(self) -> None:
        """Before the clock of a segment starts."""

    def starts(self) -> None:
        """After it has started, before the first step."""

    def stepped(self, before: float, after: float) -> None:
        """A step was taken between these moments of `time.perf_counter`; `taken` counts those before it."""

    def waits(self) -> None:
        """Before the clock stops."""

    def ended(self) -> None:
        """After it."""

    def _step(self, batch: Batch) -> None:
        if self.taken == 0:
            self.begins()
            self.since = time.perf_counter()
            self.starts()
        before = time.perf_counter()
        super()._step(batch)
        self.stepped(before, time.perf_counter())
        self.taken += 1
        if self.taken == STEPS:
            self.waits()
            took = time.perf_counter() - self.since
            self.ended()
            if self.segment >= self._warmup:
                self.times[self.kind].append(took)
            self.segment, self.taken = self.segment + 1, 0
            if self.segment == self._measured + self._warmup:
                self._limit = self._learner.step_count


def compared(times: Mapping[Any, Sequence[float]], plain: tuple[Any, str], other: tuple[Any, str]) -> dict[str, Any]:
    """Medians and quartiles of two kinds under the names that a result gives them; the ratio of the second to the
    first; and, for what that is worth, the ratio among segments that do the same thing."""
    named = {name: list(times[kind]) for kind, name in (plain, other)}
    medians = [statistics.median(found) for found in named.values()]
    same = list(times[plain[0]])
    return {
        "segments_each": len(times[other[0]]),
        "median_10_steps_s": {name: round(statistics.median(found), 4) for name, found in named.items()},
        "quartiles_10_steps_s": {
            name: [round(q, 4) for q in statistics.quantiles(found, n=4)] for name, found in named.items()
        },
        "ratio": round(medians[1] / medians[0], 4),
        "ratio_of_plain_halves": round(statistics.median(same[1::2]) / statistics.median(same[::2]), 4),
    }
