"""What was predicted, and what was found.

Where an earlier session had measured something like it, the prediction is its figure; the others were written down
before the runs. A figure whose runs were not made is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from anytimed.contracts import Json

OLD, NEW = "python", "headers"
WINDOW: Final = "switch/window-4T"
"""A window that fits what follows the switch: what others are measured by."""


class Curves:
    """The runs by name, and what is asked of them. Raises KeyError where a run was not made."""

    def __init__(self, runs: Mapping[str, Json], restarted: Mapping[str, Mapping[str, Json]]) -> None:
        self._runs, self._restarted = runs, restarted

    def last(self, name: str, text: str, seed: int = 1) -> float:
        """x at the end."""
        return float(self._runs[f"{name}@{seed}"]["probed"][-1]["losses"][text])

    def apart(self, name: str, other: str, text: str, seed: int = 1) -> float:
        return self.last(name, text, seed) - self.last(other, text, seed)

    def fired(self, *names: str) -> int:
        return sum(len(self._runs[f"{name}@1"]["forgets"]) for name in names)

    def fired_in(self, *names: str) -> int:
        """With any seed, in those of them that were made."""
        found = [len(run["forgets"]) for name, run in self._runs.items() if name.partition("@")[0] in names]
        if not found:
            raise KeyError(names)
        return sum(found)

    def best_restarted(self, change: str) -> str:
        """The rival that ended best, without its seed."""
        kinds = self._restarted[change].values()
        if not kinds:
            raise KeyError(change)
        return str(min(kinds, key=lambda of: of["loss"])["run"]).partition("@")[0]

    def by_seed(self, name: str) -> dict[str, float]:
        """Behind the fitting window on the new text, for every seed that has both."""
        found = {}
        for seed in range(1, 10):
            if {f"{name}@{seed}", f"{WINDOW}@{seed}"} <= self._runs.keys():
                found[str(seed)] = round(self.apart(name, WINDOW, NEW, seed), 4)
        return found


Find = Callable[[Curves], float]


def _behind(name: str, other: str, text: str) -> Find:
    return lambda curves: curves.apart(name, other, text)


def _restarted(change: str, other: str, text: str) -> Find:
    return lambda curves: curves.apart(curves.best_restarted(change), other, text)


FIRED: Final = "stationary, SF-NorMuon: times fired"
FIGURES: Final[dict[str, tuple[float, Find]]] = {
    FIRED: (0, lambda c: c.fired_in("sf_normuon/trunk", "stationary/steered")),
    **{
        f"stationary, {way}: behind steered": (guess, _behind(f"stationary/{way}", "stationary/steered", OLD))
        for way, guess in {"window-T": 0.03, "window-4T": 0.005, "power-1": 0.0}.items()
    },
    "stationary, AMUSE: times fired": (2, lambda c: c.fired("amuse/trunk")),
    "stationary, AMUSE: steered behind unsteered at 4T": (0.01, _behind("amuse/trunk", "amuse/unsteered", OLD)),
    **{
        f"switch, {way}: behind the window of 4T on the new text": (guess, _behind(f"switch/{way}", WINDOW, NEW))
        for way, guess in {
            "long/plain": 1.36,
            "long/steered": 0.006,
            "long/power-1": 1.33,
            "long/power-4": 1.27,
            "window-T": 0.05,
            "short/plain": -0.04,
            "short/steered": 0.005,
            "short/power-1": -0.02,
            "short/power-4": 0.04,
            "long/amuse-plain": 1.3,
            "long/amuse-steered": 0.048,
            "amuse-window-4T": 0.03,
        }.items()
    },
    "switch, restarted: behind the window of 4T on the new text": (-0.06, _restarted("switch", WINDOW, NEW)),
    "switch, restarted: behind the window of 4T on the old text": (0.0, _restarted("switch", WINDOW, OLD)),
    "switch, long/steered: times fired": (8, lambda c: c.fired("switch/long/steered")),
    "switch, short/steered: times fired": (3, lambda c: c.fired("switch/short/steered")),
    "switch, long/steered behind long/plain on the old text": (
        1.2,
        _behind("switch/long/steered", "switch/long/plain", OLD),
    ),
    "switch, short/plain behind long/plain on the old text": (
        0.5,
        _behind("switch/short/plain", "switch/long/plain", OLD),
    ),
    **{
        f"added, {way}: behind both from the start on the {told} text": (guess, _behind(f"added/{way}", "both", text))
        for way, guesses in {
            "short/plain": (-0.045, 0.056),
            "short/steered": (0.022, 0.068),
            "short/power-1": (-0.03, 0.03),
            "window-4T": (-0.04, 0.05),
            "window-T": (0.03, 0.06),
            "long/steered": (0.03, 0.08),
            "long/plain": (0.0, 1.4),
            "long/power-1": (0.0, 1.37),
        }.items()
        for told, text, guess in (("old", OLD, guesses[0]), ("new", NEW, guesses[1]))
    },
    "added, restarted: behind both from the start on the old text": (-0.02, _restarted("added", "both", OLD)),
    "added, restarted: behind both from the start on the new text": (-0.03, _restarted("added", "both", NEW)),
    "added, short/steered: times fired": (2, lambda c: c.fired("added/short/steered")),
}
"""Losses in nats a byte at the end of a run."""


def found(curves: Curves) -> Json:
    """By name: what was predicted, and what was found."""
    return {name: {"predicted": guess, "found": _found(curves, find)} for name, (guess, find) in FIGURES.items()}


def _found(curves: Curves, find: Find) -> float | None:
    try:
        return round(find(curves), 4)
    except KeyError:
        return None
