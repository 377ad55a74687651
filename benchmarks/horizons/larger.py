"""A larger model on a GPU, whose time is short: the runs in the order of what they tell, as far as the minutes go.

First the one run of SF-NorMuon to the longest horizon; then NorMuon under a cosine, tuned at the shortest horizon, and
with the learning rate that was best there at the longest; then the same for AMUSE and AdamW. One seed. A run that would
not end in time by the speed of those before is left out, and a later call takes what was trained from here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from anytimed.contracts import Json
from horizons.plans import RIVALS, Run, one_run, rival_run
from horizons.trainer import Trainer, last
from horizons.tuning import best_of, told, tuned

ORDER: Final = (("sf_normuon", "normuon, mu 0.8"), ("amuse", "adamw"))
"""A one run, and the rival beside it."""


class OutOfTime(Exception):
    """A run would not end within the minutes."""


class Budget:
    """Trains while there is time."""

    def __init__(self, trainer: Trainer, minutes: float | None) -> None:
        self._trainer = trainer
        self._ends = None if minutes is None else time.monotonic() + 60 * minutes
        self._speed: float | None = None
        self._beside = 0.0

    def train(self, runs: Sequence[Run]) -> list[Json]:
        """What was seen in each. Raises OutOfTime before one that would not fit: speed and start are those of the run
        before, and the first of all is taken to fit."""
        return [self._one(run) for run in runs]

    def _one(self, run: Run) -> Json:
        if not self._trainer.has(run) and not self._fits(run):
            print(f"{run.name}: left out, it would not end in time", file=sys.stderr, flush=True)
            raise OutOfTime(run.name)
        found = self._trainer.all_of([run])[0]
        if found["tokens_per_s"]:
            self._speed = found["tokens_per_s"]
            self._beside = max(0.0, found["seconds"] - found["seen"][-1]["tokens"] / found["tokens_per_s"])
        return found

    def _fits(self, run: Run) -> bool:
        if self._ends is None or self._speed is None:
            return True
        needed = run.steps * self._trainer.scale.tokens / self._speed + self._beside
        return time.monotonic() + needed < self._ends


def measured(trainer: Trainer, minutes: float | None) -> Json:
    """As `anytime.measured` tells it, as far as the time went: a horizon that no run of a rival reached is missing."""
    scale, budget = trainer.scale, Budget(trainer, minutes)
    found: Json = {"one": {}, "rivals": {}}
    shortest, longest = scale.horizons[0], scale.horizons[-1]

    def losses(kind: str, horizon: int, rates: Sequence[float]) -> list[float | None]:
        return [last(f) for f in budget.train([rival_run(kind, horizon, lr, scale, 1) for lr in rates])]

    for one, rival in ORDER:
        with suppress(OutOfTime):
            run = budget.train([one_run(one, scale, 1)])[0]
            found["one"][one] = [{name: run[name] for name in ("seen", "forgets")}]
        with suppress(OutOfTime):
            tried = tuned(RIVALS[rival].centre, partial(losses, rival, shortest))
            lr = best_of(tried)
            found["rivals"][rival] = {str(shortest): told(tried, lr, [tried[lr]])}
            if longest != shortest:
                ended = losses(rival, longest, [lr])
                found["rivals"][rival][str(longest)] = told({lr: ended[0]}, lr, ended)
    return found
